"""What a name may look like, and what a duration looks like.  One grammar for the whole house."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

NO_LABELS: Final[dict[str, str]] = {}
"""One for all records without any: of tens of thousands each would have its own."""

_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_ID: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,126}[A-Za-z0-9])?")
_LABEL: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_./-]{0,126}[A-Za-z0-9])?")
_DURATION: Final = re.compile(r"(?:(\d+(?:\.\d+)?)(ms|s|m|h))+")
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@lru_cache(maxsize=4096)  # a service's tasks and allocations come one after the other
def check_name(text: str, what: str) -> str:
    """`text`, if it may name a service, task or node; else ValueError.

    1 to 63 letters, digits, '-', '_' or '.', with a letter or digit at both ends (RFC 1123's
    label plus '_' and '.', so that etcd keys, file names and comments never need quoting).
    """
    if not _NAME.fullmatch(text):
        raise ValueError(
            f"{what} {text!r} is not a name: use 1 to 63 letters, digits, '-', '_' or '.', "
            "with a letter or digit at both ends"
        )
    return text


def check_id(text: str, what: str) -> str:
    """The same for names that others give: a container's is 64 digits, and twice that is enough."""
    if not _ID.fullmatch(text):
        raise ValueError(
            f"{what} {text!r} is not a name: use 1 to 128 letters, digits, '-', '_' or '.', "
            "with a letter or digit at both ends"
        )
    return text


def check_label(text: str) -> str:
    """`text`, if it may be the key of a label, "zone" or "topology.kubernetes.io/zone"; else
    ValueError.
    """
    if not _LABEL.fullmatch(text):
        raise ValueError(
            f"label {text!r} is not a key: use 1 to 128 letters, digits, '-', '_', '.' or '/', "
            "with a letter or digit at both ends"
        )
    return text


def parse_duration(text: str) -> float:
    """Seconds in a text such as "250ms", "5s", "1m30s".  Raises ValueError."""
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{text!r} is not a duration: write it like 250ms, 5s or 1m30s")
    return sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(text))

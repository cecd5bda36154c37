"""Which nodes something is for, said by their labels, as in Kubernetes' label selectors.

    zone=a   zone==a   role!=worker   zone in (a, b)   zone notin (a, b)   gpu   !gpu

Joined by commas, all of which must hold.  Pure.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model.names import check_label

if TYPE_CHECKING:
    from collections.abc import Mapping

_TERM: Final = re.compile(
    r"""\s*(?:
        (?P<absent>!)\s*(?P<absent_key>[^\s!=(),]+)
      | (?P<key>[^\s!=(),]+)\s*(?:
            (?P<sign>==|=|!=)\s*(?P<value>[^\s!=(),]+)
          | \s(?P<word>in|notin)\s*\((?P<values>[^()]*)\)
        )?
    )\s*(?:,|$)""",
    re.VERBOSE,
)


class Requirement(NamedTuple):
    """What a label must be: one of `values`, or there at all if they are None; or not."""

    key: str
    values: frozenset[str] | None
    wanted: bool

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether it does.  A label that is not there has none of the values."""
        value = labels.get(self.key)
        found = value is not None if self.values is None else value in self.values
        return found is self.wanted


Selector = tuple[Requirement, ...]


def matches(selector: Selector, labels: Mapping[str, str]) -> bool:
    """Whether all requirements hold."""
    return all(requirement.holds(labels) for requirement in selector)


@lru_cache(maxsize=1024)
def parse(text: str) -> Selector:
    """The requirements in a text; none in an empty one.  Raises ValueError."""
    found: list[Requirement] = []
    at = 0
    while at < len(text.rstrip()):
        match = _TERM.match(text, at)
        if match is None:
            raise ValueError(
                f"selector {text!r}: {text[at:].strip()!r} is not understood; write requirements "
                "like zone=a, role!=worker, zone in (a, b), zone notin (a, b), gpu or !gpu, with "
                "commas between them"
            )
        found.append(_requirement(match, text))
        at = match.end()
    return tuple(found)


def _requirement(match: re.Match[str], text: str) -> Requirement:
    key = check_label(match["key"] or match["absent_key"])
    if match["absent"]:
        return Requirement(key, None, wanted=False)
    if match["word"]:
        values = frozenset(part.strip() for part in match["values"].split(","))
        if "" in values:
            raise ValueError(f"selector {text!r}: {match['word']} needs values: {key} in (a, b)")
        return Requirement(key, values, wanted=match["word"] == "in")
    if match["sign"]:
        return Requirement(key, frozenset((match["value"],)), wanted=match["sign"] != "!=")
    return Requirement(key, None, wanted=True)

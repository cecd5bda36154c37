"""Which rules an agent may take over: its own edition's and earlier ones, but none that came later.

`EDITION` goes up when an agent of the edition before would misread, or could not keep, what the
rules of this one hold.  tests/unit/test_edition.py says when that is.  Pure.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from mesh.rules import elements

if TYPE_CHECKING:
    from mesh.rules.elements import Elements

EDITION: Final = 4

SLOT: Final = 5
"""Where the program's fingerprint tells it, behind what else it tells."""

_CANARY: Final = re.compile(r"[0-9a-f.]+/([0-9]+)(?:/[0-9a-f]+)?")


def of_fingerprint(found: Elements) -> int:
    """The edition in the elements of the set `fingerprint`; 0: from before there were any."""
    data = found.get(("fingerprint", elements.mark_bytes(SLOT)))
    return elements.mark_of(data) if data is not None else 0


def of_canary(comment: str) -> int:
    """The edition in what a canary's comment tells, behind version and witness; 0 as above."""
    match = _CANARY.fullmatch(comment)
    return int(match[1]) if match is not None else 0


def refusal(where: str, found: int) -> str | None:
    """Why rules of an edition may not be taken over, and what to do; None if they may."""
    if found <= EDITION:
        return None
    return (
        f"{where} holds rules of a later version of warren-mesh (edition {found}, and this one "
        f"knows {EDITION}): upgrade warren-mesh here, or run the later version's `mesh agent "
        "--cleanup`, or lose their connections with --downgrade"
    )

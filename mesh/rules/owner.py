"""Whose rules a host holds: an agent's, or those of somebody who publishes ports without etcd.

There is one owner in a network namespace: each takes what it does not know for left over.  Pure.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from mesh.rules import elements

if TYPE_CHECKING:
    from mesh.rules.elements import Elements

AGENT: Final = 0
"""Any agent's; all others have a number of 32 bits, drawn once."""

SLOT: Final = 6
"""Where the program's fingerprint tells an owner that is no agent."""

_CANARY: Final = re.compile(r"[0-9a-f.]+/[0-9]+/([0-9a-f]+)")


def of_fingerprint(found: Elements) -> int:
    """The owner in the elements of the set `fingerprint`."""
    data = found.get(("fingerprint", elements.mark_bytes(SLOT)))
    return elements.mark_of(data) if data is not None else AGENT


def of_canary(comment: str) -> int:
    """The owner in what a canary's comment tells, behind the edition."""
    match = _CANARY.fullmatch(comment)
    return int(match[1], 16) if match is not None else AGENT


def refusal(where: str, found: int, own: int) -> str | None:
    """Why `own` may not take over the rules of an owner, and what to do; None if it may."""
    if found == own:
        return None
    if own == AGENT:
        return (
            f"{where} holds ports that were published without etcd: publish them as services, then "
            "take these off with `mesh unpublish --all`"
        )
    if found == AGENT:
        return (
            f"{where} belongs to a mesh agent: publish through etcd (`mesh service create`), or "
            "take the agent off this host with `mesh agent --cleanup`"
        )
    return (
        f"{where} holds ports that were published with another state directory: use that one, or "
        "take them off with `mesh unpublish --all --force`"
    )

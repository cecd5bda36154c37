"""A change of elements as messages in the order that loses no packet, and refusals in words.  Pure.

Knows what depends on what among the sets; never sends anything.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from mesh.dataplane.nfmessages import LAYOUTS, additions, removals
from mesh.errors import ApplyFailed
from mesh.rules import elements

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.dataplane.nfmessages import Chunk
    from mesh.dataplane.nfnetlink import Refused
    from mesh.dataplane.nfwatch import Event
    from mesh.dataplane.protocol import ElementDelta
    from mesh.rules.elements import ElementKey


def packed(delta: ElementDelta) -> tuple[list[Chunk], list[Chunk]]:
    """The change, and the deletion of targets that have to outlive it for a moment.

    Frontends go first and come last, so that a split change never points at nothing.
    """
    gone: dict[str, list[bytes]] = {}
    orphans: dict[str, list[bytes]] = {}
    new: dict[str, list[tuple[bytes, bytes]]] = {}
    targets, add = elements.TARGETS, delta.add
    for element in delta.remove:
        name, key = element
        group = orphans if name in targets and element not in add else gone
        if name in group:
            group[name].append(key)
        else:
            group[name] = [key]
    for (name, key), data in add.items():
        if name in new:
            new[name].append((key, data))
        else:
            new[name] = [(key, data)]
    chunks = [c for name in _frontends_last(gone)[::-1] for c in removals(name, gone[name])]
    chunks += [c for name in _frontends_last(new) for c in additions(name, new[name])]
    late = [chunk for name, keys in orphans.items() for chunk in removals(name, keys)]
    return (chunks, late) if chunks else (late, [])


def _frontends_last(names: Iterable[str]) -> list[str]:
    frontends = elements.FRONTENDS
    return sorted(names, key=frontends.__contains__)


_MOST_TOUCHED: Final = 1000
"""Elements that are asked for one by one, in 10 ms; beyond, reading all is not much slower."""

_REASONS: Final = {
    errno.EEXIST: "exists already with other data",
    errno.ENOENT: "does not exist",
}


def explained(refused: Refused, chunks: list[Chunk]) -> ApplyFailed:
    """Which element the kernel did not take, and why not."""
    number = refused.errno or 0
    reason = _REASONS.get(number, refused.strerror)
    culprit = "the change"
    if refused.index is not None:
        chunk = chunks[refused.index]
        key = chunk.culprit(refused.offset)
        culprit = f"one of {len(chunk.keys)} elements of {chunk.name}"
        if key is not None:
            culprit = elements.describe(key)
    return ApplyFailed(f"nftables refused {culprit}: {reason} ({errno.errorcode.get(number)})")


def touched(events: Iterable[Event]) -> frozenset[ElementKey] | None:
    """The elements that some changes are about; None if there is more to it, or too many."""
    found: set[ElementKey] = set()
    for event in events:
        if not event.kind.endswith("element") or event.name not in elements.SETS:
            return None
        found.update(key for key, _ in LAYOUTS[event.name].parse(event.listed))
        if len(found) > _MOST_TOUCHED:
            return None
    return frozenset(found)

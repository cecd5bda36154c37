"""What the program that is loaded tells of itself: fingerprint, bits of marks, what it needs on
demand.  Only reads.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from mesh.dataplane import nfmessages
from mesh.rules import connlimits, elements, extras, marks, program
from mesh.rules.nft_intact import Loaded

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.dataplane.nfnetlink import Socket
    from mesh.rules.elements import Elements
    from mesh.rules.extras import Extras
    from mesh.rules.marks import Layout


def fingerprint(netlink: Socket) -> Loaded:
    """Schema, version and witness, as far as there are any."""
    try:
        found = nfmessages.read_elements(netlink, ["fingerprint"])
    except FileNotFoundError:
        return Loaded(None, None, None)
    parts = [found.get(("fingerprint", elements.mark_bytes(slot))) for slot in range(3)]
    return Loaded(*(elements.mark_of(part) if part else None for part in parts))


def layout(netlink: Socket) -> Layout | None:
    """How the program on this host keeps marks; None if there is none, or it cannot be told."""
    try:
        found = nfmessages.read_elements(netlink, ["fingerprint"])
    except OSError:
        return None
    keys = (elements.mark_bytes(key) for key in (0, *program.LAYOUT_KEYS))
    parts = [found.get(("fingerprint", key)) for key in keys]
    match [elements.mark_of(part) for part in parts if part]:
        case [_]:
            return marks.DEFAULT
        case [_, packet_mark, ct_mark]:
            with contextlib.suppress(ValueError):
                return marks.Layout.of(packet_mark, ct_mark)
    return None


def dispatched(netlink: Socket) -> frozenset[int]:
    """The pool sizes that the loaded program has chains for."""
    with contextlib.suppress(FileNotFoundError):
        found = nfmessages.raw_elements(netlink, "sizes")
        return frozenset(elements.mark_of(element[8:12]) for element in found)
    return frozenset()


def needed(netlink: Socket, layout: Layout) -> Extras:
    """What the elements that are there need, whatever became of it."""
    return _needed(netlink, (*elements.FRONTENDS, *_TEMPORARY), layout)


def still_needed(netlink: Socket, layout: Layout) -> Extras:
    """The same of what goes again when nobody needs it: pool sizes stay."""
    return _needed(netlink, _TEMPORARY, layout)


_TEMPORARY: Final = (*elements.GUARDED, "connlimits")


def surplus(netlink: Socket) -> dict[int, int]:
    """How many connections the limits refused, by the frontend's id bits."""
    with contextlib.suppress(FileNotFoundError):
        return nfmessages.counted(netlink, connlimits.SURPLUS)
    return {}


def _needed(netlink: Socket, names: Iterable[str], layout: Layout) -> Extras:
    found: Elements = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            found |= nfmessages.read_elements(netlink, [name])
    return extras.needed(found, layout)

"""What the program that is loaded tells of itself: fingerprint, bits of marks, what it needs on
demand.  Only reads.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from mesh.dataplane import nfmessages
from mesh.rules import elements, marks, nft, program
from mesh.rules.nft_intact import Loaded

if TYPE_CHECKING:
    from mesh.dataplane.nfnetlink import Socket
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


def in_use(netlink: Socket, layout: Layout) -> frozenset[int]:
    """The pool sizes that frontends need, whatever became of their dispatch."""
    with contextlib.suppress(FileNotFoundError):
        return nft.sizes(nfmessages.read_elements(netlink, elements.FRONTENDS), layout)
    return frozenset()


def is_guarding(netlink: Socket) -> bool:
    """Whether policies select any of this node's replicas."""
    with contextlib.suppress(FileNotFoundError):
        return bool(nfmessages.read_elements(netlink, elements.GUARDED))
    return False

"""Draws by a prefix of the client's address, for client-affine pools of the nat table.

mangle draws by the whole address for every flow, for it does not know the pool's prefix.  So these
chains draw again.  Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mesh.rules import slots, xtables
from mesh.rules.marks import NODE_BITS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.model.address import Family
    from mesh.rules.marks import Layout
    from mesh.rules.xtables import Chains

_WORD: Final = 0xFFFFFFFF


def chains(mark: int, family: Family, layout: Layout) -> Chains:
    """The chains that draw for flows of a pool, for those that stay and, if it has any, others;
    none where the whole address counts.

    HMARK writes all of the packet's mark.  So that waits in the flow's, whose own is known, and
    then they swap, as in xtables.rules.  Bits of the flow's mark that are the host's stay there:
    the same bits of the packet's wait in our field, which says one thing only, whether the packet
    is steered, and keeps that in its last bit.
    """
    prefix = slots.prefix_length(layout.slots_of(mark), family)
    if prefix == family.bits:
        return {}
    mine, rest = f"0x{layout.ct_mark:x}", _WORD & ~layout.slots
    waiting = layout.waiting().items()
    return {
        _name(each): (
            f"-j CONNMARK --save-mark --nfmask {mine} --ctmask {mine}",
            *(rule for host, place in waiting for rule in _copied(host, "CONNMARK", place)),
            f"-j HMARK --hmark-src-prefix {prefix} {xtables.draw(layout)}",
            f"-j MARK --set-xmark 0x{each & rest:x}/0x{rest:x}",
            f"-j CONNMARK --save-mark --nfmask {mine} --ctmask 0x0",
            f"-j CONNMARK --restore-mark --nfmask 0x0 --ctmask {mine}",
            f"-j CONNMARK --save-mark --nfmask {mine} --ctmask 0x0",
            *(rule for host, place in waiting for rule in _copied(place, "MARK", host)),
            *(
                _copied(layout.node(1 << NODE_BITS - 1), "MARK", layout.packet_mark)
                if waiting
                else ()
            ),
        )
        for each in dict.fromkeys((mark, mark | layout.stay))
    }


def jumps(drawing: Chains, layout: Layout) -> Iterator[str]:
    """The rules that lead a flow to the one of these chains that is for it."""
    for name in drawing:
        stay = layout.stay
        unless = "" if int(name.rpartition("-")[2], 16) & stay else "! "
        yield f"-m connmark {unless}--mark 0x{stay:x}/0x{stay:x} -j {name}"


def _copied(bit: int, target: str, to: int) -> Iterator[str]:
    """Have a bit of the packet's mark elsewhere, too."""
    yield f"-m mark --mark 0x{bit:x}/0x{bit:x} -j {target} --set-xmark 0x{to:x}/0x{to:x}"
    yield f"-m mark ! --mark 0x{bit:x}/0x{bit:x} -j {target} --set-xmark 0x0/0x{to:x}"


def _name(mark: int) -> str:
    return f"MESH-D-{mark:x}"

"""The bits of conntrack and packet marks (docs/dataplane.md): a layout of each node's own.  Pure.

Both marks have one field of 12 bits at the same place: the number of another node, in the packet
mark also all ones.  In the ct mark it is that only with VIA set; else it holds the frontend id, or
part of it, as do all bits that are neither flags nor the slot count n.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

MAX_SLOTS: Final = 1023
"""The largest pool: n has ten bits."""

LEAST_BITS: Final = 26
"""What the ct mark needs: ten for n, four flags, and at least twelve for the frontend id."""

NODE_BITS: Final = 12
"""What a node's number has."""

_WORD: Final = 0xFFFFFFFF
_NODES: Final = (1 << NODE_BITS) - 1


class Mark(NamedTuple):
    """A frontend's ct mark, taken apart."""

    id: int
    slots: int
    hashed: bool = False
    stays: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """Which bits of the marks the mesh uses on a node, and for what; made by `of`.

    `packet_mark` is the field in the packet mark, `ct_mark` all that the mesh may change in the ct
    mark.  `slots` is where n is, `id` where frontend ids are, which `ids` are the numbers of.
    """

    packet_mark: int
    ct_mark: int
    ours: int
    via: int
    hash: int
    stay: int
    slots: int
    id: int
    ids: range
    shift: int
    """By how many bits n is shifted."""
    node_shift: int
    """By how many bits a node's number is shifted."""
    _runs: tuple[tuple[int, int], ...]
    """Neighbouring bits of ids that stay neighbours in marks: a mask, and their shift."""

    @staticmethod
    def of(packet_mark: int, ct_mark: int) -> Layout:
        """Raises ValueError for fields that cannot hold what they must.

        The highest four bits outside the field are flags, the lowest ten in a row are n.
        """
        _check(packet_mark, ct_mark)
        *_, ours, via, hashed, stay = _bits(ct_mark & ~packet_mark)
        rest = ct_mark & ~(ours | via | hashed | stay)
        shift = next(at for at in range(32) if not MAX_SLOTS << at & ~rest)
        ids = rest & ~(MAX_SLOTS << shift)
        return Layout(
            packet_mark=packet_mark,
            ct_mark=ct_mark,
            ours=ours,
            via=via,
            hash=hashed,
            stay=stay,
            slots=MAX_SLOTS << shift,
            id=ids,
            ids=range(1, 1 << ids.bit_count()),
            shift=shift,
            node_shift=_lowest(packet_mark),
            _runs=tuple(_runs(ids)),
        )

    def __str__(self) -> str:
        return f"packet_mark 0x{self.packet_mark:08x}, ct_mark 0x{self.ct_mark:08x}"

    # ---- masks

    @property
    def foreign(self) -> int:
        """What of the ct mark is the host's own."""
        return _WORD & ~self.ct_mark

    @property
    def size(self) -> int:
        """What pools are dispatched on: n, and HASH."""
        return self.slots | self.hash

    @property
    def flows(self) -> int:
        """What all flows of one frontend have in common."""
        return self.id | self.ours | self.via

    @property
    def plain(self) -> int:
        """The mark of a flow that is ours, and that no frontend took."""
        return self.ours | self.stay

    @property
    def ended(self) -> int:
        """What a flow has whose connection was ended, and no other: both VIA and STAY."""
        return self.ours | self.via | self.stay

    @property
    def untranslated(self) -> int:
        """What is zero in the mark of a flow that no frontend took."""
        return self.ct_mark & ~self.plain

    # ---- marks

    def frontend(self, number: int, slots: int, hashed: bool = False, stays: bool = False) -> int:
        """The mark of a frontend with this id."""
        mark = self.ours | slots << self.shift
        for mask, shift in self._runs:
            mark |= (number & mask) << shift
        if hashed:
            mark |= self.hash
        return mark | self.stay if stays else mark

    def id_bits(self, number: int) -> int:
        """A frontend id in its place within a mark."""
        bits = 0
        for mask, shift in self._runs:
            bits |= (number & mask) << shift
        return bits

    def id_of(self, mark: int) -> int:
        """The frontend id in a mark (not in one with VIA set)."""
        number = 0
        for mask, shift in self._runs:
            number |= mark >> shift & mask
        return number

    def slots_of(self, mark: int) -> int:
        """The slot count in a frontend's mark."""
        return mark >> self.shift & MAX_SLOTS

    def parse(self, mark: int) -> Mark:
        """The parts of a frontend's mark (not of one with VIA set)."""
        return Mark(
            self.id_of(mark),
            self.slots_of(mark),
            hashed=bool(mark & self.hash),
            stays=bool(mark & self.stay),
        )

    def node(self, number: int) -> int:
        """A node's number in the field."""
        return number << self.node_shift

    def arrival(self, number: int) -> int:
        """The mark of a flow that came in through node `number`."""
        return self.ours | self.via | self.node(number)

    def end(self, mark: int) -> int:
        """What the mark of a flow becomes when its connection is ended.

        What is answered in its name goes back the way that it came: to the node in the field, or
        to none.
        """
        return self.ended | (mark & self.packet_mark if mark & self.via else 0)

    def is_ended(self, mark: int) -> bool:
        """Whether the connection of a flow with this mark was ended."""
        return mark & self.ended == self.ended

    def waiting(self) -> dict[int, int]:
        """For each bit of the host in the ct mark, the bit of the field where it can wait."""
        return {bit: self.node(1 << index) for index, bit in enumerate(_bits(self.foreign))}


def _check(packet_mark: int, ct_mark: int) -> None:
    for name, mask in (("packet_mark", packet_mark), ("ct_mark", ct_mark)):
        if not 0 <= mask <= _WORD:
            raise ValueError(f"{name} {mask:#x} is not a mask of 32 bits")
    field = f"packet_mark 0x{packet_mark:08x}"
    if packet_mark.bit_count() != NODE_BITS:
        raise ValueError(
            f"{field} has {packet_mark.bit_count()} bits: it must be 12 in a row, as in 0xfff00000"
        )
    if packet_mark != _NODES << _lowest(packet_mark):
        raise ValueError(f"{field} has gaps: it must be 12 bits in a row, as in 0xfff00000")
    if ct_mark.bit_count() < LEAST_BITS:
        raise ValueError(
            f"ct_mark 0x{ct_mark:08x} has {ct_mark.bit_count()} bits: {LEAST_BITS} are needed"
        )
    if packet_mark & ~ct_mark:
        raise ValueError(f"{field} is not within ct_mark 0x{ct_mark:08x}: the mesh copies it there")


def _lowest(mask: int) -> int:
    """The place of the lowest bit that is set."""
    return (mask & -mask).bit_length() - 1


def _bits(mask: int) -> list[int]:
    """Every bit that is set, from the lowest."""
    return [1 << at for at in range(32) if mask >> at & 1]


def _runs(mask: int) -> list[tuple[int, int]]:
    """Where the bits of a number go that fills a mask from its lowest bit."""
    places = [at for at in range(32) if mask >> at & 1]
    firsts = [0, *(n for n, (one, next_) in enumerate(pairwise(places), 1) if next_ != one + 1)]
    return [
        ((1 << end) - (1 << first), places[first] - first)
        for first, end in pairwise([*firsts, len(places)])
    ]


DEFAULT: Final = Layout.of(0xFFF00000, 0xFFFFFFFF)
"""Bits 0-9 n, 10-15 and 20-31 frontend id or node, 16 OURS, 17 VIA, 18 HASH, 19 STAY."""

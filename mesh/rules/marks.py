"""The bits of conntrack and packet marks (docs/dataplane.md).  Pure arithmetic.

ct mark: 0-9 slot count n, 10-15 and 20-31 frontend id, 16 OURS, 17 VIA, 18 HASH, 19 STAY.
With VIA set, bits 20-31 are instead the number of the node the flow came in through.
"""

from __future__ import annotations

from typing import Final, NamedTuple

OURS: Final = 0x10000
VIA: Final = 0x20000
HASH: Final = 0x40000
STAY: Final = 0x80000
ID_MASK: Final = 0xFFF0FC00
SIZE_MASK: Final = 0x000403FF
FLOWS_MASK: Final = ID_MASK | OURS | VIA
NODE_MASK: Final = 0xFFF00000
MAX_SLOTS: Final = 1023
IDS: Final = range(1, 1 << 18)


class Mark(NamedTuple):
    """A frontend's ct mark, taken apart."""

    id: int
    slots: int
    hashed: bool = False
    stays: bool = False

    @property
    def value(self) -> int:
        """The mark as the kernel has it."""
        return frontend(self.id, self.slots, self.hashed, self.stays)


def frontend(frontend_id: int, slots: int, hashed: bool, stays: bool) -> int:
    """A frontend's mark."""
    mark = id_bits(frontend_id) | OURS | slots
    if hashed:
        mark |= HASH
    return mark | STAY if stays else mark


def id_bits(frontend_id: int) -> int:
    """A frontend id in its place within a mark."""
    return (frontend_id >> 6) << 20 | (frontend_id & 0x3F) << 10


def parse(value: int) -> Mark:
    """The parts of a frontend's mark (not of one with VIA set)."""
    return Mark(
        id=(value >> 20) << 6 | value >> 10 & 0x3F,
        slots=value & 0x3FF,
        hashed=bool(value & HASH),
        stays=bool(value & STAY),
    )


def via(number: int) -> int:
    """The mark of a flow that came in through node `number`."""
    return OURS | VIA | number << 20

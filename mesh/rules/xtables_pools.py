"""Pools as chains of the nat table, and back: one chain per frontend id, found through a tree.

Slots are drawn as in the nftables program: at random, each slot as likely as the next, or by the
client's address.  Pure, mutable; knows nothing of ipsets but the names of allow lists.

A rule's comment says which slots of which mark it is, "10c03:0-2"; without one it is the next slot.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from functools import lru_cache, reduce
from operator import xor
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model import address
from mesh.rules import elements, ipsets, jhash, xtables, xtables_draws
from mesh.rules.xtables_tree import Names, Tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mesh.model.address import Family
    from mesh.rules.marks import Layout
    from mesh.rules.xtables import Chains, Rules

    Slots = Mapping[int, bytes]

_NAMES: Final = Names("MESH-POOLS", "MESH-T-", "MESH-P-")

_ANY: Final = "! -p icmp"
"""DNAT to a port wants a protocol named that has ports, or ICMP; a pool serves all but that one,
which no frontend has."""

_POOL: Final = re.compile(r"MESH-P-([0-9a-f]{5})")
_BUCKET: Final = re.compile(r"MESH-H-([0-9a-f]+)-([0-9a-f]+)")
_TARGET: Final = re.compile(r"-j DNAT --to-destination \[?(.+?)\]?:(\d+)$")
_COMMENT: Final = re.compile(r'--comment "?([0-9a-f]+):(\d+)(?:-(\d+))?')
_CELL: Final = re.compile(r"-m connmark --mark 0x([0-9a-f]+)/0x[0-9a-f]+ ")
_LIMIT: Final = re.compile(r"--match-set mesh-allow[46]-([0-9a-f]+) src")


class Pools:
    """The pools of one family: what they hold, and the chains this comes to."""

    def __init__(self, family: Family, layout: Layout) -> None:
        self._family = family
        self._layout = layout
        self._targets: dict[int, dict[int, dict[int, bytes]]] = {}
        self._limited: dict[int, set[int]] = {}
        self._tree = Tree(_NAMES, layout)

    def get(self, mark: int, slot: int) -> bytes | None:
        """The target in a slot."""
        return self._targets.get(self._layout.id_of(mark), {}).get(mark, {}).get(slot)

    def put(self, mark: int, slot: int, target: bytes) -> None:
        """Fill a slot."""
        number = self._layout.id_of(mark)
        self._targets.setdefault(number, {}).setdefault(mark, {})[slot] = target
        self._settle(number)

    def drop(self, mark: int, slot: int) -> None:
        """Empty a slot."""
        number = self._layout.id_of(mark)
        pools = self._targets[number]
        del pools[mark][slot]
        if not pools[mark]:
            del pools[mark]
        if not pools:
            del self._targets[number]
        self._settle(number)

    def limit(self, mark: int) -> None:
        """Let only the allow list in."""
        number = self._layout.id_of(mark)
        self._limited.setdefault(number, set()).add(mark)
        self._settle(number)

    def unlimit(self, mark: int) -> None:
        """Let everybody in."""
        number = self._layout.id_of(mark)
        self._limited[number].discard(mark)
        if not self._limited[number]:
            del self._limited[number]
        self._settle(number)

    def size(self, number: int) -> int:
        """How many slots the pools of an id have."""
        return sum(map(len, self._targets.get(number, {}).values()))

    def ids(self) -> set[int]:
        """The ids that have a chain."""
        return self._targets.keys() | self._limited.keys()

    def limits(self) -> Iterator[int]:
        """The marks that are limited."""
        for found in self._limited.values():
            yield from found

    def items(self) -> Iterator[tuple[int, int, bytes]]:
        """Every mark, slot and target."""
        for pools in self._targets.values():
            for mark, slots in pools.items():
                for slot, target in slots.items():
                    yield mark, slot, target

    def chains(self, ids: Iterable[int]) -> Chains:
        """The chains of some ids, and those that lead there."""
        wanted = list(ids)
        found: Chains = {}
        for number in wanted:
            found |= self._pool(number)
        return found | self._tree.above(wanted)

    def _settle(self, number: int) -> None:
        self._tree.settle(number, exists=number in self._targets or number in self._limited)

    def _pool(self, number: int) -> Chains:
        """The chain of an id.  Two pools are in it while one takes the other's place."""
        pools = self._targets.get(number, {})
        limited, layout = self._limited.get(number, ()), self._layout
        rules = [
            f"-m set ! --match-set {ipsets.allow_name(self._family, mark)} src -j MESH-DENY"
            for mark in sorted(limited)
        ]
        found: Chains = {}
        for mark in sorted(pools):
            mask = layout.ct_mark & ~(layout.stay | (layout.slots if mark & layout.hash else 0))
            guard = f"-m connmark --mark 0x{mark & mask:x}/0x{mask:x} "
            chosen = guard if len(pools) > 1 else ""
            if mark & layout.hash:
                draws = xtables_draws.chains(mark, self._family, layout)
                rules += [f"{chosen}{rule}" for rule in xtables_draws.jumps(draws, layout)]
                found |= draws
                buckets = _buckets(mark, pools[mark], layout)
                rules += [f"{chosen}{rule}" for rule in _to_buckets(mark, buckets, layout)]
                found |= buckets
            else:
                rules += _draw(mark, pools[mark], chosen)
        return {_NAMES.of_leaf(number): tuple(rules), **found} if rules else found

    def parse(self, chains: Chains) -> None:
        """Take over what saved chains hold; what cannot be understood is left out."""
        for name, rules in chains.items():
            if match := _POOL.fullmatch(name):
                self._parse_limits(rules)
                self._parse_pool(rules)
            elif match := _BUCKET.fullmatch(name):
                self._parse_bucket(int(match[1], 16), int(match[2], 16), rules)

    def _parse_limits(self, rules: Rules) -> None:
        for rule in rules:
            if match := _LIMIT.search(rule):
                self.limit(int(match[1], 16))

    def _parse_pool(self, rules: Rules) -> None:
        mark, following = None, 0
        for rule in rules:
            target = _target_in(rule)
            if target is None:
                continue
            first = last = following
            if comment := _COMMENT.search(rule):
                mark, first = int(comment[1], 16), int(comment[2])
                last = int(comment[3] or first)
            if mark is not None:
                for slot in range(first, last + 1):
                    self.put(mark, slot, target)
            following = last + 1

    def _parse_bucket(self, mark: int, bucket: int, rules: Rules) -> None:
        grid = _grid(mark, self._layout)
        rest = dict.fromkeys(range(grid.side if bucket < grid.side else 0))
        for rule in rules:
            target, drawn = _target_in(rule), _CELL.search(rule)
            if target is None:
                continue
            for cell in [grid.cell_of(int(drawn[1], 16))] if drawn else list(rest):
                rest.pop(cell, None)
                self.put(mark, grid.slot(bucket, cell), target)


def chain(mark: int, layout: Layout) -> str:
    """The chain that the pool of a mark is in."""
    return _NAMES.of_leaf(layout.id_of(mark))


def _draw(mark: int, slots: Slots, guard: str) -> Iterator[str]:
    """Each slot with the same probability.  Equal neighbours are one rule; the last needs no dice.

    Ten digits are exact: the kernel has 31 bits.
    """
    left, told = len(slots), None
    for first, last, target in _runs(slots):
        count = last - first + 1
        odds = f"-m statistic --mode random --probability {count / left:.10f} "
        span = f"{first}-{last}" if count > 1 else f"{first}"
        comment = "" if (first, count) == (told, 1) else f"-m comment --comment {mark:x}:{span} "
        dice = odds if count < left else ""
        yield f"{guard}{_ANY} {comment}{dice}-j DNAT --to-destination {_destination(target)}"
        left, told = left - count, last + 1


def _runs(slots: Slots) -> Iterator[tuple[int, int, bytes]]:
    """First slot, last slot and target of each row of equal ones."""
    first = last = -1
    for slot in sorted(slots):
        if first >= 0 and slot == last + 1 and slots[slot] == slots[first]:
            last = slot
            continue
        if first >= 0:
            yield first, last, slots[first]
        first = last = slot
    if first >= 0:
        yield first, last, slots[first]


def slot_of(source: str, mark: int, layout: Layout) -> int:
    """Which slot of a client-affine pool a client gets: HMARK's arithmetic (net/netfilter/
    xt_HMARK.c), then the chains'.  Another one than nftables gives.
    """
    words = struct.unpack(f">{len(address.packed(source)) // 4}I", address.packed(source))
    key = struct.pack("<3I", 0, reduce(xor, words), 0)
    draw = 1 + (jhash.jhash(key, xtables.DRAW_SEED) * xtables.DRAWS >> 32)
    grid = _grid(mark, layout)
    return grid.slot(0, draw >> grid.low)


def draws(mark: int, layout: Layout) -> Counter[int]:
    """How many of the draws by client address lead to each slot: not quite equally many."""
    grid = _grid(mark, layout)
    return Counter(grid.slot(0, draw >> grid.low) for draw in range(1, xtables.DRAWS + 1))


class _Grid(NamedTuple):
    """How the ten bits that were drawn by client address lead to a slot: by a bucket and a cell of
    it.  256 cells for 251 slots, 1024 for 1021: within 2 % of even.  `shift` is where they are.
    """

    size: int
    bits: int
    low: int
    shift: int

    @property
    def side(self) -> int:
        """How many buckets there are, and cells in each."""
        return 1 << self.bits

    def slot(self, bucket: int, cell: int) -> int:
        """The slot that a cell stands for."""
        return ((bucket << self.bits) + cell) * self.size >> 2 * self.bits

    def bucket_match(self, bucket: int) -> str:
        """Matches what was drawn for a bucket."""
        shift = self.shift + self.low + self.bits
        return f"-m connmark --mark 0x{bucket << shift:x}/0x{self.side - 1 << shift:x} "

    def cell_match(self, cell: int) -> str:
        """Matches what was drawn for a cell of any bucket."""
        shift = self.shift + self.low
        return f"-m connmark --mark 0x{cell << shift:x}/0x{self.side - 1 << shift:x} "

    def cell_of(self, mark: int) -> int:
        """The cell that such a match is for."""
        return mark >> self.shift + self.low


def _grid(mark: int, layout: Layout) -> _Grid:
    size = layout.slots_of(mark)
    bits, low = (4, 2) if size <= 16 * 16 else (5, 0)
    return _Grid(size, bits, low, layout.shift)


def _buckets(mark: int, slots: Slots, layout: Layout) -> Chains:
    """The chains of the buckets.  In each, the commonest target comes last and needs no match."""
    grid = _grid(mark, layout)
    found: Chains = {}
    for bucket in range(grid.side):
        cells = {cell: slots.get(grid.slot(bucket, cell)) for cell in range(grid.side)}
        there = {cell: target for cell, target in cells.items() if target is not None}
        whole = len(there) == len(cells)
        usual = Counter(there.values()).most_common(1)[0][0] if whole else None
        rules = [
            f"{_ANY} {grid.cell_match(cell)}-j DNAT --to-destination {_destination(target)}"
            for cell, target in there.items()
            if target != usual
        ]
        if usual is not None:
            rules.append(f"{_ANY} -j DNAT --to-destination {_destination(usual)}")
        if rules:
            found[f"MESH-H-{mark:x}-{bucket:x}"] = tuple(rules)
    return found


def _to_buckets(mark: int, buckets: Chains, layout: Layout) -> Iterator[str]:
    grid = _grid(mark, layout)
    for name in buckets:
        bucket = int(name.rpartition("-")[2], 16)
        yield f"{grid.bucket_match(bucket)}-g {name}"


@lru_cache(maxsize=4096)
def _destination(target: bytes) -> str:
    """A target as DNAT takes it."""
    host = address.unpacked(target[:-4])
    port = int.from_bytes(target[-4:-2], "big")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _target_in(rule: str) -> bytes | None:
    match = _TARGET.search(rule)
    return address.packed(match[1]) + elements.port_bytes(int(match[2])) if match else None

"""Guards: who may connect to replicas that policies select, and the elements that say so.  Pure.

A guard stands before some replicas.  Its doors are ranges of ports, each with a grant: the
prefixes that are let in there.  What has no door is closed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model import address
from mesh.model.address import FAMILIES, family_of
from mesh.rules import elements

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from mesh.model.publish import Protocol
    from mesh.rules.elements import Elements

_LAST: Final = (1 << 24) - 1
"""Numbers share 32 bits with a prefix's length."""


class Door(NamedTuple):
    """Ports behind which one grant decides."""

    protocol: Protocol
    first: int
    last: int
    grant: str


class Guard(NamedTuple):
    """What stands before some addresses of this node; `key` is stable while policies are."""

    key: str
    addresses: tuple[str, ...]
    doors: tuple[Door, ...]


class Grant(NamedTuple):
    """The prefixes from which a door is open; hosts are addresses without a length."""

    key: str
    prefixes: tuple[str, ...]
    hosts: tuple[str, ...]


class Guards(NamedTuple):
    """Everything that policies come to on one node."""

    guards: tuple[Guard, ...] = ()
    grants: tuple[Grant, ...] = ()


@dataclass(slots=True)
class Numbers:
    """The numbers of guards and grants on this node, by key.  A freed one rests until all others
    were used: a packet on its way may have looked it up.
    """

    _of: dict[str, int] = field(default_factory=dict)
    _taken: set[int] = field(default_factory=set)
    _next: int = 1

    def of(self, key: str) -> int:
        """A number, given on first use."""
        known = self._of.get(key)
        if known is None:
            while self._next in self._taken:
                self._next = self._next % _LAST + 1
            known = self._of[key] = self._next
            self._taken.add(known)
            self._next = known % _LAST + 1
        return known

    def adopt(self, key: str, number: int) -> None:
        """Keep a number that was found in the kernel, unless it or the key has another meaning."""
        if 0 < number <= _LAST and number not in self._taken and key not in self._of:
            self._of[key] = number
            self._taken.add(number)
            self._next = max(self._next, number % _LAST + 1)

    def keep(self, keys: Collection[str]) -> None:
        """Free the numbers of all others."""
        for key in self._of.keys() - set(keys):
            self._taken.discard(self._of.pop(key))


def lower(found: Guards, numbers: Numbers) -> Elements:
    """All elements of the guards and grants; numbers of others are freed."""
    numbers.keep({*(each.key for each in found.guards), *(each.key for each in found.grants)})
    made: Elements = {}
    for guard in found.guards:
        number = numbers.of(guard.key)
        data = elements.mark_bytes(number << elements.ID_SHIFT)
        for host in guard.addresses:
            made[f"guarded{family_of(host).suffix}", address.packed(host)] = data
        for door in guard.doors:
            grant = elements.mark_bytes(numbers.of(door.grant) << elements.ID_SHIFT)
            for port, bits in blocks(door.first, door.last):
                made[elements.door_key(number, door.protocol, port, bits)] = grant
    for allowed in found.grants:
        _lower_grant(made, allowed, numbers.of(allowed.key))
    return made


def _lower_grant(made: Elements, grant: Grant, number: int) -> None:
    names = [(f"grants{f.suffix}", elements.grant_head(number, f.bits)) for f in FAMILIES]
    for host in grant.hosts:  # there may be as many as tasks in the cluster
        name, head = names[":" in host]
        made[name, head + address.packed(host)] = b""
    for prefix in grant.prefixes:
        for part in address.cut(prefix, elements.PREFIX_LENGTHS[family_of(prefix)]):
            host, _, length = part.partition("/")
            made[elements.grant_key(number, host, int(length))] = b""


def adopt(found: Guards, actual: Elements, numbers: Numbers) -> None:
    """Give guards and grants the numbers that they have in the kernel already."""
    for guard in found.guards:
        for host in guard.addresses:
            data = actual.get((f"guarded{family_of(host).suffix}", address.packed(host)))
            if data is not None:
                numbers.adopt(guard.key, elements.mark_of(data) >> elements.ID_SHIFT)
                break
        number = numbers.of(guard.key)
        for door in guard.doors:
            for port, bits in blocks(door.first, door.last):
                data = actual.get(elements.door_key(number, door.protocol, port, bits))
                if data is not None:
                    numbers.adopt(door.grant, elements.mark_of(data) >> elements.ID_SHIFT)
                    break


def blocks(first: int, last: int) -> Iterator[tuple[int, int]]:
    """The fewest blocks that make up a range: where each begins, and the bits it has in common."""
    while first <= last:
        bits = next(
            bits
            for bits in elements.PORT_BITS
            if first % (1 << 16 - bits) == 0 and first + (1 << 16 - bits) - 1 <= last
        )
        yield first, bits
        first += 1 << 16 - bits

"""What went through each published port: connections and bytes, added up from conntrack's own
counts.  Pure, mutable.

A flow is in the kernel's table or it has ended, and the kernel tells both: so what went through a
port is what ended plus what is there.  Flows that were there before the counting began have no part
in it but for the bytes that they gain.  What the kernel could not tell is missing; nothing ever
counts backwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from mesh.rules.marks import Layout


class Entrance(NamedTuple):
    """Where flows came in: a frontend as conntrack entries show it."""

    destination: bytes
    """An address in network byte order."""
    protocol: int
    port: int
    mark: int


class Volume(NamedTuple):
    """How many connections, and bytes of IP packets from the client and to it."""

    connections: int = 0
    sent: int = 0
    received: int = 0

    def plus(self, other: Volume) -> Volume:
        """Both together."""
        return Volume(*map(sum, zip(self, other, strict=True)))

    def minus(self, other: Volume) -> Volume:
        """What is more than in `other`; less is nothing."""
        return Volume(*(max(0, mine - theirs) for mine, theirs in zip(self, other, strict=True)))

    def most(self, other: Volume) -> Volume:
        """Of each the larger."""
        return Volume(*map(max, self, other))


NOTHING = Volume()


class Elder(NamedTuple):
    """A flow from before the counting began, with all it has carried."""

    entrance: Entrance
    id: int
    sent: int
    received: int


class Counted(NamedTuple):
    """What was read of flows: sums by entrance, and flows from before one by one."""

    sums: list[tuple[Entrance, Volume]]
    elders: list[Elder]


class Port(NamedTuple):
    """A published port as people know it.  `mode` is ingress, host or vip."""

    service: str
    mode: str
    protocol: str
    port: int


class Account:
    """The counts of one node.  `name` gives the port that an entrance with a pool's key is."""

    def __init__(
        self,
        layout: Layout,
        pool: Callable[[int], str | None],
        name: Callable[[str, Entrance], Port],
    ) -> None:
        self._layout = layout
        self._pool = pool
        self._name = name
        self._ended: dict[Port, Volume] = {}
        self._pools: dict[int, str] = {}
        self.elders: dict[int, tuple[int, int]] = {}
        """What flows from before had carried when last seen, by their number in conntrack."""
        self._missed: Collection[int] = ()
        self.totals: dict[Port, Volume] = {}

    def begin(self, flows: Iterable[tuple[int, int, int]]) -> None:
        """Count from here on: these flows, by number, had carried so much."""
        self.elders = {id: (sent, received) for id, sent, received in flows}

    def ended(self, counted: Counted) -> None:
        """Flows have left the table."""
        for entrance, volume in counted.sums:
            self._add(entrance, volume)
        for elder in counted.elders:
            self._grown(elder)
            self.elders.pop(elder.id, None)

    def there(self, counted: Counted, *, some_lost: bool) -> None:
        """These flows are in the table, after `ended` was told of those that are not.

        `some_lost`: of some nothing was told.  Without them a port may seem to have had less than
        it was known to have had; what comes now is more than that.
        """
        for elder in counted.elders:
            self._grown(elder)
        seen = {each.id: (each.sent, each.received) for each in counted.elders}
        gone = {id: each for id, each in self.elders.items() if id not in seen}
        self.elders = seen | {id: each for id, each in gone.items() if id not in self._missed}
        self._missed = gone.keys()  # one that has just ended is yet to be told of
        there: dict[Port, Volume] = {}
        for entrance, volume in counted.sums:
            port = self._port(entrance)
            if port is not None:
                there[port] = there.get(port, NOTHING).plus(volume)
        for port in self._ended.keys() | there.keys() | self.totals.keys():
            told = self.totals.get(port, NOTHING)
            now = self._ended.get(port, NOTHING).plus(there.get(port, NOTHING))
            if some_lost:
                missing = told.minus(now)
                self._ended[port] = self._ended.get(port, NOTHING).plus(missing)
                now = now.plus(missing)
            self.totals[port] = now.most(told)

    def forget(self, published: Collection[Port], counted: Counted) -> None:
        """Drop ports that are published no more and whose last flow has ended, and learn anew what
        numbers stand for that were given to another pool.
        """
        entrances = {entrance for entrance, _ in counted.sums}
        entrances |= {elder.entrance for elder in counted.elders}
        alive = {self._port(entrance) for entrance in entrances}
        for port in [p for p in self.totals if p not in published and p not in alive]:
            del self.totals[port]
            self._ended.pop(port, None)
        numbers = {self._layout.id_of(entrance.mark) for entrance in entrances}
        self._pools = {n: key for n, key in self._pools.items() if n in numbers}

    def _grown(self, elder: Elder) -> None:
        sent, received = self.elders.get(elder.id, (elder.sent, elder.received))
        more = Volume(0, max(0, elder.sent - sent), max(0, elder.received - received))
        if more != NOTHING:
            self._add(elder.entrance, more)

    def _add(self, entrance: Entrance, volume: Volume) -> None:
        port = self._port(entrance)
        if port is not None:
            self._ended[port] = self._ended.get(port, NOTHING).plus(volume)

    def _port(self, entrance: Entrance) -> Port | None:
        """A pool that is gone is remembered for as long as it has flows."""
        number = self._layout.id_of(entrance.mark)
        key = self._pool(number) or self._pools.get(number)
        if key is None:
            return None
        self._pools[number] = key
        return self._name(key, entrance)

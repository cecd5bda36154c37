"""Which number a host port gets that asks for none: one of the cluster's `hostPorts`.

Pure, mutable; this node's own, protocols apart.  A task gets all that it lacks, or nothing.  A
number is kept for as long as it is wanted; nobody else gets it until a whole round later.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict, deque
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from mesh.model import spans
from mesh.model.mapping import Cursors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from mesh.model.publish import Protocol

    IsTaken = Callable[["Want", int], bool]

_Kind = tuple[str, str, "Protocol", int]
"""Service, task, protocol, target: how records name a port."""


class Want(NamedTuple):
    """One dynamic port of a task; `nth` counts those with the same protocol and target."""

    service: str
    task: str
    protocol: Protocol
    target: int
    nth: int

    @property
    def owner(self) -> tuple[str, str]:
        """Service and task."""
        return self[:2]

    @property
    def kind(self) -> _Kind:
        """All but which of several it is."""
        return self[:4]


class Wish(NamedTuple):
    """How a number is chosen: the older task first, then in the order of its ports.

    `created` is the etcd revision at which the task was; with it, the same name later is another
    draw.
    """

    created: int
    place: int
    random: bool


class Room(NamedTuple):
    """Where numbers may be: in `span`, but for those that are `barred`."""

    span: range
    barred: Mapping[Protocol, frozenset[int]]

    def has(self, protocol: Protocol, number: int) -> bool:
        """Whether a number may be given out at all."""
        return number in self.span and number not in self.barred[protocol]


_Lack = list[tuple[Want, Wish]]
"""What one task lacks, in order."""


class _Search(NamedTuple):
    """Where numbers are looked for; `left` says of protocols that ran out how many there are."""

    room: Room
    is_taken: IsTaken
    left: dict[Protocol, int]


class Numbers:
    """Who wants a dynamic host port on this node, and who has which."""

    def __init__(self) -> None:
        self._room: Room | None = None
        self._wishes: dict[str, Mapping[Want, Wish]] = {}
        self._held: dict[Want, int] = {}
        self._owners: dict[tuple[Protocol, int], Want] = {}
        self._lacking: dict[Want, Wish] = {}
        self._short: dict[tuple[str, str], Protocol] = {}
        self._recalled: defaultdict[_Kind, deque[int]] = defaultdict(deque)
        self._cursors: dict[Protocol, int] = {}

    @property
    def cursors(self) -> Cursors:
        """Where the searches go on."""
        return Cursors(**{protocol.value: at for protocol, at in self._cursors.items()})

    def resume(self, protocol: Protocol, cursor: int) -> None:
        """Go on there."""
        self._cursors[protocol] = cursor

    def recall(self, kind: _Kind, numbers: Iterable[int]) -> None:
        """A record of before says which numbers there were, in order; used in the next `settle`."""
        self._recalled[kind].extend(numbers)

    def number(self, want: Want) -> int | None:
        """The number somebody has."""
        return self._held.get(want)

    def short(self) -> Mapping[tuple[str, str], Protocol]:
        """The services and tasks that lack numbers, and of which protocol there are too few."""
        return self._short

    def confine(self, room: Room) -> frozenset[str]:
        """Only these numbers from now on; the services that lose one."""
        self._room = room
        return self._drop(
            want for want, number in self._held.items() if not room.has(want.protocol, number)
        )

    def displace(
        self, protocol: Protocol, number: int, service: str | None = None
    ) -> frozenset[str]:
        """Somebody who matters more has the number, or the `service` itself now names it; the
        service that loses it.
        """
        owner = self._owners.get((protocol, number))
        if owner is None or service not in (None, owner.service):
            return frozenset()
        return self._drop((owner,))

    def want(self, service: str, wishes: Mapping[Want, Wish]) -> None:
        """Replace what a service wants; what it wants no more is free."""
        for want in self._wishes.pop(service, {}):
            if want not in wishes:
                self._lacking.pop(want, None)
                self._short.pop(want.owner, None)
                self._release(want)
        if wishes:
            self._wishes[service] = wishes
        for want, wish in wishes.items():
            if want not in self._held:
                self._lacking[want] = wish

    def settle(self, is_taken: IsTaken, is_lost: IsTaken) -> frozenset[str]:
        """Give a number to everybody who lacks one; the services that got or lost any.

        First those who had one, unless it `is_lost` to them; then tasks get what nobody has, and
        that is not otherwise taken: all that they lack, or nothing.
        """
        self._short.clear()
        if self._room is None or not (self._lacking or self._recalled):
            return frozenset()
        ordered = sorted(self._lacking.items(), key=_order)
        changed = {want.service for want, _ in ordered if self._adopt(want, is_lost)}
        self._recalled.clear()
        lacking = [item for item in ordered if item[0] not in self._held]
        search = _Search(self._room, is_taken, {})
        stuck: list[_Lack] = []
        for name, of_task in groupby(lacking, key=lambda item: item[0].owner):
            lack = list(of_task)
            if self._complete(search, lack):
                changed.add(name[0])
            else:
                stuck.append(lack)
        return frozenset(changed | self._make_room(search, stuck))

    def _make_room(self, search: _Search, stuck: list[_Lack]) -> set[str]:
        """Let tasks that lack some have what younger ones keep for themselves without use."""
        changed: set[str] = set()
        for at, lack in enumerate(stuck):
            for younger in reversed(stuck[at + 1 :]):
                if self._give_back(search, younger):
                    changed.add(younger[0][0].service)
                    if self._complete(search, lack):
                        changed.add(lack[0][0].service)
                        break
        return changed

    def _complete(self, search: _Search, lack: _Lack) -> bool:
        """Give a task all that it lacks, or nothing; whether it lacks nothing now."""
        owner, needed = lack[0][0].owner, Counter(want.protocol for want, _ in lack)
        for protocol, count in needed.items():
            if count > search.left.get(protocol, count):
                self._short[owner] = protocol
                return False
        cursors, given = dict(self._cursors), 0
        for want, wish in lack:
            number = self._fresh(search, want, wish)
            if number is None:
                break
            self._hold(want, number)
            given += 1
        if given == len(lack):
            for protocol in needed.keys() & search.left.keys():
                search.left[protocol] -= needed[protocol]
            self._short.pop(owner, None)
            return True
        protocol = lack[given][0].protocol
        search.left[protocol] = sum(want.protocol is protocol for want, _ in lack[:given])
        self._drop([want for want, _ in lack[:given]])
        self._cursors = cursors
        self._short[owner] = protocol
        return False

    def _give_back(self, search: _Search, lack: _Lack) -> bool:
        """Free what a task has that lacks more; whether that was anything."""
        owner = lack[0][0].owner
        kept = [w for w in self._wishes[owner[0]] if w.owner == owner and w in self._held]
        self._drop(kept)
        for want in kept:
            if want.protocol in search.left:
                search.left[want.protocol] += 1
        lack.extend((want, self._wishes[owner[0]][want]) for want in kept)
        lack.sort(key=_order)
        return bool(kept)

    def _adopt(self, want: Want, is_lost: IsTaken) -> bool:
        known = self._recalled.get(want.kind)
        while known:
            number = known.popleft()
            if self._is_open(want, number, is_lost):
                self._hold(want, number)
                return True
        return False

    def _is_open(self, want: Want, number: int, is_taken: IsTaken) -> bool:
        if self._room is None or not self._room.has(want.protocol, number):
            return False
        return (want.protocol, number) not in self._owners and not is_taken(want, number)

    def _fresh(self, search: _Search, want: Want, wish: Wish) -> int | None:
        protocol, room, is_taken = want.protocol, search.room, search.is_taken
        cursor = self._cursors.get(protocol, 0)
        if wish.random:
            cursor = room.span.start + _draw(want, wish) % len(room.span)
        number = spans.next_fit(lambda n: not self._is_open(want, n, is_taken), room.span, cursor)
        if number is not None and not wish.random:
            self._cursors[protocol] = number + 1
        return number

    def _hold(self, want: Want, number: int) -> None:
        self._held[want] = number
        self._owners[want.protocol, number] = want
        del self._lacking[want]

    def _release(self, want: Want) -> None:
        number = self._held.pop(want, None)
        if number is not None:
            del self._owners[want.protocol, number]

    def _drop(self, losers: Iterable[Want]) -> frozenset[str]:
        """Take numbers away from those that go on wanting one."""
        gone = list(losers)
        for want in gone:
            self._release(want)
            self._lacking[want] = self._wishes[want.service][want]
        return frozenset(want.service for want in gone)


def _order(item: tuple[Want, Wish]) -> tuple[int, str, str, int]:
    want, wish = item
    return wish.created, want.service, want.task, wish.place


def _draw(want: Want, wish: Wish) -> int:
    """What dice would say, and always the same: no two nodes or starts have to agree on a seed."""
    service, task, protocol, target, nth = want
    text = f"{wish.created}/{service}/{task}/{protocol.value}/{target}/{nth}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

"""What is published on a host without etcd, and by which task; what a task that asks may have.

Pure, mutable: `decide` changes nothing, `put` and `drop` are what the kernel has taken.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
from msgspec import UNSET

from mesh.errors import BadUsage, Conflict
from mesh.hostports.allocator import Numbers, Room, Want, Wish
from mesh.model import address, protected
from mesh.model.address import family_of
from mesh.model.mapping import Cursors, PortMapping
from mesh.model.names import check_id
from mesh.model.publish import Protocol, PublishedPort, PublishMode, bracketed

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Iterable, Iterator

DYNAMIC: Final = (32000, 32999)
"""Where numbers come from that nobody named: a cluster's `hostPorts` by default."""

Listener = Callable[[PublishedPort], str | None]
"""Who of this host listens where a port would answer, as people say it; None: nobody."""


class Publication(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One task's ports, every one with its number, and where its container is: an address of one
    family or of each.
    """

    task: str
    addresses: tuple[str, ...]
    ports: tuple[PublishedPort, ...]

    def __post_init__(self) -> None:
        check_id(self.task, "task")
        for each in self.addresses:
            address.check_host(each)
        if address.one_per_family(self.addresses) != self.addresses or not self.addresses:
            shown = ", ".join(self.addresses) or "none"
            raise ValueError(f"addresses {shown}: give one, or an IPv4 and an IPv6 address")

    @property
    def mappings(self) -> tuple[PortMapping, ...]:
        """The ports as Galaxy and the mesh's own records have them."""
        return tuple(
            PortMapping(
                host_port=port.published or 0,
                container_port=port.target,
                protocol=port.protocol,
                host_ip=port.host_ip or "",
                pod_name=self.task,
                pod_ip=self._reached_through(port),
            )
            for port in self.ports
        )

    def _reached_through(self, port: PublishedPort) -> str:
        if port.host_ip is None:
            return self.addresses[0]
        return address.of_family(self.addresses, family_of(port.host_ip))[0]


class Request(NamedTuple):
    """What a task asks for; `draw` is another number each time, for ports at random."""

    task: str
    addresses: tuple[str, ...]
    ports: tuple[PublishedPort, ...]
    draw: int


class Settings(NamedTuple):
    """What a host's ports are given by: the first and last dynamic one, and those that are given
    only by force ("22/tcp", "6000-6063").
    """

    dynamic: tuple[int, int] = DYNAMIC
    protected: tuple[str, ...] = protected.DEFAULT

    def check(self) -> None:
        """Raise BadUsage for what makes no sense."""
        low, high = self.dynamic
        if not 0 < low <= high < 65536:
            raise BadUsage(f"dynamic ports {low}-{high}: the first and last of 1-65535")
        for entry in self.protected:
            try:
                protected.parse_entry(entry)
            except ValueError as error:
                raise BadUsage(str(error)) from None


class _Holder(NamedTuple):
    task: str
    host_ip: str | None


class Publications:
    """Every task's ports on one host."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        barred = {p: protected.numbers(settings.protected, p) for p in Protocol}
        self._room = Room(range(settings.dynamic[0], settings.dynamic[1] + 1), barred)
        self._known: dict[str, Publication] = {}
        self._holders: defaultdict[tuple[Protocol, int], list[_Holder]] = defaultdict(list)

    def __iter__(self) -> Iterator[Publication]:
        return iter(self._known.values())

    def names(self) -> Collection[str]:
        """The tasks that have ports."""
        return self._known.keys()

    def get(self, task: str) -> Publication | None:
        """What a task has."""
        return self._known.get(task)

    def put(self, publication: Publication) -> None:
        """A task has these ports, and no others."""
        self.drop(publication.task)
        self._known[publication.task] = publication
        for port in publication.ports:
            self._holders[_number(port)].append(_Holder(publication.task, port.host_ip))

    def drop(self, task: str) -> None:
        """A task has no ports."""
        before = self._known.pop(task, None)
        for port in before.ports if before is not None else ():
            holders = self._holders[_number(port)]
            holders.remove(_Holder(task, port.host_ip))
            if not holders:
                del self._holders[_number(port)]

    def decide(
        self, request: Request, cursors: Cursors, listener: Listener
    ) -> tuple[Publication, Cursors]:
        """What a task gets, and where the next search for a number begins.

        A number that it has already it keeps.  Raises BadUsage, and Conflict naming who has a port.
        """
        _check(request)
        before = self._known.get(request.task)
        had = {_place(port) for port in before.ports} if before is not None else set()
        for port in request.ports:
            if port.published is not None and _place(port) not in had:
                self._check_free(request.task, port, listener)
        ports, cursors = self._numbered(request, cursors, listener)
        try:
            found = Publication(task=request.task, addresses=request.addresses, ports=ports)
        except ValueError as error:
            raise BadUsage(str(error)) from None
        return found, cursors

    def _check_free(self, task: str, port: PublishedPort, listener: Listener) -> None:
        protocol, number = _number(port)
        shown = f"port {_shown(port)}"
        entry = protected.listed(self._settings.protected, protocol, number)
        if entry is not None and not port.force:
            raise Conflict(f"{shown} is protected ({entry}): publish another port, or force it")
        for holder in self._holders.get((protocol, number), ()):
            both = (holder.host_ip, port.host_ip)
            if holder.task != task and (None in both or both[0] == both[1]):
                raise Conflict(
                    f"{shown} is published by task {holder.task}: unpublish that one, or choose "
                    "another port"
                )
        who = listener(port) if not port.force else None
        if who is not None:
            raise Conflict(f"{shown} is used by {who}: stop it, choose another port, or force it")

    def _numbered(
        self, request: Request, cursors: Cursors, listener: Listener
    ) -> tuple[tuple[PublishedPort, ...], Cursors]:
        """The ports of a request with a number each."""
        wants = dict(_wants(request))
        if not wants:
            return request.ports, cursors
        named = {_number(port) for port in request.ports if port.published is not None}

        def is_held(want: Want, number: int) -> bool:
            holders = self._holders.get((want.protocol, number), ())
            return any(holder.task != want.task for holder in holders)

        def is_taken(want: Want, number: int) -> bool:
            if is_held(want, number) or (want.protocol, number) in named:
                return True
            return listener(_with_number(request.ports[wants[want]], number)) is not None

        numbers = self._numbers(request.task, cursors, named)
        wishes = {
            want: Wish(request.draw, place, bool(request.ports[place].random))
            for want, place in wants.items()
        }
        numbers.want(request.task, wishes)
        numbers.settle(is_taken, is_held)
        ports = list(request.ports)
        for want, place in wants.items():
            number = numbers.number(want)
            if number is None:
                low, high = self._settings.dynamic
                raise Conflict(
                    f"all dynamic {want.protocol.value} ports ({low}-{high}) are taken: unpublish "
                    "some, name a port, or widen the range"
                )
            ports[place] = _with_number(ports[place], number)
        return tuple(ports), numbers.cursors

    def _numbers(
        self, task: str, cursors: Cursors, named: Container[tuple[Protocol, int]]
    ) -> Numbers:
        """The dynamic ports as a task finds them: those it has, and does not name, are its own."""
        numbers = Numbers()
        numbers.confine(self._room)
        for protocol in Protocol:
            numbers.resume(protocol, cursors.of(protocol))
        before = self._known.get(task)
        for port in before.ports if before is not None else ():
            protocol, number = _number(port)
            if (protocol, number) not in named:
                numbers.recall((task, task, protocol, port.target), (number,))
        return numbers


def _check(request: Request) -> None:
    """Raise BadUsage for what nobody could be given."""
    seen: Counter[tuple[Protocol, int, str | None]] = Counter()
    families = {family_of(each) for each in request.addresses}
    for port in request.ports:
        if port.mode is not PublishMode.HOST:
            raise BadUsage(
                f"{port}: mode ingress needs a cluster: `mesh service create` publishes that way"
            )
        if port.host_ip is not None:
            if any(address.contains(prefix, port.host_ip) for prefix in _LOOPBACK):
                raise BadUsage(f"{port}: published ports do not answer on {port.host_ip}")
            if family_of(port.host_ip) not in families:
                raise BadUsage(f"{port}: the container has no address of that family")
        if port.published is not None:
            seen[(*_number(port), port.host_ip)] += 1
            if seen[(*_number(port), port.host_ip)] > 1:
                raise BadUsage(f"port {_shown(port)} is asked for twice")


_LOOPBACK: Final = ("127.0.0.0/8", "::1/128")


def _wants(request: Request) -> Iterator[tuple[Want, int]]:
    """The dynamic ports, by the names under which they get numbers, and their places."""
    seen: Counter[tuple[Protocol, int]] = Counter()
    for place, port in enumerate(request.ports):
        if port.published is None:
            kind = (port.protocol, port.target)
            yield Want(request.task, request.task, *kind, seen[kind]), place
            seen[kind] += 1


def _number(port: PublishedPort) -> tuple[Protocol, int]:
    assert port.published is not None, "a port without a number is nobody's"
    return port.protocol, port.published


def _with_number(port: PublishedPort, number: int) -> PublishedPort:
    return msgspec.structs.replace(port, published=number, random=UNSET)


def _place(port: PublishedPort) -> tuple[Protocol, int | None, str | None]:
    return port.protocol, port.published, port.host_ip


def _shown(port: PublishedPort) -> str:
    at = f" on {bracketed(port.host_ip)}" if port.host_ip is not None else ""
    return f"{port.published}/{port.protocol.value}{at}"


def addresses_of(given: str | Iterable[str]) -> tuple[str, ...]:
    """A container's addresses as somebody gives them.  Raises BadUsage."""
    texts = (given,) if isinstance(given, str) else tuple(given)
    try:
        return tuple(sorted((address.parse_address(t) for t in texts), key=lambda a: ":" in a))
    except ValueError as error:
        raise BadUsage(f"container address: {error}") from None

"""The host ports of one node: what its tasks want, what each has, and why another has not.

A task has all of its ports, or none.  Pure, mutable.  `update`, `reserve` and `confine` take in
what is known; numbers for dynamic ports are given and taken back in `settle` only, so that what is
gone for a moment keeps its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from mesh.hostports.allocator import Numbers, Room, Want, Wish
from mesh.hostports.claims import Claims
from mesh.hostports.occupied import Occupied
from mesh.model import address, protected
from mesh.model.listener import Binding, refusal
from mesh.model.mapping import PortMapping
from mesh.model.publish import Protocol, PublishMode
from mesh.model.report import Problem
from mesh.model.task import TaskState
from mesh.model.view import HostClaim

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mesh.model.cluster import Cluster
    from mesh.model.listener import Listener, Port
    from mesh.model.mapping import Cursors
    from mesh.model.publish import PublishedPort
    from mesh.model.service import ServiceSpec
    from mesh.model.task import Task

T = TypeVar("T")

Record = tuple[PortMapping, ...] | None
"""What is written of a task's ports, empty without a record; None if nobody can read it."""

_YIELDING: Final = 1 << 62
"""Added to a draining task's revision: it keeps a port only while no running task wants it, so a
replacement started on the same node takes over in one change."""

_NOBODY: Final[frozenset[str]] = frozenset()

_Claimed = tuple[list[HostClaim], list[Problem], set[str]]
_NOTHING: Final[_Claimed] = [], [], set()


class _Here(NamedTuple):
    """A service's host-mode ports and its tasks on this node, with their create revisions."""

    ports: tuple[PublishedPort, ...]
    tasks: tuple[tuple[Task, int], ...]


class HostPorts:
    """Every task's host ports on this node."""

    def __init__(self, node: str, *, loopback: bool = False) -> None:
        """`loopback`: whether ports that name 127.0.0.1 or ::1 may answer there."""
        self._node = node
        self.occupied = Occupied(node)
        self._loopback = loopback
        self._cluster: Cluster | None = None
        self._services: dict[str, _Here] = {}
        self._claims = Claims()
        self._numbers = Numbers()
        self._unsettled: set[str] = set()
        self._wanted: dict[str, tuple[HostClaim, ...]] = {}
        self._barred: dict[str, tuple[Problem, ...]] = {}
        self._published: defaultdict[str, dict[str, tuple[PortMapping, ...]]] = defaultdict(dict)
        self._publishing: dict[str, tuple[str, ...]] = {}
        self._recorded: dict[str, Record] = {}
        self._changed: set[str] = set()
        self._begun = False

    # ---- what is known

    def update(
        self, service: str, spec: ServiceSpec | None, tasks: Iterable[tuple[Task, int]]
    ) -> frozenset[str]:
        """Replace what a service wants here; the services whose granted ports that changes."""
        self.occupied.insist(service, spec)
        ports = [p for p in spec.ports if p.mode is PublishMode.HOST] if spec is not None else []
        here = tuple(tasks) if ports else ()
        if here:
            self._services[service] = _Here(tuple(ports), here)
        elif self._services.pop(service, None) is None:
            return _NOBODY
        self._unsettled.add(service)
        for port in ports if here else ():  # what it names now is no dynamic one
            if port.published is not None:
                self._numbers.displace(port.protocol, port.published, service)
        return self._claim((service,))

    def reserve(self, protocol: Protocol, published: int, service: str | None) -> frozenset[str]:
        """An ingress port is allocated to `service`, or to nobody: no task gets it for itself.

        Returns the services whose granted ports changed.
        """
        self.occupied.reserve((protocol, published), service)
        changed = self._claims.reserve(protocol, published, service)
        if service is not None:
            changed |= self._claim(self._numbers.displace(protocol, published))
        for each in changed:
            self._publish(each)
        return changed

    def confine(self, cluster: Cluster) -> frozenset[str]:
        """The cluster's range and protected ports; the services whose granted ports changed."""
        self._cluster = cluster
        low, high = cluster.host_ports
        barred = {protocol: protected.barred(cluster, protocol) for protocol in Protocol}
        self._numbers.confine(Room(range(low, high + 1), barred))
        return self._claim(tuple(self._services))

    def observe(
        self, listeners: Mapping[Port, tuple[Listener, ...]], busy: frozenset[Port]
    ) -> frozenset[str]:
        """Who listens on this node, and which ports cannot be had for another reason; the services
        whose ports that changes.
        """
        ports = self.occupied.observe(listeners, busy)
        services = {s for p in ports if (s := self.occupied.ingress_service(p)) is not None}
        if not ports:
            return _NOBODY
        losing = set(_services_on(self._services, ports))
        for protocol, number in ports:
            taken = self.occupied.is_taken(protocol, number)
            if taken and not self.occupied.is_in_force(protocol, number):
                losing |= self._numbers.displace(protocol, number)
        return self._claim(losing) | services

    def resume(self, cursors: Cursors) -> None:
        """Where the agent before this one would have gone on."""
        for protocol in Protocol:
            self._numbers.resume(protocol, cursors.of(protocol))

    def recorded(self, task: str, record: Record) -> None:
        """What the record of a task, or of tasks of one name, says.

        Before the first `settle` it tells what the agent before this one had published.
        """
        self._recorded[task] = record
        self._changed.add(task)
        for one in record or () if not self._begun else ():
            kind = (one.service, one.pod_name, one.protocol, one.container_port)
            self._numbers.recall(kind, (one.host_port,))

    def settle(self) -> frozenset[str]:
        """Give and take back dynamic ports; the services whose granted ports changed.

        Only while what is known is the whole truth.
        """
        self._begun = True
        for service in self._unsettled:
            here = self._services.get(service)
            self._numbers.want(service, _wishes(service, here) if here is not None else {})
        self._unsettled.clear()
        return self._claim(self._numbers.settle(self._is_taken, self._is_lost))

    # ---- what there is

    @property
    def cursors(self) -> Cursors:
        """Where the next searches begin."""
        return self._numbers.cursors

    def granted(self, service: str) -> frozenset[HostClaim]:
        """The claims of a service that hold their port."""
        return self._claims.granted(service)

    def published(self, task: str) -> tuple[PortMapping, ...]:
        """What is published of the task, or tasks, of a name."""
        services = self._published.get(task, {})
        return tuple(chain.from_iterable(services[name] for name in sorted(services)))

    def all_published(self) -> dict[str, tuple[PortMapping, ...]]:
        """The same of every name that has any."""
        return {task: self.published(task) for task in self._published if self.published(task)}

    def unwritten(self) -> dict[str, tuple[PortMapping, ...]]:
        """The tasks whose record is not what is published of them, and what it should be."""
        found = {task: self.published(task) for task in sorted(self._changed)}
        found = {task: now for task, now in found.items() if now != self._recorded.get(task, ())}
        self._changed = set(found)
        return found

    def problems(self) -> Iterator[Problem]:
        """Ports that somebody wants and does not get here, and why."""
        for problems in self._barred.values():
            yield from problems
        yield from self.occupied.problems()
        for pairs in self._claims.all_refused():
            claim, owner = pairs[0]
            holder = f"task {owner.task} of service {owner.service}"
            if not owner.task:
                holder = f"service {owner.service} in ingress mode"
            about = f"port {claim.published}/{claim.protocol.value} on node {self._node}"
            more = f" ({len(pairs) - 1} more not free)" if len(pairs) > 1 else ""
            message = f"{about} belongs to {holder}{more}: choose another port or node"
            yield _problem(claim.service, claim.task, message, self._services[claim.service])
        if self._cluster is None:
            return
        low, high = self._cluster.host_ports
        for (service, task), protocol in self._numbers.short().items():
            if (here := self._services.get(service)) is not None:
                message = (
                    f"all dynamic {protocol.value} ports of node {self._node} ({low}-{high}) are "
                    "taken: name a published port, or widen hostPorts"
                )
                yield _problem(service, task, message, here)

    # ---- claims

    def _claim(self, services: Iterable[str]) -> frozenset[str]:
        """Claim anew what services want; the services whose granted ports changed."""
        changed: set[str] = set()
        for service in services:
            here = self._services.get(service)
            claims, barred, waiting = _NOTHING
            if here is not None:
                claims, barred, waiting = self._claimed(service, here)
            changed |= self._claims.update(service, claims, waiting)
            _keep(self._wanted, service, tuple(claims))
            _keep(self._barred, service, tuple(barred))
            self._publish(service)
        for service in changed.difference(services):
            self._publish(service)
        return frozenset(changed)

    def _claimed(self, service: str, here: _Here) -> _Claimed:
        """What to claim, what the cluster's settings forbid to, and which tasks wait for that or
        for a number.
        """
        claims: list[HostClaim] = []
        barred: list[Problem] = []
        waiting: set[str] = set()
        for task, created in here.tasks:
            age = created if task.state is TaskState.RUNNING else created + _YIELDING
            for want, port in _wants(service, task, here.ports):
                protocol, published = port.protocol, port.published
                if published is None:
                    published = self._numbers.number(want)
                reason = self._reason(service, port)
                if reason is not None:
                    barred.append(_problem(service, task.id, reason, here))
                if reason is not None or published is None:
                    waiting.add(task.id)
                else:
                    first = 0 if port.published is None else age
                    place = (published, port.target, port.host_ip)
                    claims.append(HostClaim(service, task.id, protocol, *place, first))
        return claims, barred, waiting

    def _reason(self, service: str, port: PublishedPort) -> str | None:
        """Why the port that is asked for is not given."""
        number = "*" if port.published is None else port.published
        about = f"port {number}/{port.protocol.value} on node {self._node}"
        if port.host_ip is not None and not self._loopback and address.is_loopback(port.host_ip):
            return (
                f"{about} is asked for on {port.host_ip}, where this node publishes nothing: set "
                "loopback_ports = true in its configuration and start its agent again, or choose "
                "another host address"
            )
        if self._cluster is None or port.published is None:
            return None
        place = (port.protocol, port.published)
        guard = protected.protection(self._cluster, *place)
        if guard is not None and not (guard.forcible and port.force):
            return f"{about} {guard.reason}"
        who = self.occupied.in_the_way(service, Binding(*place, port.host_ip))
        return refusal(place, self._node, who) if who is not None else None

    def _is_taken(self, want: Want, number: int) -> bool:
        """Whether a number is not free to be given out."""
        reserved = self._claims.is_reserved(want.protocol, number)
        reserved = reserved or self.occupied.is_taken(want.protocol, number)
        return reserved or bool(self._claims.claimants(want.protocol, number))

    def _is_lost(self, want: Want, number: int) -> bool:
        """Whether a number that a task had is not to be had again.

        Those who came to want it meanwhile yield; but what the task itself names is no dynamic one.
        """
        if self._claims.is_reserved(want.protocol, number):
            return True
        if self.occupied.is_taken(want.protocol, number):
            return not self.occupied.is_in_force(want.protocol, number)
        return (want.service, want.task) in self._claims.claimants(want.protocol, number)

    # ---- records

    def _publish(self, service: str) -> None:
        """Note what is published of a service, for those who write it down."""
        here, granted = self._services.get(service), self._claims.granted(service)
        tasks = {task.id: task for task, _ in here.tasks} if here is not None else {}
        found: defaultdict[str, list[PortMapping]] = defaultdict(list)
        for claim in self._wanted.get(service, ()):
            if claim in granted:
                found[claim.task].append(_mapping(claim, tasks[claim.task]))
        for name in {*self._publishing.get(service, ()), *found}:
            mappings, of_name = tuple(found.get(name, ())), self._published[name]
            if of_name.get(service, ()) != mappings:
                self._changed.add(name)
            _keep(of_name, service, mappings)
            if not of_name:
                del self._published[name]
        _keep(self._publishing, service, tuple(found))


def _keep(known: dict[str, tuple[T, ...]], service: str, things: tuple[T, ...]) -> None:
    """Set what a service has; nothing is not kept."""
    known.pop(service, None)
    if things:
        known[service] = things


def _services_on(services: Mapping[str, _Here], ports: frozenset[Port]) -> Iterator[str]:
    """The services that ask for one of these ports."""
    for service, here in services.items():
        if any((p.protocol, p.published) in ports for p in here.ports):
            yield service


def _problem(service: str, task: str, message: str, here: _Here) -> Problem:
    """What keeps a task from its ports: from all of them."""
    if len(here.ports) > 1:
        message += f"; until then none of the task's {len(here.ports)} ports is published"
    return Problem(about=f"task {task} of service {service}", message=message)


def _wants(
    service: str, task: Task, ports: Iterable[PublishedPort]
) -> Iterator[tuple[Want, PublishedPort]]:
    """A task's ports by the names under which they get numbers."""
    seen: Counter[tuple[Protocol, int]] = Counter()
    for port in ports:
        kind = (port.protocol, port.target)
        yield Want(service, task.id, *kind, seen[kind]), port
        if port.published is None:
            seen[kind] += 1


def _wishes(service: str, here: _Here) -> dict[Want, Wish]:
    return {
        want: Wish(created, place, bool(port.random))
        for task, created in here.tasks
        for place, (want, port) in enumerate(_wants(service, task, here.ports))
        if port.published is None
    }


def _mapping(claim: HostClaim, task: Task) -> PortMapping:
    return PortMapping(
        host_port=claim.published,
        container_port=claim.target,
        protocol=claim.protocol,
        host_ip=claim.address or "",
        pod_name=task.id,
        pod_ip=task.addresses[0],
        service=claim.service,
    )

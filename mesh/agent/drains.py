"""Which tasks drain, and when what is left of their connections is ended.

Mutable: `Drains` is a part of mesh.agent.state.  Pure: the time is an argument.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mesh.model.address import packed
from mesh.model.maintenance import Duty
from mesh.model.task import TaskState
from mesh.rules.ended import Leaving

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mesh.model.maintenance import Maintenance
    from mesh.model.service import ServiceSpec
    from mesh.model.task import Task
    from mesh.rules.ended import Name
    from mesh.rules.stale import Endpoint

TAIL: Final = 10.0
"""Seconds for which connections are looked for after a task's deadline: a node that heard later of
its draining lets them in for as long."""


class Drains:
    """The tasks and nodes that were told to drain, seen from the node `own`."""

    def __init__(self, own: str) -> None:
        self._own = own
        self._tasks: set[Name] = set()
        self.nodes: frozenset[str] = frozenset()
        """Nodes whose tasks drain."""
        self.version = 0
        """Grows with all that may change what `leaving` answers."""

    def __bool__(self) -> bool:
        return bool(self._tasks or self.nodes)

    def task(self, was: Task | None, now: Task | None) -> None:
        """A task changed; None: it was not there, or is gone."""
        drains = now is not None and now.state is TaskState.DRAINING
        if not (drains or self._tasks or self.nodes):
            return  # as nearly always, of tens of thousands
        for task in (was, now):
            if task is None:
                continue
            drains = task.state is TaskState.DRAINING
            if drains or task.node in self.nodes:
                self.version += 1
            if drains and task is now:
                self._tasks.add((task.service, task.id))
            else:
                self._tasks.discard((task.service, task.id))

    def service(self, name: str) -> None:
        """A service's spec changed."""
        if self.nodes or any(service == name for service, _ in self._tasks):
            self.version += 1

    def node(self, name: str, wanted: Maintenance | None) -> bool:
        """What operators want of a node; whether that is news."""
        before = self.nodes
        drains = wanted is not None and wanted.state is Duty.DRAINING
        self.nodes = before | {name} if drains else before - {name}
        self.version += self.nodes != before
        return self.nodes != before

    def leaving(
        self, tasks: Iterable[Task], services: Mapping[str, ServiceSpec]
    ) -> dict[Name, Leaving]:
        """Those of all `tasks` that drain, and have a service."""
        leaving: list[Task] = []
        staying: set[Endpoint] = set()
        for task in tasks:
            if task.node in self.nodes or (task.service, task.id) in self._tasks:
                leaving.append(task)
            elif task.node == self._own:
                staying.update(_endpoints(task, services.get(task.service)))
        return {
            (task.service, task.id): Leaving(
                addresses=frozenset(map(packed, task.addresses)),
                drain=services[task.service].drain_seconds,
                arrivals=_endpoints(task, services[task.service]) - staying
                if task.node == self._own
                else frozenset(),
                host_ports=(task.service, task.id) in self._tasks,
            )
            for task in leaving
            if task.service in services
        }


def _endpoints(task: Task, service: ServiceSpec | None) -> frozenset[Endpoint]:
    """Where a task answers."""
    if service is None:
        return frozenset()
    hosts = tuple(map(packed, task.addresses))
    return frozenset((host, port.target) for host in hosts for port in service.ports)


class Deadlines:
    """When each draining task's time is up, counted from when this agent first saw it drain.

    An agent that starts anew counts anew: a connection may live longer for that, never shorter, and
    no node's clock has to agree with another's.
    """

    def __init__(self) -> None:
        self._since: dict[Name, float] = {}
        self._until: dict[Name, float] = {}

    def see(self, leaving: Mapping[Name, Leaving], now: float) -> None:
        """These tasks drain at the moment `now` (seconds), and no others."""
        self._since = {name: self._since.get(name, now) for name in leaving}
        self._until = {name: self._since[name] + one.drain for name, one in leaving.items()}

    def due(self, now: float) -> frozenset[Name]:
        """Those whose time is up."""
        return frozenset(name for name, until in self._until.items() if until <= now)

    def next(self, now: float) -> float | None:
        """Seconds until the next one's time is up; None if no one's is to come."""
        return min((until - now for until in self._until.values() if until > now), default=None)

    def over(self, now: float) -> bool:
        """Whether nothing is to be expected any more."""
        return all(until + TAIL <= now for until in self._until.values())

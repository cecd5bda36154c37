"""Everything under the cluster's prefix at one revision, as the verbs that show things need it.

Reads only.  What planning means by a service is agent.state's word, not repeated here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

from mesh import errors
from mesh.agent import state
from mesh.cli import output
from mesh.model import selector
from mesh.model.cluster import Cluster
from mesh.model.listener import Listening
from mesh.model.maintenance import Duty
from mesh.model.policy import labels_of
from mesh.model.report import Applied, Health, Problem, Status
from mesh.store import schema

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.cli.options import Session
    from mesh.model.cluster import NodeNetwork
    from mesh.model.mapping import PortMapping
    from mesh.model.node import Node
    from mesh.model.policy import NetworkPolicy
    from mesh.model.task import Task
    from mesh.model.view import ServiceView
    from mesh.store.protocol import KeyValue, Snapshot

T = TypeVar("T")


@dataclass(slots=True)
class World:
    """Records by name; `needed` is the last revision that agents must have applied.

    `reports` are the controller's problems with a thing, by kind ("services", "nodes") and name,
    `reported` the revisions at which it wrote them.
    """

    revision: int
    state: state.State
    needed: int = 0
    nodes: dict[str, Node] = field(default_factory=dict)
    tasks: dict[tuple[str, str], Task] = field(default_factory=dict)
    alive: set[str] = field(default_factory=set)
    draining: set[str] = field(default_factory=set)
    health: dict[tuple[str, str], tuple[Health, ...]] = field(default_factory=dict)
    published: dict[tuple[str, str], tuple[PortMapping, ...]] = field(default_factory=dict)
    applied: dict[str, Applied] = field(default_factory=dict)
    listening: dict[str, Listening] = field(default_factory=dict)
    reports: dict[tuple[str, str], tuple[Problem, ...]] = field(default_factory=dict)
    reported: dict[tuple[str, str], int] = field(default_factory=dict)
    leader: str | None = None
    problems: list[Problem] = field(default_factory=list)

    def network(self, node: str) -> NodeNetwork | None:
        """A node's addresses, once the controller gave it a number."""
        return self.state.nodes.network(node)

    def node_state(self, node: str) -> output.Styled:
        """What STATE says of a node."""
        if node not in self.alive:
            return output.Styled("down", "red")
        if node in self.draining:
            return output.Styled("draining", "yellow")
        applied = self.applied.get(node)
        if applied is not None and applied.is_degraded:
            return output.Styled("degraded", "yellow")
        return output.Styled("alive", "green")

    def is_behind(self, node: str) -> bool:
        """Whether the node's kernel lacks something that etcd already has."""
        applied = self.applied.get(node)
        return applied is None or applied.revision < self.needed

    def progress(self, node: str) -> output.Cell:
        """What APPLIED says of a node: its revision, and how much newer the newest record is."""
        applied = self.applied.get(node)
        if applied is None:
            return output.Styled("never", "yellow")
        if self.is_behind(node):
            text = f"{applied.revision} (of {self.needed})"
            return output.Styled(text, "yellow")
        return str(applied.revision)

    def tasks_on(self, node: str) -> list[Task]:
        """Every task of every service that is placed on a node, services or not."""
        return [task for task in self.tasks.values() if task.node == node]

    def service(self, name: str) -> ServiceView:
        """One service.  Raises NotFound."""
        view = self.state.service_view(name)
        if view is None:
            key = self.state.keys.service(name)
            if key in self.state.invalid:
                raise errors.InvalidRecord(key, self.state.invalid[key].message)
            raise errors.NotFound(f"no service {name!r}: `mesh service ls` lists them")
        return view

    @property
    def policies(self) -> Mapping[str, NetworkPolicy]:
        """Every network policy, by name."""
        return self.state.policies.all

    def selected(self, policy: NetworkPolicy) -> list[Task]:
        """The tasks that a policy selects."""
        return [
            task
            for (service, _), task in self.tasks.items()
            if policy.pod_selector.matches(self.labels(service, task))
        ]

    def labels(self, service: str, task: Task) -> dict[str, str]:
        """The labels of a task, with those it inherits."""
        view = self.state.service_view(service)
        return labels_of(service, view.spec.labels if view is not None else {}, task.labels)

    def problems_of(self, service: str, since: int = 0) -> tuple[Problem, ...]:
        """What keeps a service from being what its spec says, as reported after `since`."""
        key = ("services", service)
        return self.reports.get(key, ()) if self.reported.get(key, 0) > since else ()

    def replicas(self, view: ServiceView) -> str:
        """Tasks that may be given new connections, of all."""
        return f"{len(view.eligible(self.alive))}/{len(view.tasks)}"

    def health_of(self, task: Task) -> Health | None:
        """The task's health, if its service has a check: what its node reports, or starting."""
        view = self.state.service_view(task.service)
        if view is None or view.spec.check is None:
            return None
        for found in self.health.get((task.node, task.id), ()):
            if found.service == task.service and found.address in task.addresses:
                return found
        return Health(service=task.service, healthy=False, starting=True)

    def is_unhealthy(self, task: Task) -> bool:
        """Whether a task is known to fail its check."""
        health = self.health_of(task)
        return health is not None and not (health.healthy or health.starting)

    def published_of(self, task: Task) -> tuple[PortMapping, ...]:
        """The host ports that lead to a task, as its node tells."""
        found = self.published.get((task.node, task.id), ())
        return tuple(mapping for mapping in found if mapping.service in ("", task.service))

    def problems_on_nodes(self, service: str) -> tuple[Problem, ...]:
        """What nodes cannot do for a service or its tasks."""
        names = (f"service {service}", f" of service {service}")
        return tuple(
            Problem(about=f"node {node}", message=f"{problem.about}: {problem.message}")
            for node, applied in sorted(self.applied.items())
            for problem in applied.problems
            if problem.about == names[0] or problem.about.endswith(names[1])
        )

    def publishing(self, view: ServiceView) -> list[str]:
        """The nodes on which a service's ingress ports are to answer."""
        state, required = self.state, view.spec.selector
        names = (
            name for name in self.nodes if selector.matches(required, state.nodes.traits(name))
        )
        return sorted(names, key=natural)

    def serves(self, view: ServiceView, task: Task) -> bool:
        """Whether a task may be given new connections by some node of the cluster."""
        return task in view.eligible(self.alive)

    def take(self, item: KeyValue, parts: list[str]) -> None:
        """Keep one record that planning does not need.  Raises InvalidRecord."""
        match parts:
            case ["nodes", name]:
                self.nodes[name] = schema.parse_node(item.key, item.value)
            case ["tasks", service, name]:
                self.tasks[service, name] = schema.parse_task(item.key, item.value)
            case ["alive", name]:
                self.alive.add(name)
            case ["maintenance", name]:
                if schema.parse_maintenance(item.key, item.value).state is Duty.DRAINING:
                    self.draining.add(name)
            case ["published", node, task]:
                self.published[node, task] = schema.parse_mappings(item.key, item.value) or ()
            case ["applied", name]:
                self.applied[name] = schema.decode(item.key, item.value, Applied)
            case ["listeners", name]:
                self.listening[name] = schema.decode(item.key, item.value, Listening)
            case ["health", node, task]:
                self.health[node, task] = schema.parse_health(item.key, item.value)
            case ["status", "leader"]:
                self.leader = item.value.decode(errors="replace")
            case ["status", kind, name]:
                self.reports[kind, name] = schema.decode(item.key, item.value, Status).problems
                self.reported[kind, name] = item.mod_revision
            case _:
                pass


def cluster(session: Session) -> Cluster:
    """The cluster's settings.  Raises NotFound before `mesh cluster init`."""
    if session.cluster is None:
        raise errors.NotFound(
            f"no cluster at {session.keys.prefix} in {', '.join(session.etcd.endpoints)}: "
            "run `mesh cluster init`, or choose it with --etcd and --prefix"
        )
    return schema.decode(session.cluster.key, session.cluster.value, Cluster)


async def read(session: Session) -> World:
    """The world now."""
    snapshot = await session.store.list(f"{session.keys.prefix}/")
    return of(snapshot, session.keys)


def of(snapshot: Snapshot, keys: schema.Keys) -> World:
    """The world of a snapshot; records that cannot be read are among its problems."""
    known = state.State(keys, node="")
    known.apply(snapshot)
    world = World(revision=snapshot.revision, state=known)
    for item in snapshot.items:
        parts = item.key[len(keys.prefix) + 1 :].split("/")
        if "/".join(parts).startswith(state.KINDS):
            world.needed = max(world.needed, item.mod_revision)
        try:
            world.take(item, parts)
        except errors.InvalidRecord as error:
            known.invalid[item.key] = Problem(about=item.key, message=error.reason)
    world.problems += known.invalid.values()
    return world


def natural(text: str) -> list[tuple[int, str]]:
    """The key under which web-2 sorts before web-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(text)]


_DIGITS: Final = re.compile(r"(\d+)")

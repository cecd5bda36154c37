"""What this node knows of the cluster, fed by etcd's events; says which services each one touched.

Mutable, in the agent's loop only.  Pure otherwise: no clock, no I/O.  A record that cannot be read
is skipped and reported, and its last good version stays in force.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import msgspec

from mesh.agent import among
from mesh.agent.allocations import Allocations
from mesh.agent.drains import Drains
from mesh.agent.nodes import Nodes
from mesh.engine.desired import Touched
from mesh.errors import InvalidRecord, clipped
from mesh.health.verdicts import Verdicts
from mesh.hostports.ports import HostPorts
from mesh.model.cluster import Cluster
from mesh.model.policy import labels_of
from mesh.model.report import Problem
from mesh.model.view import ServiceView
from mesh.policy.book import Policies
from mesh.policy.plan import Labelled
from mesh.store import schema
from mesh.store.protocol import Changes, Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from mesh.model.service import ServiceSpec
    from mesh.model.task import Task
    from mesh.model.view import IngressPort, NodeView, PeerNode
    from mesh.rules import ended
    from mesh.rules.guards import Guards
    from mesh.store.protocol import KeyValue

    _Parse = Callable[[str, bytes], object]
    _Index = Callable[[list[str], "Entry | None", "Entry | None"], "Touched"]

K = TypeVar("K")
V = TypeVar("V")

KINDS = ("cluster", "nodes/", "alive/", "services/", "tasks/", "allocations/", "health/",
         "maintenance/", "labels/", "policies/")  # fmt: skip
"""What an agent follows; reports of other agents would only wake it for nothing."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A record as it was last readable, and when its key was created."""

    record: object
    created: int


class State:
    """Everything that planning needs, indexed by service."""

    def __init__(self, keys: schema.Keys, node: str, *, loopback: bool = False) -> None:
        """`loopback`: whether the node publishes ports on its loopback addresses, if asked to."""
        self.keys = keys
        self.node = node
        self.revision = 0
        self.doubting = False
        """Set while etcd may have ended leases wrongly: what ends with one is `doubted` instead."""
        self.doubted: set[str] = set()
        self.invalid: dict[str, Problem] = {}
        self.hostports = HostPorts(node, loopback=loopback)
        self.health = Verdicts(node)
        self.policies = Policies(node)
        self._entries: dict[str, Entry] = {}
        self._leased: set[str] = set()
        self._services: dict[str, ServiceSpec] = {}
        self.nodes = Nodes(node)
        self.drains = Drains(node)
        self._tasks: dict[str, dict[str, Entry]] = {}
        self._allocated = Allocations(node, self._services, self.nodes)
        self._vips, self._ports = self._allocated.vips, self._allocated.ports
        self._readers: dict[str, tuple[_Parse, _Index]] = {
            "services": (schema.parse_service, self._index_service),
            "tasks": (schema.parse_task, self._index_task),
            "nodes": (schema.parse_node, self._index_node),
            "maintenance": (schema.parse_maintenance, self._index_maintenance),
            "labels": (schema.parse_labels, self._index_labels),
            "alive": (lambda _key, _value: True, self._index_alive),
            "health": (schema.parse_health, self._index_health),
            "allocations": (schema.parse_allocation, self._allocated.changed),
            "cluster": (lambda key, value: schema.decode(key, value, Cluster), self._index_cluster),
            "published": (schema.parse_mappings, self._index_published),
            "policies": (schema.parse_policy, self._index_policy),
        }

    # ---- events

    def apply(self, event: Snapshot | Changes) -> Touched:
        """Take in an event; what it touched."""
        services: set[str] = set()
        nodes = policies = False
        for touched in self._applied(event):
            services.update(touched.services)
            nodes = nodes or touched.nodes
            policies = policies or touched.policies
        # Events of two prefixes may arrive out of order; only a snapshot can go back.
        known = 0 if isinstance(event, Snapshot) else self.revision
        self.revision = max(known, event.revision)
        services |= self._settle_ingress()
        for name in tuple(services):
            services.update(self._claim(name))
        return Touched(frozenset(services), nodes, policies)

    def _settle_ingress(self) -> frozenset[str]:
        """Decide who has the ingress ports that somebody won or lost; whom that touches."""
        touched: set[str] = set()
        for port, before, now in self._ports.settle(self.nodes.traits(self.node)):
            touched.update(filter(None, (before, now)), self.hostports.reserve(*port, now))
        return frozenset(touched)

    def _applied(self, event: Snapshot | Changes) -> Iterable[Touched]:
        if isinstance(event, Snapshot):
            present = {item.key for item in event.items}
            for key in [*self._entries, *self.invalid]:
                if key not in present:
                    yield self._delete(key)
            for item in event.items:
                yield self._put(item)
        else:
            for change in event.changes:
                if change.value is None:
                    yield self._delete(change.key)
                else:
                    yield self._put(change.value)

    def believe(self) -> Touched:
        """Take the doubted keys for gone; what that touches."""
        self.doubting = False
        touched = [self._delete(key) for key in sorted(self.doubted)]
        services = self._settle_ingress().union(*(t.services for t in touched))
        for name in services:
            services |= self._claim(name)
        return Touched(services, any(t.nodes for t in touched), any(t.policies for t in touched))

    def _put(self, item: KeyValue) -> Touched:
        key, value = item.key, item.value
        self.doubted.discard(key)
        parts = self._parts(key)
        if len(parts) not in _DEPTHS.get(parts[0], ()):
            return _NOTHING
        parse, index = self._readers[parts[0]]
        try:
            record = parse(key, value)
        except InvalidRecord as error:
            self.invalid[key] = Problem(about=clipped(key), message=error.reason)
            return _NOTHING
        self.invalid.pop(key, None)
        if item.lease:
            self._leased.add(key)
        else:
            self._leased.discard(key)
        entry, old = Entry(record, item.create_revision), self._entries.get(key)
        if entry == old:
            return _NOTHING
        self._entries[key] = entry
        return index(parts, old, entry)

    def _delete(self, key: str) -> Touched:
        if self.doubting and key in self._leased:
            self.doubted.add(key)
            return _NOTHING
        self.doubted.discard(key)
        self._leased.discard(key)
        self.invalid.pop(key, None)
        old = self._entries.pop(key, None)
        if old is None:
            return _NOTHING
        parts = self._parts(key)
        return self._readers[parts[0]][1](parts, old, None)

    def _parts(self, key: str) -> list[str]:
        return key[len(self.keys.prefix) + 1 :].split("/")

    # ---- indexes: each takes a record's old and new entry and says what that touches

    def _index_service(self, parts: list[str], old: Entry | None, new: Entry | None) -> Touched:
        was, now = (entry.record if entry is not None else None for entry in (old, new))
        self.health.spec_changed(parts[1], was, now, self._tasks.get(parts[1], ()))  # type: ignore[arg-type]
        if new is None:
            del self._services[parts[1]]
        else:
            self._services[parts[1]] = new.record  # type: ignore[assignment]
        self._ports.reconsider(parts[1:])
        self.drains.service(parts[1])
        concerned = self.policies.concern_service(was, now)  # type: ignore[arg-type]
        return Touched(frozenset(parts[1:]), nodes=False, policies=concerned)

    def _index_task(self, parts: list[str], old: Entry | None, new: Entry | None) -> Touched:
        service = parts[1]
        was = _task(old) if old is not None else None
        now = _task(new) if new is not None else None
        name = now.id if now is not None else parts[2]  # the same text, kept once
        _hold(self._tasks, service, name, new)
        self.drains.task(was, now)
        if new is None:
            self.health.task_gone(service, name)
        concerned = self.policies.concern_task(was, now)
        return Touched(frozenset((service,)), nodes=False, policies=concerned)

    def _index_policy(self, parts: list[str], _old: Entry | None, new: Entry | None) -> Touched:
        self.policies.put(parts[1], new.record if new is not None else None)  # type: ignore[arg-type]
        return Touched(frozenset(), nodes=False, policies=True)

    def _index_node(self, parts: list[str], _old: Entry | None, new: Entry | None) -> Touched:
        labels = self.nodes.identified(parts[1], new.record if new is not None else None)  # type: ignore[arg-type]
        return Touched(self._relabelled() if labels else frozenset(), nodes=True)

    def _index_labels(self, parts: list[str], _old: Entry | None, new: Entry | None) -> Touched:
        given = new.record.labels if new is not None else {}  # type: ignore[attr-defined]
        if not self.nodes.labelled(parts[1], given):
            return _NOTHING
        return Touched(self._relabelled(), nodes=False)

    def _relabelled(self) -> frozenset[str]:
        services = among.heeding_labels(self._services)
        self._ports.reconsider(services)
        return services

    def _index_alive(self, parts: list[str], _old: Entry | None, new: Entry | None) -> Touched:
        name = parts[1]
        if name == self.node:
            return _NOTHING  # it is alive to itself
        self.nodes.lives(name, alive=new is not None)
        return Touched(self.services_on({name}), nodes=True)

    def _index_maintenance(
        self, parts: list[str], _old: Entry | None, new: Entry | None
    ) -> Touched:
        changed = self.drains.node(parts[1], new.record if new is not None else None)  # type: ignore[arg-type]
        return Touched(self.services_on({parts[1]}), nodes=False) if changed else _NOTHING

    def services_on(self, nodes: Collection[str]) -> frozenset[str]:
        """The services with tasks on these nodes, by a look at every task: nodes come and go far
        too seldom for an index to pay.
        """
        return frozenset(
            service
            for service, tasks in self._tasks.items()
            if any(_task(entry).node in nodes for entry in tasks.values())
        )

    def _index_health(self, parts: list[str], old: Entry | None, new: Entry | None) -> Touched:
        was, now = (entry.record if entry is not None else () for entry in (old, new))
        return Touched(self.health.reported(parts[1], parts[2], was, now), nodes=False)  # type: ignore[arg-type]

    def _index_published(self, parts: list[str], _old: Entry | None, new: Entry | None) -> Touched:
        if parts[1] == self.node:
            self.hostports.recorded(parts[2], new.record if new is not None else ())  # type: ignore[arg-type]
        return _NOTHING

    def _index_cluster(self, _parts: list[str], _old: Entry | None, _new: Entry | None) -> Touched:
        self.nodes.confine(self.cluster)
        self._vips.confine(self.cluster)
        if self.cluster is not None:
            self.hostports.confine(self.cluster)
        return Touched(frozenset(self.services()), nodes=True)

    def _claim(self, service: str) -> frozenset[str]:
        """Put in a service's claims on this node's ports; whose granted ports that changes."""
        here = (
            (_task(entry), entry.created)
            for entry in self._tasks.get(service, _NO_TASKS).values()
            if _task(entry).node == self.node
        )
        return self.hostports.update(service, self._services.get(service), here)

    def settle(self, touched: Touched) -> Touched:
        """Give and take back dynamic host ports, before what was `touched` is planned; what is
        touched with that.

        Only while etcd holds the truth: what it lost for a moment keeps its numbers.
        """
        return touched._replace(services=touched.services | self.hostports.settle())

    # ---- problems

    def problems(self) -> Iterable[Problem]:
        """Records that cannot be read, and host ports that are somebody else's here."""
        yield from self.invalid.values()
        yield from self.hostports.problems()
        yield from self._ports.problems()

    # ---- views

    @property
    def cluster(self) -> Cluster | None:
        """The cluster's settings, once known."""
        entry = self._entries.get(self.keys.cluster)
        return entry.record if entry is not None and isinstance(entry.record, Cluster) else None

    @property
    def is_announced(self) -> bool:
        """Whether etcd holds this node's own sign of life."""
        key = self.keys.alive(self.node)
        return key in self._entries and key not in self.doubted

    def record(self, key: str) -> object:
        """The last good record of a key, or None."""
        entry = self._entries.get(key)
        return entry.record if entry is not None else None

    def services(self) -> frozenset[str]:
        """Every service that has a readable spec."""
        return frozenset(self._services)

    def local_ingress(self) -> dict[str, frozenset[tuple[int, int]]]:
        """Of services that answer on their replicas' nodes only: the protocols and numbers of
        their ingress ports.
        """
        return among.local_ingress(self._services, self._ports.everything())

    def service_view(self, service: str) -> ServiceView | None:
        """Everything about one service, or None if it has no spec."""
        spec = self._services.get(service)
        if spec is None:
            return None
        entries = [
            (entry.created, name, _task(entry))
            for name, entry in self._tasks.get(service, _NO_TASKS).items()
        ]
        entries.sort()
        tasks = tuple([task for _, _, task in entries])
        return ServiceView(
            spec=spec,
            tasks=tasks,
            vips=self._vips.of(service),
            ingress=self.ingress(service),
            healthy=self.health.healthy(spec, tasks),
            host_ports=self.hostports.granted(service),
            draining=self.drains.nodes,
            local_health=self._ports.local_health(spec),
        )

    def leaving(self) -> dict[ended.Name, ended.Leaving]:
        """Every task that drains, its node's or its own doing."""
        if not self.drains:
            return {}
        tasks = (_task(entry) for each in self._tasks.values() for entry in each.values())
        return self.drains.leaving(tasks, self._services)

    def guards(self) -> Guards:
        """Who may connect to this node's replicas."""
        return self.policies.guards(
            Labelled(task.node, task.addresses, labels_of(name, inherited, task.labels))
            for name, tasks in self._tasks.items()
            for inherited in (self._services[name].labels if name in self._services else {},)
            for task in map(_task, tasks.values())
        )

    def ingress(self, service: str) -> tuple[IngressPort, ...]:
        """The ingress ports of a service that this node serves."""
        return self.hostports.occupied.admitted(service, self._ports.of(service))

    def node_view(self) -> NodeView | None:
        """This node, or None while it has no number."""
        return self.nodes.view()

    def peers(self) -> dict[str, PeerNode]:
        """Every node with an identity and a number, this one included."""
        return self.nodes.peers()


_NOTHING = Touched(frozenset(), nodes=False)
_NO_TASKS: dict[str, Entry] = {}
_DEPTHS = {
    "cluster": (1,),
    **dict.fromkeys(("nodes", "maintenance", "labels", "alive", "services", "policies"), (2,)),
    **dict.fromkeys(("tasks", "health", "published"), (3,)),
    "allocations": (3, 4, 5),
}


def _task(entry: Entry) -> Task:
    return entry.record  # type: ignore[return-value]


def _hold(owned: dict[str, dict[K, V]], owner: str, key: K, value: V | None) -> None:
    """Set or drop one thing of an owner; an owner of nothing is not kept."""
    if value is not None:
        owned.setdefault(owner, {})[key] = value
        return
    things = owned.get(owner, {})
    things.pop(key, None)
    if not things:
        owned.pop(owner, None)

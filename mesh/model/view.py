"""What planning sees: one service with everything that concerns it, and the node it is seen from.

Views are assembled by the agent's state for each plan; they hold no reference back.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from mesh.model.health import Fallback
from mesh.model.names import NO_LABELS
from mesh.model.service import ServiceSpec
from mesh.model.task import Task, TaskState

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from mesh.model.cluster import NodeNetwork
    from mesh.model.node import Node
    from mesh.model.publish import Protocol


NO_LABELS_OF_NODES: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType({})


class IngressPort(NamedTuple):
    """An ingress port that the controller gave to the service."""

    protocol: Protocol
    published: int
    target: int


class ServiceView(msgspec.Struct, frozen=True, gc=False):
    """One service: its spec, what is allocated to it, and its tasks, oldest first.

    `healthy` names the tasks that pass the service's check, if it has one; `host_ports` are the
    tasks and published ports of host mode that this node's claims granted, `draining` the nodes
    whose tasks are to get no new connections.  `local_health` is the port that the controller gave
    it for nodes to tell on whether they have any that may.
    """

    spec: ServiceSpec
    tasks: tuple[Task, ...] = ()
    vips: tuple[str, ...] = ()
    ingress: tuple[IngressPort, ...] = ()
    healthy: frozenset[str] = frozenset()
    host_ports: frozenset[HostClaim] = frozenset()
    draining: frozenset[str] = frozenset()
    local_health: int | None = None

    def eligible(self, live: Container[str]) -> tuple[Task, ...]:
        """The tasks that may be given new connections, while these nodes are alive."""
        if not self.draining:
            return self.accepting(live)
        return self._passing([t for t in self._running(live) if t.node not in self.draining])

    def accepting(self, live: Container[str]) -> tuple[Task, ...]:
        """The same for what nobody else can answer: ports of host mode, also of draining nodes."""
        return self._passing(self._running(live))

    def _running(self, live: Container[str]) -> list[Task]:
        return [
            task
            for task in self.tasks
            if task.node in live and task.state is TaskState.RUNNING and task.weight
        ]

    def _passing(self, tasks: list[Task]) -> tuple[Task, ...]:
        running = tuple(tasks)
        check = self.spec.check
        if check is None:
            return running
        passing = tuple([task for task in running if task.id in self.healthy])
        return running if not passing and check.fallback is Fallback.ANY else passing


class HostClaim(NamedTuple):
    """A host-mode port that a task on this node wants; `address` None means every address.

    `revision` orders claimants of one port: the smallest wins.  It is the etcd revision at which
    the task was created, and 0 for a dynamic port (hostports.ports builds claims).
    """

    service: str
    task: str
    protocol: Protocol
    published: int
    target: int
    address: str | None
    revision: int


class PeerNode(NamedTuple):
    """A node of the mesh: its identity and the addresses that follow from its number."""

    node: Node
    network: NodeNetwork


class NodeView(NamedTuple):
    """The node that plans: itself, which nodes it believes alive (always itself too), and which of
    them it cannot reach over the overlay.

    `labels` are those of every node that has any.
    """

    name: str
    network: NodeNetwork
    live: frozenset[str]
    labels: Mapping[str, Mapping[str, str]] = NO_LABELS_OF_NODES
    unreachable: frozenset[str] = frozenset()

    def label(self, node: str, key: str) -> str | None:
        """What a label of a node says."""
        return self.labels.get(node, NO_LABELS).get(key)

"""What planning sees: one service with everything that concerns it, and the node it is seen from.

Views are assembled by the agent's state for each plan; they hold no reference back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mesh.model.cluster import NodeNetwork
    from mesh.model.publish import Protocol
    from mesh.model.service import ServiceSpec
    from mesh.model.task import Task


class IngressPort(NamedTuple):
    """An ingress port that the controller gave to the service."""

    protocol: Protocol
    published: int
    target: int


@dataclass(frozen=True, slots=True)
class ServiceView:
    """One service: its spec, what is allocated to it, and its tasks, oldest first.

    `unhealthy` names the tasks whose node reports them as failing; `host_ports` are the tasks and
    published ports of host mode that this node's claims granted.
    """

    spec: ServiceSpec
    tasks: tuple[Task, ...] = ()
    vips: tuple[str, ...] = ()
    ingress: tuple[IngressPort, ...] = ()
    unhealthy: frozenset[str] = frozenset()
    host_ports: frozenset[HostClaim] = frozenset()


class HostClaim(NamedTuple):
    """A host-mode port that a task on this node wants; `address` None means every address."""

    service: str
    task: str
    protocol: Protocol
    published: int
    target: int
    address: str | None


@dataclass(frozen=True, slots=True)
class NodeView:
    """The node that plans: itself, and which nodes it believes alive (always itself too)."""

    name: str
    network: NodeNetwork
    live: frozenset[str]

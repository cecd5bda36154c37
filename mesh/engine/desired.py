"""What the engine is asked for: the one interface towards those who decide.  Pure.

Knows forwardings and elements, never a service's meaning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection

    from mesh.rules.elements import Elements
    from mesh.rules.forwarding import Forwarding
    from mesh.rules.guards import Guards
    from mesh.rules.ids import Ids
    from mesh.rules.marks import Layout


class Touched(NamedTuple):
    """What an event may have changed: these services, perhaps the set of nodes, or who may connect
    to this node's replicas.
    """

    services: frozenset[str]
    nodes: bool
    policies: bool = False


class Lowered(NamedTuple):
    """The elements of one service, and the keys of the pools that have ids among them."""

    elements: Elements
    pools: tuple[str, ...]


NOTHING = Lowered({}, ())


class Desired(Protocol):
    """What this node is to forward, asked for service by service, as it is at that moment."""

    def services(self) -> Collection[str]:
        """The names of all services; none has a slash in it."""
        ...

    def forwardings(self, service: str) -> tuple[Forwarding, ...]:
        """What a service comes to on this node; nothing if there is no such service."""
        ...

    def lower(self, service: str, ids: Ids) -> Lowered:
        """The same as elements; pools without an id are given one."""
        ...

    def lower_nodes(self, layout: Layout) -> Elements:
        """The elements that describe the nodes, this one among them."""
        ...

    def guards(self) -> Guards:
        """Who may connect to this node's replicas, as policies have it."""
        ...

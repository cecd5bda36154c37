"""What one service, and the set of nodes, come to in this node's kernel.  Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mesh.hostports.plan
import mesh.vip.plan
import mesh.wg.plan
from mesh.engine.desired import NOTHING, Lowered
from mesh.rules import nft

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from mesh.agent.state import State
    from mesh.model.view import NodeView, PeerNode, ServiceView
    from mesh.rules.elements import Elements
    from mesh.rules.forwarding import Forwarding
    from mesh.rules.guards import Guards
    from mesh.rules.ids import Ids
    from mesh.rules.marks import Layout


class Plans:
    """What a node's state comes to, for the engine; nothing while the node has no number."""

    def __init__(self, state: State) -> None:
        self._state = state

    def services(self) -> Collection[str]:
        """Every service that has a readable spec."""
        return self._state.services()

    def forwardings(self, service: str) -> tuple[Forwarding, ...]:
        """What a service comes to on this node."""
        view, node = self._state.service_view(service), self._state.node_view()
        return plan(view, node) if view is not None and node is not None else ()

    def lower(self, service: str, ids: Ids) -> Lowered:
        """The same as elements."""
        view, node = self._state.service_view(service), self._state.node_view()
        return lower(view, node, ids) if view is not None and node is not None else NOTHING

    def lower_nodes(self, layout: Layout) -> Elements:
        """The elements that describe the nodes."""
        return lower_nodes(self._state.peers(), self._state.node, layout)

    def guards(self) -> Guards:
        """Who may connect to this node's replicas."""
        return self._state.guards()


def plan(service: ServiceView, node: NodeView) -> tuple[Forwarding, ...]:
    """The forwardings of a service as this node installs them, of both modes."""
    return mesh.vip.plan.plan(service, node) + mesh.hostports.plan.plan(service, node)


def lower(service: ServiceView, node: NodeView, ids: Ids) -> Lowered:
    """The elements of a service and the keys of its pools.

    Every replica of this node gets a hairpin: it may be chosen for its own request.
    """
    name = node.name
    here = [host for task in service.tasks if task.node == name for host in task.addresses]
    found = nft.lower_hairpins(here)
    forwardings = plan(service, node)
    for forwarding in forwardings:
        found |= nft.lower(forwarding, ids)
    return Lowered(found, tuple([forwarding.key for forwarding in forwardings]))


def lower_nodes(peers: Mapping[str, PeerNode], own: str, layout: Layout) -> Elements:
    """The elements that describe the nodes `own` accepts as peers, and itself."""
    found: Elements = {}
    if own not in peers:
        return found
    for name, peer in mesh.wg.plan.admit(peers, own)[0].items():
        found |= nft.lower_nodes((*peer.node.addresses, *peer.network.overlay))
        if name != own:
            found |= nft.lower_peer(peer.network, layout)
    return found

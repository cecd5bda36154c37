"""What one service, and the set of nodes, come to in this node's kernel.  Pure."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import mesh.hostports.plan
import mesh.vip.plan
import mesh.wg.plan
from mesh.rules import nft

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.model.view import NodeView, PeerNode, ServiceView
    from mesh.rules.elements import Elements
    from mesh.rules.forwarding import Forwarding
    from mesh.rules.ids import Ids
    from mesh.rules.marks import Layout


def plan(service: ServiceView, node: NodeView) -> tuple[Forwarding, ...]:
    """The forwardings of a service as this node installs them, of both modes."""
    return mesh.vip.plan.plan(service, node) + mesh.hostports.plan.plan(service, node)


def lower(service: ServiceView, node: NodeView, ids: Ids) -> tuple[Elements, set[str]]:
    """The elements of a service and the keys of its pools.

    Every replica of this node gets a hairpin: it may be chosen for its own request.
    """
    name = node.name
    here = [task.addresses for task in service.tasks if task.node == name]
    found = nft.lower_hairpins(chain.from_iterable(here))
    pools = set()
    for forwarding in plan(service, node):
        pools.add(forwarding.key)
        found |= nft.lower(forwarding, ids)
    return found, pools


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

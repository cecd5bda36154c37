"""What the controller gave to whom: node numbers, VIPs, ports.

Mutable, a part of mesh.agent.state.  Pure: no clock, no I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.agent.ingress import IngressPorts
from mesh.agent.vips import Vips
from mesh.engine.desired import Touched
from mesh.model.allocation import NodeAllocation, PortAllocation, VipAllocation
from mesh.model.publish import Protocol
from mesh.model.view import IngressPort

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.agent.nodes import Nodes
    from mesh.agent.state import Entry
    from mesh.model.service import ServiceSpec


class Allocations:
    """All that is allocated, seen from the node `own`; numbers of nodes are noted in `nodes`."""

    def __init__(self, own: str, specs: Mapping[str, ServiceSpec], nodes: Nodes) -> None:
        self.vips = Vips()
        self.ports = IngressPorts(own, specs)
        self._nodes = nodes

    def changed(self, parts: list[str], old: Entry | None, new: Entry | None) -> Touched:
        """A record at a key of these parts changed; None: it was not there, or is gone."""
        services: set[str] = set()
        nodes = False
        for entry in (old, new):
            held = entry is new
            match entry.record if entry is not None else None:
                case VipAllocation() as vip:
                    services.add(vip.service)
                    self.vips.allocated(int(parts[2]), vip, held=held)
                case PortAllocation() as port:
                    services.add(port.service)
                    ingress = IngressPort(Protocol(parts[2]), int(parts[3]), port.target)
                    at = entry.created if entry is not None and held else None
                    self.ports.allocated(port.service, ingress, shared=len(parts) == 5, at=at)
                case NodeAllocation() as node:
                    nodes = True
                    self._nodes.numbered(node.node, int(parts[2]), held=held)
                case _:
                    pass
        return Touched(frozenset(services), nodes)

"""What a node tells of the host ports it publishes: Galaxy's `[]Port`, and where it goes on.

Galaxy keeps the same JSON in the annotation tkestack.io/portmapping: this order of keys, `hostIP`
left out when empty.  `service` is ours: two services may have tasks of one name.
"""

from __future__ import annotations

import msgspec

from mesh.model.publish import PORTS, Protocol


class PortMapping(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True, gc=False
):
    """One published port of a task; read with the protocol in any case."""

    host_port: int
    container_port: int
    protocol: Protocol
    host_ip: str = msgspec.field(default="", name="hostIP")
    pod_name: str
    pod_ip: str = msgspec.field(name="podIP")
    service: str = ""

    def __post_init__(self) -> None:
        if self.host_port not in PORTS or self.container_port not in PORTS:
            raise ValueError(f"ports {self.host_port}, {self.container_port}: 1-65535 is allowed")


class Cursors(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a node's search for dynamic host ports goes on, so that freed ones rest."""

    tcp: int = 0
    udp: int = 0
    sctp: int = 0

    def of(self, protocol: Protocol) -> int:
        """The number at which the next search begins; 0 if there was none yet."""
        found: int = getattr(self, protocol.value)
        return found

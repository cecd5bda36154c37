"""What the controller hands out: node numbers, VIPs and ingress ports.

There are tens of thousands: the name of a service is one text for all of its records.
"""

from __future__ import annotations

import sys
from typing import Final

import msgspec

from mesh.model.address import parse_address


class NodeAllocation(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Owner of a node number; the number is in the key."""

    node: str


class VipAllocation(msgspec.Struct, frozen=True, kw_only=True, rename="camel", gc=False):
    """Owner of one VIP per family; the index within the VIP range is in the key."""

    service: str
    addresses: tuple[str, ...]

    def __post_init__(self) -> None:
        for address in self.addresses:
            if parse_address(address) != address:
                raise ValueError(f"address {address!r}: write {parse_address(address)!r}")
        msgspec.structs.force_setattr(self, "service", sys.intern(self.service))


LOCAL_HEALTH: Final = 0
"""The target of a port on which nodes tell whether they have replicas of the service."""


class PortAllocation(msgspec.Struct, frozen=True, kw_only=True, rename="camel", gc=False):
    """Owner of a published ingress port; protocol and port are in the key.

    `target` 0: nothing is published there, the nodes themselves tell of the service.
    """

    service: str
    target: int

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "service", sys.intern(self.service))

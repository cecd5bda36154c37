"""What a container's link is called and carries.  Pure; `dataplane.veth` makes it.

The name follows from the task and the MAC address from the IPv4 address, so a left-over is
recognised, and neighbours need not learn a restarted container again.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from mesh.dataplane import veth
from mesh.model import address
from mesh.model.address import FAMILIES, Family

if TYPE_CHECKING:
    from mesh.model.cluster import NodeNetwork


def link_name(task: str) -> str:
    """The node's end of a task's link: 12 characters of the 15 the kernel allows."""
    return f"wm{hashlib.sha256(task.encode()).hexdigest()[:10]}"


def mac_of(address4: str) -> str:
    """A locally administered MAC address that no other IPv4 address gives: 0a:58 and its bytes."""
    return ":".join(("0a", "58", *(f"{byte:02x}" for byte in address.packed(address4))))


def plan(task: str, addresses: tuple[str, ...], bridge: str, network: NodeNetwork) -> veth.Pair:
    """The link of a task that holds `addresses`, one per family, of the node's subnets."""
    (address4,) = address.of_family(addresses, Family.V4)
    return veth.Pair(
        outer=link_name(task),
        bridge=bridge,
        mac=mac_of(address4),
        addresses=tuple(
            f"{one}/{address.prefix_length(network.subnet(address.family_of(one)))}"
            for one in addresses
        ),
        gateways=tuple(network.gateway(family) for family in FAMILIES),
    )

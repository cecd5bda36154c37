"""The pools that the controller gives from: node numbers, VIPs, dynamic ingress ports.

Pure: knows spans and arithmetic, not who owns what.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from mesh.model import address
from mesh.model.address import FAMILIES, Family

if TYPE_CHECKING:
    from mesh.model.cluster import Cluster


def node_numbers(cluster: Cluster) -> range:
    """The numbers nodes may have."""
    return range(1, cluster.capacity + 1)


def vip_indexes(cluster: Cluster) -> range:
    """The indexes VIPs may have: all but the network and the broadcast address of the IPv4 range.

    The IPv6 range is a /64 and holds every one of them.
    """
    return range(1, (1 << (32 - address.prefix_length(cluster.vips4))) - 1)


def vip_addresses(cluster: Cluster, index: int) -> tuple[str, ...]:
    """The VIP of `index` in each family."""
    return tuple(address.nth(cluster.vips(family), index) for family in FAMILIES)


def vip_index(cluster: Cluster, vip: str) -> int:
    """The index of an explicitly wanted VIP.  Raises ValueError if it is not one of the range's."""
    wanted = ipaddress.ip_address(vip)
    family = Family(wanted.version)
    first = ipaddress.ip_network(cluster.vips(family))[0]
    index = int(wanted) - int(first)
    if index not in vip_indexes(cluster):
        raise ValueError(
            f"VIP {wanted} is not in the VIP range {cluster.vips(family)}: "
            'choose an address of it, or "auto"'
        )
    return index


def dynamic_ports(cluster: Cluster) -> range:
    """The ports given to ingress ports that do not name one; protocols count separately."""
    low, high = cluster.ingress_ports
    return range(low, high + 1)

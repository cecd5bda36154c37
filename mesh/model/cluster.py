"""The cluster's settings and the address plan that follows from them.

One number per node decides everything else about it: overlay addresses, container subnets,
the steering device's MAC address and the field in conntrack and packet marks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Final

import msgspec

from mesh.model import address, protected
from mesh.model.address import Family

NODE_NUMBERS: Final = range(1, 4095)
"""Node numbers must fit the 12-bit field of the packet mark, without all zeros and all ones."""


class Cluster(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """The settings of a cluster, written once by `mesh cluster init`.

    `prefix6` is a /48 (RFC 4193); overlay, containers and VIPs are parts of it.
    `node_bits4` is the length of each node's container subnet.  `protected_ports` are published
    only by force: "22/tcp", "6000-6063" (of every protocol).
    """

    id: str
    overlay4: str = "10.0.0.0/24"
    containers4: str = "10.0.0.0/16"
    node_bits4: int = 24
    vips4: str = "10.1.0.0/16"
    prefix6: str
    wireguard_port: int = 51820
    steering_port: int = 4790
    steering_vni: int = 7777
    keepalive: int = 25
    domain: str = "warren.local"
    liveness_ttl: int = 5
    ingress_ports: tuple[int, int] = (30000, 31999)
    host_ports: tuple[int, int] = (32000, 32999)
    protected_ports: tuple[str, ...] = protected.DEFAULT

    def __post_init__(self) -> None:
        for name in ("overlay4", "containers4", "vips4"):
            prefix = address.parse_prefix(getattr(self, name))
            if address.family_of(prefix) is not Family.V4:
                raise ValueError(f"{name} {prefix} is not an IPv4 prefix")
        if address.prefix_length(address.parse_prefix(self.prefix6)) != 48:
            raise ValueError(f"prefix6 {self.prefix6} is not a /48")
        self._check_disjoint()
        for name in ("wireguard_port", "steering_port"):
            if not 0 < getattr(self, name) < 65536:
                raise ValueError(f"{name} {getattr(self, name)} is not in 1-65535")
        if self.liveness_ttl < 1:
            raise ValueError("livenessTtl must be at least 1 second")
        self._check_ranges()

    def _check_disjoint(self) -> None:
        if not address.prefix_length(self.containers4) <= self.node_bits4 <= 30:
            raise ValueError(
                f"nodeBits4 {self.node_bits4} does not cut {self.containers4} into subnets"
            )
        pools = {"containers4": self.containers4, "vips4": self.vips4}
        if not address.overlaps(self.overlay4, self.node_subnet(0, Family.V4)):
            pools["overlay4"] = self.overlay4
        elif address.prefix_length(self.overlay4) < self.node_bits4:
            raise ValueError(
                f"overlay4 {self.overlay4} reaches into the container subnets of "
                f"{self.containers4}: choose a /{self.node_bits4} or a separate prefix"
            )
        for (one, first), (other, second) in combinations(pools.items(), 2):
            if address.overlaps(first, second):
                raise ValueError(f"{one} {first} overlaps {other} {second}")
        if address.overlaps(self.overlay4, self.vips4):
            raise ValueError(f"overlay4 {self.overlay4} overlaps vips4 {self.vips4}")

    def _check_ranges(self) -> None:
        for name in ("ingress_ports", "host_ports"):
            low, high = getattr(self, name)
            if not 0 < low <= high < 65536:
                raise ValueError(f"{name} {low}-{high} is not a port range")
        if self.ingress_ports[0] <= self.host_ports[1] and (
            self.host_ports[0] <= self.ingress_ports[1]
        ):
            raise ValueError("ingressPorts and hostPorts overlap")
        for entry in self.protected_ports:
            protected.parse_entry(entry)

    @property
    def plan(self) -> tuple[object, ...]:
        """What a node that runs is built on, so that only a new start can take another one."""
        return (
            *(self.id, self.overlay4, self.containers4, self.node_bits4, self.vips4, self.prefix6),
            *(self.wireguard_port, self.steering_port, self.steering_vni),
        )

    @property
    def dynamic_ports(self) -> tuple[range, range]:
        """The ports that are given to who names none, in ingress and in host mode."""
        (first, last), (low, high) = self.ingress_ports, self.host_ports
        return range(first, last + 1), range(low, high + 1)

    @property
    def capacity(self) -> int:
        """How many nodes the pools have room for."""
        overlay = (1 << (32 - address.prefix_length(self.overlay4))) - 2
        subnets = (1 << (self.node_bits4 - address.prefix_length(self.containers4))) - 1
        return min(overlay, subnets, NODE_NUMBERS[-1])

    def overlay(self, family: Family) -> str:
        """The prefix that holds every node's overlay address."""
        if family is Family.V4:
            return self.overlay4
        return address.nth_subnet(self.prefix6, 64, 0)

    def vips(self, family: Family) -> str:
        """The prefix that holds every VIP."""
        if family is Family.V4:
            return self.vips4
        return address.nth_subnet(self.prefix6, 64, 0xF000)

    def is_vip(self, host: str) -> bool:
        """Whether an address lies in the range of VIPs of its family."""
        return address.contains(self.vips(address.family_of(host)), host)

    def node_subnet(self, number: int, family: Family) -> str:
        """The container subnet of node `number`."""
        if family is Family.V4:
            return address.nth_subnet(self.containers4, self.node_bits4, number)
        return address.nth_subnet(self.prefix6, 64, number)

    def prefixes(self, family: Family) -> tuple[str, ...]:
        """Everything the mesh owns, in the fewest prefixes."""
        if family is Family.V6:
            return (self.prefix6,)
        return address.collapse((self.overlay4, self.containers4, self.vips4), family)

    def network(self, number: int) -> NodeNetwork:
        """The addresses of node `number`.  Raises ValueError if the pools have no such node."""
        if not 0 < number <= self.capacity:
            raise ValueError(f"node number {number} is not in 1-{self.capacity}")
        return NodeNetwork(
            number=number,
            overlay=tuple(address.nth(self.overlay(f), number) for f in address.FAMILIES),
            subnets=tuple(self.node_subnet(number, f) for f in address.FAMILIES),
        )


@dataclass(frozen=True, slots=True)
class NodeNetwork:
    """What one node number stands for; `overlay` and `subnets` hold v4 then v6."""

    number: int
    overlay: tuple[str, ...]
    subnets: tuple[str, ...]

    def overlay_address(self, family: Family) -> str:
        """The node's own address in the overlay."""
        return self.overlay[address.FAMILIES.index(family)]

    def subnet(self, family: Family) -> str:
        """The prefix of the node's containers."""
        return self.subnets[address.FAMILIES.index(family)]

    def gateway(self, family: Family) -> str:
        """The bridge's address: the first of the container subnet."""
        return address.nth(self.subnet(family), 1)

    @property
    def mac(self) -> str:
        """The steering device's address; its last two bytes are the node number."""
        return f"02:4d:45:53:{self.number >> 8:02x}:{self.number & 0xFF:02x}"

    @property
    def bridge_mac(self) -> str:
        """The bridge's address: fixed, or it would change with the containers that come and go."""
        return f"02:4d:45:42:{self.number >> 8:02x}:{self.number & 0xFF:02x}"

    @property
    def link_local(self) -> str:
        """The steering device's IPv6 next-hop address."""
        return f"fe80::7:{self.number:x}"

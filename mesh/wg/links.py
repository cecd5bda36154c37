"""Which devices, addresses, neighbours, routes and rules a node has in the mesh.

Pure.  The shapes are those of program.md section 4 as docs/dataplane.md tells them; every line of
them was a lost packet once, so none is optional.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model import address, link
from mesh.model.address import FAMILIES, Family

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mesh.model.cluster import Cluster, NodeNetwork
    from mesh.model.link import DeviceNames, LinkKey, LinkValue
    from mesh.rules.marks import Layout

    Item = tuple[LinkKey, LinkValue]

STEERING_TABLE: Final = 7000
"""The table of flows on their way to a replica; 7000 + N is the one of replies through node N."""

RULE_SKIP, RULE_STEER, RULE_RETURN, RULE_END = 7000, 7001, 7002, 7003
"""Priorities of our rules; the block is skipped by traffic that carries no mark of ours."""

WIREGUARD_OVERHEAD: Final = 80
"""Outer IPv6 40, UDP 8, WireGuard 32 bytes; 20 are to spare over IPv4, where peers may mix."""

VXLAN_OVERHEAD: Final = 50
"""Outer IPv4 20, UDP 8, vxlan 8, inner Ethernet 14 bytes."""

SMALLEST_MTU: Final = 1280
"""IPv6's least (RFC 8200 section 5): the kernel takes IPv6 off a device with less."""


def overlay_mtu(underlay_mtu: int) -> int:
    """What fits in one underlay packet, but enough for IPv6 in the steering device on top."""
    return max(underlay_mtu - WIREGUARD_OVERHEAD, SMALLEST_MTU + VXLAN_OVERHEAD)


class Local(NamedTuple):
    """What is the host's own: its devices' names, the MTU below them, the bits of its marks, and
    whether ports may answer on its `loopback` addresses.
    """

    names: DeviceNames
    underlay_mtu: int
    layout: Layout
    loopback: bool = False


def plan(
    local: Local, cluster: Cluster, own: NodeNetwork, others: Iterable[NodeNetwork]
) -> dict[LinkKey, LinkValue]:
    """Everything the node `own` has; `others` are the networks of its peers."""
    names, mtu = local.names, overlay_mtu(local.underlay_mtu)
    tunnel = link.Tunnel(
        vni=cluster.steering_vni, local=own.overlay_address(Family.V4), port=cluster.steering_port
    )
    steering = link.Settings(mtu=mtu - VXLAN_OVERHEAD, mac=own.mac, tunnel=tunnel)
    desired: dict[LinkKey, LinkValue] = {
        link.Device(names.overlay): link.Settings(mtu=mtu),
        link.Device(names.steering): steering,
        link.Device(names.bridge): link.Settings(mac=own.bridge_mac),
    }
    desired.update(_addresses(names, own))
    desired.update(_vip_routes(names, cluster, own))
    desired.update(_rules(local.layout))
    if local.loopback:
        # The answer of a container to ::1 comes in by the bridge, and the kernel wants a route to
        # ::1 there; sysctl has it for 127.0.0.1.  What is sent to ::1 from there it drops before.
        desired[link.Route(link.MAIN_TABLE, "::1/128")] = link.Local(names.bridge)
    for peer in others:
        desired.update(_neighbours(names, peer))
        for family in FAMILIES:
            desired.update(_peer_routes(names, own, peer, family))
            desired.update(_steering_routes(names, own, peer, family))
            desired.update(_return_rule(peer, family, local.layout))
    return desired


def _addresses(names: DeviceNames, own: NodeNetwork) -> Iterator[Item]:
    for family in FAMILIES:
        host = f"{own.overlay_address(family)}/{family.bits}"
        yield link.Address(names.overlay, host), None
        length = address.prefix_length(own.subnet(family))
        yield link.Address(names.bridge, f"{own.gateway(family)}/{length}"), None
    # Without an IPv4 address on the device even a loose rp_filter drops what comes in by it.
    overlay4 = own.overlay_address(Family.V4)
    yield link.Address(names.steering, f"{overlay4}/{Family.V4.bits}"), None
    yield link.Address(names.steering, f"{own.link_local}/64"), None


def _vip_routes(names: DeviceNames, cluster: Cluster, own: NodeNetwork) -> Iterator[Item]:
    """Make what the host itself sends to a VIP leave with the overlay address as source."""
    for family in FAMILIES:
        way = link.Via(names.overlay, source=own.overlay_address(family))
        yield link.Route(link.MAIN_TABLE, cluster.vips(family)), way


def _peer_routes(
    names: DeviceNames, own: NodeNetwork, peer: NodeNetwork, family: Family
) -> Iterator[Item]:
    way = link.Via(names.overlay, source=own.overlay_address(family))
    yield link.Route(link.MAIN_TABLE, f"{peer.overlay_address(family)}/{family.bits}"), way
    yield link.Route(link.MAIN_TABLE, peer.subnet(family)), way


def _neighbours(names: DeviceNames, peer: NodeNetwork) -> Iterator[Item]:
    for family in FAMILIES:
        yield link.Neighbour(names.steering, _next_hop(peer, family)), peer.mac
    yield link.TunnelEnd(names.steering, peer.mac), peer.overlay_address(Family.V4)


def _next_hop(peer: NodeNetwork, family: Family) -> str:
    # An IPv6 gateway must be link-local: the overlay address is routed by the overlay device,
    # and the kernel refuses a gateway that another device has.
    return peer.overlay_address(family) if family is Family.V4 else peer.link_local


def _steering_routes(
    names: DeviceNames, own: NodeNetwork, peer: NodeNetwork, family: Family
) -> Iterator[Item]:
    way = link.Via(names.steering, gateway=_next_hop(peer, family))
    yield link.Route(STEERING_TABLE, peer.subnet(family)), way
    # Replicas on the host network, and the reverse path of the peer's ICMP errors.
    yield link.Route(STEERING_TABLE, f"{peer.overlay_address(family)}/{family.bits}"), way
    back = STEERING_TABLE + peer.number
    everywhere = "0.0.0.0/0" if family is Family.V4 else "::/0"
    yield link.Route(back, everywhere), way
    # Flows to our own containers carry the mark too; without this they would loop.
    yield link.Route(back, own.subnet(family)), link.Throw()


def _rules(layout: Layout) -> Iterator[Item]:
    mask = layout.packet_mark
    for family in FAMILIES:
        # The target is our own rule and not 32766, so that foreign rules behind us still count.
        yield link.Rule(family, RULE_SKIP, 0, mask), link.Goto(RULE_END)
        yield link.Rule(family, RULE_STEER, mask, mask), link.Lookup(STEERING_TABLE)
        yield link.Rule(family, RULE_END, 0, 0), link.Nop()


def _return_rule(peer: NodeNetwork, family: Family, layout: Layout) -> Iterator[Item]:
    lookup = link.Lookup(STEERING_TABLE + peer.number)
    mark = layout.node(peer.number)
    yield link.Rule(family, RULE_RETURN, mark, layout.packet_mark), lookup

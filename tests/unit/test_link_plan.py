"""Which devices, routes and rules a node has, and what a change of them takes along."""

from __future__ import annotations

from mesh.delta import Delta
from mesh.model import link
from mesh.model.address import FAMILIES, Family
from mesh.model.cluster import Cluster
from mesh.rules import marks
from mesh.wg import links

CLUSTER = Cluster(id="test", prefix6="fd12:3456:789a::/48")
NAMES = link.DeviceNames("wg", "mx", "br")


def plan(*peers: int, own: int = 1, mtu: int = 1500, port: int = 4790) -> link.Links:
    cluster = Cluster(id="test", prefix6=CLUSTER.prefix6, steering_port=port)
    networks = [cluster.network(number) for number in peers]
    return links.plan(
        links.Local(NAMES, mtu, marks.DEFAULT), cluster, cluster.network(own), networks
    )


def table(plan: link.Links, number: int) -> dict[str, link.LinkValue]:
    return {
        key.prefix: value
        for key, value in plan.items()
        if isinstance(key, link.Route) and key.table == number
    }


def test_the_main_table_leads_to_peers_and_vips_with_the_overlay_address_as_source() -> None:
    way4 = link.Via("wg", source="10.0.0.1")
    way6 = link.Via("wg", source="fd12:3456:789a::1")

    assert table(plan(2), link.MAIN_TABLE) == {
        "10.0.0.2/32": way4,
        "10.0.2.0/24": way4,
        "10.1.0.0/16": way4,
        "fd12:3456:789a::2/128": way6,
        "fd12:3456:789a:2::/64": way6,
        "fd12:3456:789a:f000::/64": way6,
    }


def test_a_node_has_no_route_to_itself() -> None:
    own = CLUSTER.network(1)

    assert not {f"{own.overlay[0]}/32", own.subnets[0]} & set(table(plan(2), link.MAIN_TABLE))


def test_steered_flows_go_by_the_steering_device_and_ipv6_by_link_local_next_hops() -> None:
    assert table(plan(2), links.STEERING_TABLE) == {
        "10.0.0.2/32": link.Via("mx", gateway="10.0.0.2"),
        "10.0.2.0/24": link.Via("mx", gateway="10.0.0.2"),
        "fd12:3456:789a::2/128": link.Via("mx", gateway="fe80::7:2"),
        "fd12:3456:789a:2::/64": link.Via("mx", gateway="fe80::7:2"),
    }


def test_replies_return_through_the_node_they_came_by_but_own_containers_are_thrown_back() -> None:
    assert table(plan(2, own=3), links.STEERING_TABLE + 2) == {
        "0.0.0.0/0": link.Via("mx", gateway="10.0.0.2"),
        "::/0": link.Via("mx", gateway="fe80::7:2"),
        "10.0.3.0/24": link.Throw(),
        "fd12:3456:789a:3::/64": link.Throw(),
    }


def test_unmarked_traffic_skips_our_rules_and_no_others() -> None:
    rules = {key: value for key, value in plan(2).items() if isinstance(key, link.Rule)}

    for family in FAMILIES:
        skip = link.Rule(family, 7000, 0, 0xFFF00000)
        assert rules[skip] == link.Goto(7003)
        assert rules[link.Rule(family, 7003, 0, 0)] == link.Nop()
        assert rules[link.Rule(family, 7001, 0xFFF00000, 0xFFF00000)] == link.Lookup(7000)
        assert rules[link.Rule(family, 7002, 2 << 20, 0xFFF00000)] == link.Lookup(7002)
    assert len(rules) == 8


def test_the_steering_device_has_an_ipv4_address_and_its_link_local_one() -> None:
    addresses = {key for key in plan() if isinstance(key, link.Address)}

    assert {a.prefix for a in addresses if a.device == "mx"} == {"10.0.0.1/32", "fe80::7:1/64"}
    assert {a.prefix for a in addresses if a.device == "wg"} == {
        "10.0.0.1/32",
        "fd12:3456:789a::1/128",
    }
    assert {a.prefix for a in addresses if a.device == "br"} == {
        "10.0.1.1/24",
        "fd12:3456:789a:1::1/64",
    }


def test_a_peer_is_known_by_mac_address_in_both_families() -> None:
    peer = CLUSTER.network(2)
    desired = plan(2)

    assert desired[link.Neighbour("mx", "10.0.0.2")] == peer.mac
    assert desired[link.Neighbour("mx", "fe80::7:2")] == peer.mac
    assert desired[link.TunnelEnd("mx", peer.mac)] == "10.0.0.2"


def test_each_tunnel_fits_into_the_one_below() -> None:
    assert links.overlay_mtu(1500) == 1420
    assert links.overlay_mtu(9000) == 8920
    steering = plan(mtu=1500)[link.Device("mx")]
    assert isinstance(steering, link.Settings)
    assert steering.mtu == 1370


def test_ipv6_fits_into_the_steering_device_however_small_the_underlay() -> None:
    steering = plan(mtu=1300)[link.Device("mx")]

    assert isinstance(steering, link.Settings)
    assert steering.mtu == 1280


def test_a_peer_adds_only_its_own_things() -> None:
    delta = link.changes(plan(2), plan(2, 3))

    assert delta.remove == {}
    assert not any("10.0.2." in str(key) for key in delta.add)
    assert link.changes(plan(2, 3), plan(2)) == Delta(delta.add, {})


def test_a_tunnel_made_anew_loses_what_hangs_on_it() -> None:
    desired = plan(2, port=4791)

    delta = link.changes(plan(2), desired)

    assert list(delta.remove) == [link.Device("mx")]
    assert link.Neighbour("mx", "fe80::7:2") in delta.add
    assert link.Route(7002, "0.0.0.0/0") in delta.add
    assert link.Route(link.MAIN_TABLE, "10.0.2.0/24") not in delta.add
    assert not any(isinstance(key, link.Rule) for key in delta.add)


def test_an_mtu_is_changed_in_place() -> None:
    delta = link.changes(plan(2), plan(2, mtu=1400))

    assert set(delta.add) == {link.Device("wg"), link.Device("mx")}


def test_what_goes_with_a_device_is_not_removed_one_by_one() -> None:
    delta = link.changes(plan(2), {})

    assert delta.add == {}
    assert {type(key) for key in delta.remove} == {link.Device, link.Route, link.Rule}
    assert all(
        value == link.Throw() for key, value in delta.remove.items() if isinstance(key, link.Route)
    )


def test_every_family_is_planned_alike() -> None:
    desired = plan(2, 3)
    routes = [key for key in desired if isinstance(key, link.Route)]

    four = sum(":" not in key.prefix for key in routes)
    assert four == len(routes) - four
    assert {key.family for key in desired if isinstance(key, link.Rule)} == {Family.V4, Family.V6}

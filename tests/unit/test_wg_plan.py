"""Who may be a peer, where it is reached, and what the `wg` program is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.delta import Delta
from mesh.model.cluster import Cluster
from mesh.model.node import Node, Role
from mesh.model.view import PeerNode
from mesh.wg import conf, plan
from mesh.wg.plan import Peer

CLUSTER = Cluster(id="test", prefix6="fd12:3456:789a::/48")


def key(number: int) -> str:
    return f"{number:042d}A="


def node(
    number: int,
    *,
    public_key: str = "",
    endpoints: tuple[str, ...] | None = None,
    addresses: tuple[str, ...] | None = None,
    like: int = 0,
) -> PeerNode:
    """Node number `number`; `like` gives it the addresses of another number."""
    default = (f"192.0.2.{number}", f"2001:db8::{number:x}")
    identity = Node(
        name=f"n{number}",
        role=Role.WORKER,
        public_key=public_key or key(number),
        endpoints=(f"{default[0]}:51820",) if endpoints is None else endpoints,
        addresses=default if addresses is None else addresses,
    )
    return PeerNode(identity, replace(CLUSTER.network(like or number), number=number))


def cluster(*nodes: PeerNode) -> dict[str, PeerNode]:
    return {peer.node.name: peer for peer in nodes}


def test_a_peer_may_send_from_its_overlay_addresses_and_its_containers_and_nothing_else() -> None:
    peers, problems = plan.peers(cluster(node(1), node(2)), "n1", CLUSTER)

    assert problems == ()
    assert peers == {
        key(2): Peer(
            endpoint="192.0.2.2:51820",
            allowed=(
                "10.0.0.2/32",
                "10.0.2.0/24",
                "fd12:3456:789a:2::/64",
                "fd12:3456:789a::2/128",
            ),
            keepalive=25,
        )
    }


def test_of_two_nodes_with_one_key_the_earlier_one_keeps_it() -> None:
    nodes = cluster(node(1), node(3, public_key=key(2)), node(2))

    admitted, (problem,) = plan.admit(nodes, "n1")

    assert set(admitted) == {"n1", "n2"}
    assert problem.about == "node n3"
    assert "public key belongs to node n2 (number 2)" in problem.message


@pytest.mark.parametrize("order", [("n1", "n2", "n3"), ("n3", "n2", "n1")])
def test_the_order_in_which_nodes_are_heard_of_does_not_matter(order: tuple[str, ...]) -> None:
    nodes = cluster(node(1), node(2), node(3, public_key=key(2)))

    admitted, _ = plan.admit({name: nodes[name] for name in order}, "n1")

    assert set(admitted) == {"n1", "n2"}


def test_a_node_with_addresses_of_an_earlier_one_is_refused_and_named() -> None:
    admitted, (problem,) = plan.admit(cluster(node(1), node(2), node(3, like=2)), "n1")

    assert set(admitted) == {"n1", "n2"}
    assert problem.about == "node n3"
    assert "10.0.0.2/32 belongs to node n2" in problem.message


def test_a_subnet_inside_the_subnet_of_another_node_is_refused() -> None:
    part = node(3)
    part = part._replace(network=replace(part.network, subnets=("10.0.2.128/25", "fd00:9::/64")))

    admitted, (problem,) = plan.admit(cluster(node(1), node(2), part), "n1")

    assert set(admitted) == {"n1", "n2"}
    assert "10.0.2.128/25 belongs to node n2" in problem.message


def test_a_node_never_gives_up_itself_and_learns_that_it_is_the_one_to_change() -> None:
    admitted, (problem,) = plan.admit(cluster(node(1), node(2, public_key=key(1))), "n2")

    assert set(admitted) == {"n2"}
    assert problem.about == "node n2"


def test_the_first_endpoint_that_this_node_can_use_is_taken() -> None:
    own = node(1, addresses=("192.0.2.1", "10.0.2.15"))
    other = node(
        2,
        endpoints=(
            "10.0.0.7:51820",  # in the overlay
            "[2001:db8::2]:51820",  # this node has no IPv6
            "127.0.0.1:51820",
            "10.0.2.15:51820",  # every Vagrant machine is 10.0.2.15
            "198.51.100.2:4000",
            "198.51.100.3:4000",
        ),
    )

    peers, problems = plan.peers(cluster(own, other), "n1", CLUSTER)

    assert peers[key(2)].endpoint == "198.51.100.2:4000"
    assert problems == ()


@pytest.mark.parametrize(
    ("endpoint", "fault"),
    [
        ("10.0.5.1:51820", "inside the mesh"),
        ("10.1.0.1:51820", "inside the mesh"),
        ("[fd12:3456:789a::9]:51820", "inside the mesh"),
        ("[fe80::1]:51820", "not reachable"),
        ("0.0.0.0:51820", "not reachable"),
        ("[2001:db8::2]:51820", "IPv6"),
        ("192.0.2.1:51820", "this node itself"),
    ],
)
def test_a_node_without_a_usable_endpoint_is_awaited_and_reported(
    endpoint: str, fault: str
) -> None:
    own, other = node(1, addresses=("192.0.2.1",)), node(2, endpoints=(endpoint,))

    peers, (problem,) = plan.peers(cluster(own, other), "n1", CLUSTER)

    assert peers[key(2)].endpoint is None
    assert problem.about == "node n2"
    assert fault in problem.message
    assert endpoint in problem.message


def test_four_thousand_nodes_are_admitted_in_one_go() -> None:
    big = Cluster(
        id="big",
        prefix6=CLUSTER.prefix6,
        overlay4="10.16.0.0/20",
        containers4="10.0.0.0/12",
        vips4="10.32.0.0/16",
    )
    nodes = {
        f"n{number}": PeerNode(node(1, public_key=key(number)).node, big.network(number))
        for number in range(1, 4000)
    }

    admitted, problems = plan.admit(nodes, "n7")

    assert (len(admitted), problems) == (3999, ())


A = Peer("192.0.2.2:51820", ("10.0.0.2/32", "10.0.2.0/24"), 25)


def test_the_endpoint_of_a_living_session_is_left_alone() -> None:
    roamed = {key(2): replace(A, endpoint="203.0.113.9:1234")}

    assert not plan.changes(roamed, {key(2): A}, live=frozenset({key(2)}))
    assert plan.changes(roamed, {key(2): A}, live=frozenset()).add == {key(2): A}


def test_an_endpoint_learnt_from_the_peer_is_kept_when_none_is_known() -> None:
    learnt = {key(2): A}

    assert not plan.changes(learnt, {key(2): replace(A, endpoint=None)}, live=frozenset())


def test_a_session_lives_for_three_minutes_after_its_handshake() -> None:
    assert plan.Session(1000, 0, 0).is_live(1179)
    assert not plan.Session(1000, 0, 0).is_live(1180)
    assert not plan.Session(0, 0, 0).is_live(1180)


def test_removals_are_said_first_so_that_no_address_is_taken_from_a_peer_that_stays() -> None:
    words = conf.arguments(Delta({key(3): A}, {key(2): A}))

    assert words == [
        "peer", key(3), "remove",
        "peer", key(2), "endpoint", "192.0.2.2:51820", "persistent-keepalive", "25",
        "allowed-ips", "10.0.0.2/32,10.0.2.0/24",
    ]  # fmt: skip


def test_of_a_peer_that_stays_only_the_difference_is_said() -> None:
    moved = replace(A, endpoint="192.0.2.9:51820")

    words = conf.arguments(Delta({key(2): A}, {key(2): moved}))

    assert words == ["peer", key(2), "endpoint", "192.0.2.9:51820"]


def test_a_dump_is_read_without_its_secret() -> None:
    dump = (
        "SECRET\tPUBLIC\t51820\toff\n"
        "P2\t(none)\t192.0.2.2:51820\t10.0.2.0/24,10.0.0.2/32\t1700000000\t10\t20\t25\n"
        "P3\t(none)\t(none)\t(none)\t0\t0\t0\toff\n"
    )

    interface = conf.parse(dump)

    assert (interface.public_key, interface.port) == ("PUBLIC", 51820)
    assert interface.peers == {"P2": A, "P3": Peer(None, (), 0)}
    assert interface.live(1700000100) == {"P2"}
    assert "SECRET" not in repr(interface)


def test_a_new_device_has_no_key_yet() -> None:
    assert conf.parse("(none)\t(none)\t60504\toff\n").public_key is None

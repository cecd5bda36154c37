"""Walking packets through the program: who answers, with which probability, and why not.

Node n1 of three: 192.0.2.1, overlay 10.0.0.1, containers 10.0.1.0/24.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import TYPE_CHECKING

import pytest

from mesh.model.address import FAMILIES, Family, packed
from mesh.model.publish import Protocol
from mesh.model.service import Affinity, Source
from mesh.rules import (
    elements,
    guards,
    jhash,
    marks,
    nft,
    program,
    trace,
    trace_program,
    trace_rule,
    trace_sets,
    trace_show,
    trace_words,
    xtables,
)
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.guards import Door, Grant, Guard, Guards, Numbers
from mesh.rules.ids import Ids
from mesh.rules.trace import Entry, Packet, Path, Place, Verdict
from tests.support import rules
from tests.support.layouts import ALL

if TYPE_CHECKING:
    from mesh.rules.marks import Layout

TCP, UDP = Protocol.TCP, Protocol.UDP
CLIENT, NODE, OTHER_NODE = "203.0.113.9", "192.0.2.1", "192.0.2.2"
LOCAL, SIBLING, REMOTE = "10.0.1.5", "10.0.1.6", "10.0.2.5"
VIP, PEER_MAC = "10.1.0.1", rules.CLUSTER.network(2).mac
ANYONE = (Backend(LOCAL, 80), Backend(REMOTE, 80))
INGRESS = Frontend(Scope.INGRESS, None, TCP, 8080)
ON_VIP = Frontend(Scope.VIP, VIP, TCP, 80)


def place(*forwardings: Forwarding, layout: Layout = marks.DEFAULT) -> Place:
    ids = Ids(layout)
    found = nft.lower_nodes((NODE, "2001:db8::1", OTHER_NODE, "10.0.0.1", "10.0.0.2"))
    found |= nft.lower_hairpins((LOCAL, SIBLING)) | nft.lower_peer(rules.CLUSTER.network(2), layout)
    for forwarding in forwardings:
        found |= nft.lower(forwarding, ids)
    return Place(replace(rules.PARAMETERS, layout=layout), found, (NODE, "2001:db8::1"))


WEB = Forwarding("web", (INGRESS, ON_VIP), ANYONE)
SERVICES = (
    WEB,
    Forwarding("none", (Frontend(Scope.INGRESS, None, TCP, 8081),), ()),
    Forwarding(
        "few", (Frontend(Scope.INGRESS, None, TCP, 8082),), ANYONE, allow=("198.51.100.0/24",)
    ),
    Forwarding(
        "masqueraded",
        (Frontend(Scope.INGRESS, None, TCP, 8083),),
        ANYONE,
        source=Source.MASQUERADE,
    ),
    Forwarding("here", (Frontend(Scope.HOST_IP, NODE, TCP, 8080),), (Backend(SIBLING, 81),)),
    Forwarding("own", (Frontend(Scope.HOST_IP, "127.0.0.1", TCP, 9090),), (Backend(SIBLING, 81),)),
    Forwarding("host", (Frontend(Scope.NODE, None, UDP, 53),), (Backend(SIBLING, 53),)),
)
WORLD = place(*SERVICES)
EACH_LAYOUT = pytest.mark.parametrize(
    "world", [place(*SERVICES, layout=layout) for layout in ALL.values()], ids=ALL
)


def syn(source: str, destination: str, port: int, entry: Entry = Entry.OUTSIDE) -> Packet:
    ether = PEER_MAC if entry is Entry.STEERING else ""
    return Packet(source, destination, TCP, port, entry, ether)


@EACH_LAYOUT
@pytest.mark.parametrize(
    ("packet", "answers"),
    [
        # Who asks, and where the replica is, decides how a packet gets there and what it shows.
        (
            syn(CLIENT, "10.0.0.2", 80, Entry.OVERLAY),
            None,
        ),
        (
            syn("10.0.2.9", VIP, 80, Entry.OVERLAY),
            {LOCAL: (Path.LOCAL, "10.0.2.9"), REMOTE: (Path.MASQUERADED, "10.0.0.1")},
        ),
        (
            syn(LOCAL, VIP, 80, Entry.CONTAINER),
            {LOCAL: (Path.HAIRPIN, "10.0.1.1"), REMOTE: (Path.OVERLAY, LOCAL)},
        ),
        (
            syn(SIBLING, OTHER_NODE, 8080, Entry.CONTAINER),
            {LOCAL: (Path.LOCAL, SIBLING), REMOTE: (Path.OVERLAY, SIBLING)},
        ),
        (
            syn(CLIENT, NODE, 8083),
            {LOCAL: (Path.LOCAL, CLIENT), REMOTE: (Path.MASQUERADED, "10.0.0.1")},
        ),
        (
            syn(OTHER_NODE, NODE, 8083),
            {LOCAL: (Path.LOCAL, OTHER_NODE), REMOTE: (Path.MASQUERADED, "10.0.0.1")},
        ),
        (
            syn(NODE, VIP, 80, Entry.NODE),
            {LOCAL: (Path.LOCAL, NODE), REMOTE: (Path.MASQUERADED, "10.0.0.1")},
        ),
        # The host IP wins on its address.
        (syn(CLIENT, NODE, 8080), {SIBLING: (Path.LOCAL, CLIENT)}),
        (
            syn("127.0.0.1", "127.0.0.1", 9090, Entry.NODE),
            {SIBLING: (Path.MASQUERADED, "10.0.1.1")},
        ),
        (Packet(CLIENT, NODE, UDP, 53), {SIBLING: (Path.LOCAL, CLIENT)}),
    ],
)
def test_every_backend_is_told_with_its_way_and_the_source_it_sees(
    world: Place, packet: Packet, answers: dict[str, tuple[Path, str]] | None
) -> None:
    walked = trace.walk(packet, world)

    found = {a.target.address: (a.ending.path, a.ending.seen) for a in walked.answers if a.target}
    assert found == (answers or {})
    share = Fraction(1, max(len(found), 1))
    assert set(walked.backends.values()) <= {share}
    assert walked.verdict is (Verdict.PASSED if answers is None else Verdict.FORWARDED)


def test_a_client_from_outside_is_steered_to_a_remote_replica() -> None:
    world = place(WEB)

    walked = trace.walk(syn(CLIENT, NODE, 8080), world)

    ways = {str(a.target): (a.ending.path, a.ending.seen) for a in walked.answers}
    assert ways == {
        f"{LOCAL}:80": (Path.LOCAL, CLIENT),
        f"{REMOTE}:80": (Path.STEERED, CLIENT),
    }


@pytest.mark.parametrize(
    ("packet", "verdict", "words"),
    [
        (syn(CLIENT, NODE, 8081), Verdict.REFUSED, "no backend"),
        (syn(CLIENT, NODE, 8082), Verdict.DROPPED, "allow list"),
        (syn(CLIENT, NODE, 9), Verdict.PASSED, "nothing of the mesh"),
        (syn(CLIENT, VIP, 80), Verdict.DROPPED, "from outside the mesh"),
        (syn(CLIENT, LOCAL, 80), Verdict.DROPPED, "from outside the mesh"),
        (syn(LOCAL, NODE, 8080), Verdict.DROPPED, "from outside the mesh"),
        (syn(CLIENT, "127.0.0.1", 8080), Verdict.DROPPED, "from outside the mesh"),
        (syn(CLIENT, "127.0.0.1", 9090), Verdict.DROPPED, "from outside the mesh"),
        (syn(SIBLING, "127.0.0.1", 9090, Entry.CONTAINER), Verdict.DROPPED, "its node's subnet"),
        (syn(NODE, NODE, 9090, Entry.NODE), Verdict.PASSED, "nothing of the mesh"),
        (syn(LOCAL, VIP, 81, Entry.CONTAINER), Verdict.REFUSED, "no such port"),
        (syn(LOCAL, "10.1.0.9", 80, Entry.CONTAINER), Verdict.DROPPED, "nobody's VIP"),
        (syn("10.0.2.7", VIP, 80, Entry.CONTAINER), Verdict.DROPPED, "its node's subnet"),
        (syn(NODE, "127.0.0.1", 8080, Entry.NODE), Verdict.PASSED, "nothing of the mesh"),
        (syn(CLIENT, LOCAL, 80, Entry.STEERING), Verdict.PASSED, ""),
        (syn(REMOTE, LOCAL, 80, Entry.STEERING), Verdict.DROPPED, "only clients outside"),
        (syn(CLIENT, NODE, 80, Entry.STEERING), Verdict.DROPPED, "only clients outside"),
        (
            syn(CLIENT, LOCAL, 80, Entry.STEERING)._replace(ether="02:00:00:00:00:09"),
            Verdict.DROPPED,
            "unknown peer",
        ),
        (Packet(LOCAL, NODE, UDP, 4790, Entry.CONTAINER), Verdict.DROPPED, "for nodes only"),
        (Packet("10.0.2.7", "10.0.0.1", UDP, 4790, Entry.OVERLAY), Verdict.DROPPED, "only nodes"),
        (Packet("10.0.0.2", "10.0.0.1", UDP, 4790, Entry.OVERLAY), Verdict.PASSED, ""),
    ],
)
@EACH_LAYOUT
def test_what_reaches_nobody_is_told_why(
    world: Place, packet: Packet, verdict: Verdict, words: str
) -> None:
    walked = trace.walk(packet, world)

    assert (walked.verdict, walked.backends) == (verdict, {})
    assert words in walked.ending.reason


def test_what_came_through_another_node_keeps_its_mark() -> None:
    walked = trace.walk(syn(CLIENT, LOCAL, 80, Entry.STEERING), WORLD)

    (arrival,) = [step for step in walked.steps if step.where == "from_steer"]
    assert "ct mark = 0x230000" in arrival.outcome
    assert (walked.ending.path, walked.ending.seen) == (Path.LOCAL, CLIENT)


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (200, 99), (255, 1)])
def test_probabilities_are_exact(weights: tuple[int, int]) -> None:
    pool = tuple(Backend(b.address, 80, w) for b, w in zip(ANYONE, weights, strict=True))

    walked = trace.walk(syn(CLIENT, NODE, 8080), place(Forwarding("web", (INGRESS,), pool)))

    total = sum(weights)
    assert walked.backends == {
        f"{LOCAL}:80": Fraction(weights[0], total),
        f"{REMOTE}:80": Fraction(weights[1], total),
    }
    assert dict(walked.pool) == {
        trace_sets.Target(b.address, 80): Fraction(b.weight, total) for b in pool
    }


def test_an_affine_client_has_one_backend_and_the_pool_all_clients() -> None:
    world = place(Forwarding("web", (INGRESS,), ANYONE, affinity=Affinity.CLIENT_IP))
    clients = [f"203.0.113.{number}" for number in range(1, 60)]

    walks = [trace.walk(syn(client, NODE, 8080), world) for client in clients]

    assert {walked.answers[0].probability for walked in walks} == {Fraction(1)}
    assert {len(walked.answers) for walked in walks} == {1}
    assert {a for walked in walks for a in walked.backends} == {f"{LOCAL}:80", f"{REMOTE}:80"}
    assert sum(share for _, share in walks[0].pool) == 1


@pytest.mark.parametrize(
    ("client", "expected"), [("192.0.2.10", 0x4315F5AA), ("2001:db8::10", 0x36611328)]
)
def test_the_hash_is_the_kernels(client: str, expected: int) -> None:
    # From linux/jhash.h, transcribed; tests/netns/test_trace_packets.py asks the kernel itself.
    assert jhash.jhash(packed(client), 0x6D657368) == expected


def test_a_slot_without_a_target_is_dropped_as_often_as_it_is_drawn() -> None:
    world = place(WEB)
    gone = next(key for key in world.elements if key[0] == "targets4")
    held = {key: data for key, data in world.elements.items() if key != gone}

    walked = trace.walk(syn(CLIENT, NODE, 8080), Place(rules.PARAMETERS, held, world.addresses))

    lost = [answer for answer in walked.answers if answer.target is None]
    assert [(a.probability, a.ending.verdict) for a in lost] == [(Fraction(1, 2), Verdict.DROPPED)]
    assert "never answer with RST" in lost[0].ending.reason
    assert sum(walked.backends.values()) == Fraction(1, 2)


@pytest.mark.parametrize(
    ("packet", "words"),
    [
        (syn(CLIENT, "2001:db8::1", 80), "two families"),
        (syn(CLIENT, NODE, 80, Entry.NODE), "not an address of the node"),
        (syn(CLIENT, NODE, 80, Entry.STEERING)._replace(ether=""), "say which"),
    ],
)
def test_a_packet_that_cannot_be_is_refused(packet: Packet, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trace.walk(packet, WORLD)


def test_every_rule_of_the_program_can_be_read() -> None:
    loaded = trace_program.load(program.build(rules.PARAMETERS).inet)
    sets = trace_sets.Sets(WORLD.elements, loaded)
    devices = ("lo", "eth0", *rules.DEVICES[:3])
    hosts = {Family.V4: (CLIENT, LOCAL, VIP), Family.V6: ("2001:db8::9", "fd11:2233:4455:1::5")}

    for family, protocol, device in product(FAMILIES, Protocol, devices):
        for source, destination in product(hosts[family], repeat=2):
            flow = trace_rule.Flow(
                family,
                packed(source),
                packed(destination),
                protocol.number,
                80,
                iif=device,
                oif=device,
                ether=elements.ether_bytes(PEER_MAC),
            )
            for rule in (rule for chain in loaded.chains.values() for rule in chain):
                trace_rule.read(rule, flow, sets)

    assert {base.hook for base in loaded.bases} >= {"prerouting", "forward", "postrouting"}
    assert sum(map(len, loaded.chains.values())) > 300


def test_every_chain_has_one_of_iptables_that_does_the_same() -> None:
    loaded = trace_program.load(program.build(rules.PARAMETERS).inet)
    flow = trace_rule.Flow(Family.V4, b"", b"", 6, 80, by_iptables=True)
    there = {
        name
        for family in FAMILIES
        for table in xtables.program(rules.PARAMETERS, family).values()
        for name in table.chains
    } | {name for roots in xtables.ROOTS.values() for name in roots}
    pools = {name for name in loaded.chains if name.startswith(("random_", "hash_", "allowed"))}

    told = {name: trace_words.chain(name, flow) for name in loaded.chains}

    assert {told[name] for name in pools} == {"MESH-P-00000"}
    assert {told[name] for name in told.keys() - pools} <= there


def test_the_shares_of_an_affine_pool_are_those_of_the_backends_own_hash() -> None:
    pool = tuple(Backend(f"10.0.1.{n}", 80) for n in range(1, 4))
    world = place(Forwarding("web", (INGRESS,), pool, affinity=Affinity.CLIENT_IP))
    shares = {
        backend: dict(trace.walk(syn(CLIENT, NODE, 8080), replace(world, backend=backend)).pool)
        for backend in ("nftables", "iptables-nft")
    }
    slots = Counter(v for (name, _), v in world.elements.items() if name == "targets4")

    for address, share in shares["nftables"].items():
        assert address is not None
        key = packed(address.address) + elements.port_bytes(80)
        assert share == Fraction(slots[key], 251)
        # 256 cells for 251 slots: not quite the same, but hardly otherwise.
        assert float(shares["iptables-nft"][address]) == pytest.approx(float(share), rel=0.1)
    assert {sum(each.values()) for each in shares.values()} == {1}
    assert shares["nftables"] != shares["iptables-nft"]


def test_a_walk_can_be_shown_and_sent() -> None:
    walked = trace.walk(syn(LOCAL, VIP, 80, Entry.CONTAINER), WORLD)

    document = json.loads(json.dumps(trace_show.document(walked)))
    shown = "\n".join(trace_show.lines(walked))

    assert document["verdict"] == "forwarded"
    assert [(b["address"], b["probability"]) for b in document["backends"]] == [
        (LOCAL, "1/2"),
        (REMOTE, "1/2"),
    ]
    assert {step["where"] for step in document["steps"]} >= {"services", "dispatch"}
    assert f"VIP {VIP} . tcp . 80" in shown
    assert "hairpin" in shown


@pytest.mark.parametrize(
    ("packet", "held", "verdict"),
    [
        (Packet(CLIENT, NODE, TCP, 8080), 2, Verdict.FORWARDED),
        (Packet(CLIENT, NODE, TCP, 8080), 3, Verdict.REFUSED),
        (Packet("2001:db8:9::1", "2001:db8::1", TCP, 8080), 3, Verdict.REFUSED),
        (Packet("fd11:2233:4455:1::5", "2001:db8::1", TCP, 8080, Entry.CONTAINER), 3,
         Verdict.REFUSED),
        (Packet("2001:db8:9::1", "2001:db8::1", TCP, 8080), 2, Verdict.FORWARDED),
        (Packet(LOCAL, VIP, TCP, 81, Entry.CONTAINER), 3, Verdict.FORWARDED),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])
def test_a_limit_of_connections_is_told_as_the_reason(
    packet: Packet, held: int, verdict: Verdict, backend: str
) -> None:
    both = (*ANYONE, Backend("fd11:2233:4455:1::5", 80))
    other = Frontend(Scope.VIP, VIP, TCP, 81)
    limited = place(
        Forwarding("web/80/tcp", (INGRESS,), both, limit=3),
        Forwarding("other/80/tcp", (other,), both, limit=10),
    )

    found = trace.walk(packet, replace(limited, held={1: held}, backend=backend))

    assert found.verdict is verdict
    if verdict is Verdict.REFUSED:
        assert "as many connections here as the service lets it have" in found.ending.reason
        assert "connections that the client has 3 of 3" in {step.what for step in found.steps}
        chain = "MESH-L-00001" if backend != "nftables" else "connlimit_3"
        assert chain in {step.where for step in found.steps}


def test_a_policy_is_told_as_the_reason() -> None:
    door = Door(TCP, 80, 80, "grant")
    guarded = Guards(
        (Guard("guard", (LOCAL, SIBLING), (door,)),), (Grant("grant", (), ("10.0.2.9",)),)
    )
    held = {**WORLD.elements, **guards.lower(guarded, Numbers())}
    world = replace(WORLD, elements=held)

    friend = trace.walk(syn("10.0.2.9", LOCAL, 80, Entry.OVERLAY), world)
    stranger = trace.walk(syn("10.0.2.8", LOCAL, 80, Entry.OVERLAY), world)
    elsewhere = trace.walk(syn("10.0.2.9", LOCAL, 81, Entry.OVERLAY), world)
    answers = trace.walk(syn("10.0.2.8", VIP, 80, Entry.OVERLAY), world).answers

    assert friend.verdict is Verdict.PASSED
    assert (stranger.verdict, elsewhere.verdict) == (Verdict.REFUSED, Verdict.REFUSED)
    assert "lets this source connect" in stranger.ending.reason
    assert "none opens this port" in elsewhere.ending.reason
    assert "source that it lets in 10.0.2.0/28" in {step.what for step in stranger.steps}
    assert {str(a.target): a.ending.verdict for a in answers} == {
        f"{LOCAL}:80": Verdict.REFUSED,
        f"{REMOTE}:80": Verdict.FORWARDED,
    }

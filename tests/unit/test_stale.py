"""Which UDP flows a change leaves stranded, and which it does not touch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from msgspec import structs

from mesh.delta import Delta
from mesh.model import address
from mesh.model.publish import Protocol
from mesh.model.service import Affinity
from mesh.rules import marks, nft, stale
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.ids import Ids
from mesh.rules.stale import Flow

if TYPE_CHECKING:
    from mesh.rules.elements import Elements
    from mesh.rules.stale import Endpoint, Stale

UDP, TCP = Protocol.UDP, Protocol.TCP
PORT = Frontend(Scope.INGRESS, None, UDP, 30053)
VIP = Frontend(Scope.VIP, "10.1.0.1", UDP, 53)
VIP6 = Frontend(Scope.VIP, "fd00::1", UDP, 53)
POOL = tuple(Backend(f"{net}{n}", 53) for net in ("10.0.1.", "fd00:1::") for n in (1, 2, 3))
WEB = Forwarding("web/53/udp", (PORT, VIP, VIP6), POOL)
OTHER = Forwarding("other/53/udp", (Frontend(Scope.INGRESS, None, UDP, 30054),), POOL)


class Node:
    """What a node's kernel holds; each change tells what is to be forgotten."""

    def __init__(self, *forwardings: Forwarding) -> None:
        self.ids = Ids()
        self.now: Elements = {}
        self.change(*forwardings)

    def change(self, *forwardings: Forwarding) -> tuple[Stale, ...]:
        wanted: Elements = {}
        for forwarding in forwardings:
            wanted |= nft.lower(forwarding, self.ids)
        delta, self.now = Delta.between(self.now, wanted), wanted
        return stale.after(delta, lambda _: self.now, marks.DEFAULT)

    def flow(
        self, key: str, backend: str = "10.0.1.1", destination: str = "192.0.2.1:30053"
    ) -> Flow:
        """A flow of a pool, as the first packet was dispatched."""
        mark = marks.DEFAULT.frontend(self.ids.of(key), 3)
        there, answers = _end(destination), (address.packed(backend), 53)
        return Flow(mark, UDP.number, _end("192.0.2.9:5353"), there, answers, False, b"")


def _end(text: str) -> Endpoint:
    host, _, port = text.rpartition(":")
    return address.packed(host), int(port)


def without(forwarding: Forwarding, *addresses: str) -> Forwarding:
    left = tuple(b for b in forwarding.backends if b.address not in addresses)
    return forwarding._replace(backends=left)


def forgotten(flows: list[Flow], wanted: tuple[Stale, ...]) -> list[Flow]:
    return list(stale.chosen(flows, wanted))


def test_flows_of_a_backend_that_left_are_stale_and_no_others() -> None:
    node = Node(WEB, OTHER)
    gone = [node.flow(WEB.key, "10.0.1.1"), node.flow(WEB.key, "10.0.1.1", "10.1.0.1:53")]
    kept = [
        node.flow(WEB.key, "10.0.1.2"),
        node.flow(WEB.key, "fd00:1::1"),
        node.flow(OTHER.key, "10.0.1.1"),
        gone[0]._replace(protocol=TCP.number),
        gone[0]._replace(backend=(gone[0].backend[0], 54)),
        gone[0]._replace(mark=marks.DEFAULT.arrival(gone[0].mark >> 20)),
        gone[0]._replace(mark=0),
    ]

    wanted = node.change(without(WEB, "10.0.1.1"), OTHER)

    assert forgotten([*gone, *kept], wanted) == gone


@pytest.mark.parametrize(
    "changed",
    [
        WEB._replace(backends=(*POOL, Backend("10.0.1.4", 53))),
        WEB._replace(backends=tuple(structs.replace(b, weight=i + 1) for i, b in enumerate(POOL))),
        WEB._replace(affinity=Affinity.CLIENT_IP),
        WEB._replace(allow=("192.0.2.0/24",)),
    ],
    ids=["grown", "weighted", "affine", "limited"],
)
def test_nothing_is_forgotten_while_every_backend_stays(changed: Forwarding) -> None:
    assert Node(WEB).change(changed) == ()


def test_a_backend_that_loses_some_of_its_slots_keeps_its_flows() -> None:
    pool = (Backend("10.0.1.1", 53, weight=3), Backend("10.0.1.2", 53, weight=1))
    node = Node(WEB._replace(backends=pool, affinity=Affinity.CLIENT_IP))

    more = (*pool, Backend("10.0.1.3", 53))
    wanted = node.change(WEB._replace(backends=more, affinity=Affinity.CLIENT_IP))

    assert wanted == ()


def test_a_service_without_backends_loses_all_its_flows_at_once() -> None:
    node = Node(WEB, OTHER)
    flows = [node.flow(WEB.key, b.address) for b in POOL]

    wanted = node.change(WEB._replace(backends=()), OTHER)

    assert len(wanted) == 1
    assert forgotten([*flows, node.flow(OTHER.key)], wanted) == flows


def test_a_family_without_backends_loses_only_its_own_flows() -> None:
    node = Node(WEB)
    flows = [node.flow(WEB.key, b.address) for b in POOL]

    wanted = node.change(without(WEB, "10.0.1.1", "10.0.1.2", "10.0.1.3"))

    assert forgotten(flows, wanted) == flows[:3]


def test_a_service_that_is_removed_loses_all_its_flows_at_once() -> None:
    node = Node(WEB, OTHER)
    flows = [node.flow(WEB.key, b.address) for b in POOL]

    wanted = node.change(OTHER)

    assert len(wanted) == 1
    assert forgotten([*flows, node.flow(OTHER.key)], wanted) == flows


def test_a_port_that_is_not_published_any_more_loses_its_flows() -> None:
    node = Node(WEB)
    flows = [
        node.flow(WEB.key, destination="192.0.2.1:30053"),
        node.flow(WEB.key, destination="10.1.0.1:53"),
    ]

    wanted = node.change(WEB._replace(frontends=(VIP, VIP6)))

    assert forgotten(flows, wanted) == flows[:1]


def test_a_port_that_now_belongs_to_another_service_loses_its_flows() -> None:
    node = Node(WEB)
    flows = [node.flow(WEB.key), node.flow(WEB.key, destination="10.1.0.1:53")]

    heir = OTHER._replace(frontends=(PORT,))
    wanted = node.change(WEB._replace(frontends=(VIP, VIP6)), heir)

    assert forgotten(flows, wanted) == flows[:1]


def test_a_tcp_service_is_left_to_drain() -> None:
    web = WEB._replace(frontends=tuple(structs.replace(each, protocol=TCP) for each in (PORT, VIP)))
    node = Node(web)

    assert node.change(without(web, "10.0.1.1")) == ()
    assert node.change(web._replace(backends=())) == ()
    assert node.change() == ()


@pytest.mark.parametrize(("frontend", "other"), [(PORT, "10.1.0.1:30054"), (VIP, "10.1.0.2:53")])
def test_flows_that_began_before_their_port_was_published_are_forgotten(
    frontend: Frontend, other: str
) -> None:
    node = Node(OTHER)
    there = f"{frontend.address or '192.0.2.1'}:{frontend.port}"
    bare = node.flow("", destination=there)._replace(mark=0, bare=True)
    from_container = bare._replace(mark=0x90000)
    kept = [
        bare._replace(bare=False),
        bare._replace(protocol=TCP.number),
        bare._replace(mark=0x1234),
        bare._replace(destination=_end(other)),
    ]

    wanted = node.change(OTHER, WEB._replace(frontends=(frontend,)))

    assert forgotten([bare, from_container, *kept], wanted) == [bare, from_container]


def test_backends_for_a_port_that_refused_forget_nothing() -> None:
    node = Node(WEB._replace(backends=()))

    assert node.change(WEB) == ()


def test_a_pass_over_all_flows_finds_those_that_nothing_serves() -> None:
    node = Node(WEB, OTHER)
    node.change(without(WEB, "10.0.1.1"), OTHER)
    served = [
        node.flow(WEB.key, "10.0.1.2"),
        node.flow(WEB.key, "10.0.1.2", "10.1.0.1:53"),
        node.flow(OTHER.key, "10.0.1.1", "192.0.2.1:30054"),
    ]
    not_ours = [
        served[0]._replace(mark=0),
        served[0]._replace(mark=0x90000),
        served[0]._replace(mark=marks.DEFAULT.arrival(7)),
        node.flow(WEB.key, "10.0.1.1")._replace(protocol=TCP.number),
    ]
    lost = [
        node.flow(WEB.key, "10.0.1.1"),
        node.flow(WEB.key, "10.0.1.2", "192.0.2.1:30054"),
        node.flow(WEB.key, "10.0.1.2", "10.1.0.2:53"),
        node.flow("a service that is gone", "10.0.1.2"),
    ]

    assert list(stale.among([*served, *not_ours, *lost], lambda _: node.now, marks.DEFAULT)) == lost


def test_an_id_tells_whose_it_is_until_it_is_free() -> None:
    ids = Ids()
    number = ids.of("web/53/udp")

    assert ids.key(number) == "web/53/udp"
    ids.release("web/53/udp")
    assert ids.key(number) is None

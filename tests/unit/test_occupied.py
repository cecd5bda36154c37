"""Who has a port of a node first: processes that listen, tasks, services in ingress mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mesh.hostports.occupied import Occupied
from mesh.model import listener
from mesh.model.listener import Binding, Listener
from mesh.model.publish import Protocol, PublishMode
from mesh.model.service import ServiceSpec
from mesh.model.view import IngressPort
from tests.support.hostports import Node, port

if TYPE_CHECKING:
    from mesh.model.publish import PublishedPort

TCP, UDP, _ = Protocol


def nginx(number: int, address: str = "", protocol: Protocol = TCP) -> Listener:
    return Listener(protocol=protocol, port=number, address=address, process="nginx", pid=812)


def listen(node: Node, *listeners: Listener, busy: frozenset[listener.Port] = frozenset()) -> None:
    node.ports.observe(listener.by_port(listeners), busy)
    node.settle()


def in_force(node: Node, service: str) -> None:
    """What the agent tells once the kernel has it."""
    bindings = (
        Binding(claim.protocol, claim.published, claim.address)
        for claim in node.ports.granted(service)
    )
    node.ports.occupied.put_in_force(service, frozenset(bindings))


@pytest.mark.parametrize(
    ("address", "published", "meets"),
    [
        ("", None, True),
        ("", "192.0.2.1", True),
        ("0.0.0.0", None, True),
        ("0.0.0.0", "192.0.2.1", True),
        ("0.0.0.0", "2001:db8::1", False),
        ("::", "192.0.2.1", False),
        ("::", "2001:db8::1", True),
        ("192.0.2.1", None, True),
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("127.0.0.53", None, False),
        ("127.0.0.53", "127.0.0.53", True),
        ("::1", None, False),
        ("fe80::1", None, True),
    ],
)
def test_a_listener_matters_to_those_addresses_that_are_its_own(
    address: str, published: str | None, meets: bool
) -> None:
    assert nginx(80, address).meets(published) is meets


def test_a_fixed_port_is_refused_while_somebody_listens_there() -> None:
    node = Node()
    node.publish("web", port(80, 8080), tasks=["w-1"])
    listen(node, nginx(8080))
    during, told = node.numbers("web"), node.problems()
    listen(node)

    assert during == {}
    assert told == [
        "task w-1 of service web: port 8080/tcp on node n1 is used by nginx (pid 812): stop it, "
        "choose another port, or publish with --force"
    ]
    assert node.numbers("web") == {("w-1", 80): 8080}
    assert node.problems() == []


def test_listeners_of_the_loopback_and_of_other_protocols_keep_nobody_from_a_port() -> None:
    node = Node()
    node.publish("dns", port(53, 53, protocol=UDP), tasks=["d-1"])

    listen(node, nginx(53, "127.0.0.53", UDP), nginx(53))

    assert node.numbers("dns") == {("d-1", 53): 53}
    assert node.problems() == []


def test_who_publishes_by_force_gets_the_port() -> None:
    node = Node()
    node.publish("web", port(80, 8080, force=True), tasks=["w-1"])

    listen(node, nginx(8080))

    assert node.numbers("web") == {("w-1", 80): 8080}
    assert node.problems() == []


def test_a_port_in_force_is_not_given_up_to_who_listens_later() -> None:
    node = Node()
    node.publish("web", port(80, 8080), port(81), tasks=["w-1"])
    node.settle()
    before = node.numbers("web")
    in_force(node, "web")

    listen(node, nginx(8080), nginx(32000))

    assert node.numbers("web") == before
    assert [text.partition(":")[0] for text in node.problems()] == ["service web"] * 2
    assert "nginx (pid 812) listens on port 8080/tcp of node n1" in node.problems()[0]


def test_a_port_that_was_in_force_is_lost_with_its_service() -> None:
    node = Node()
    node.publish("web", port(80, 8080), tasks=["w-1"])
    in_force(node, "web")
    listen(node, nginx(8080))
    node.end("web", "w-1")
    in_force(node, "web")

    node.publish("other", port(80, 8080), tasks=["o-1"])
    node.settle()

    assert node.numbers("other") == {}
    assert "used by nginx" in node.problems()[0]


def test_dynamic_ports_skip_listeners_even_those_of_the_loopback() -> None:
    node = Node()
    listen(node, nginx(32000), nginx(32001, "127.0.0.1"))
    node.publish("web", port(80), tasks=["w-1"])

    node.settle()

    assert node.numbers("web") == {("w-1", 80): 32002}


def test_a_number_that_cannot_be_bound_is_replaced() -> None:
    node = Node()
    node.publish("web", port(80), tasks=["w-1"])
    node.settle()

    listen(node, busy=frozenset(((TCP, 32000),)))

    assert node.numbers("web") == {("w-1", 80): 32001}


def test_a_recorded_number_that_somebody_has_by_now_is_not_adopted() -> None:
    node = Node()
    node.publish("web", port(80), tasks=["w-1"])
    node.settle()
    node.write()
    node.restart()

    listen(node, nginx(32000))

    assert node.numbers("web") == {("w-1", 80): 32001}


def occupied_by(*listeners: Listener, ports: tuple[PublishedPort, ...]) -> Occupied:
    occupied = Occupied("n1")
    occupied.insist("web", ServiceSpec(name="web", ports=ports))
    for one in ports:
        if one.published is not None:
            occupied.reserve((one.protocol, one.published), "web")
    occupied.observe(listener.by_port(listeners), frozenset())
    return occupied


def test_ingress_ports_are_served_where_nobody_listens_and_the_others_told() -> None:
    ports = tuple(port(80, n, mode=PublishMode.INGRESS) for n in (8080, 8081))
    given = (IngressPort(TCP, 8080, 80), IngressPort(TCP, 8081, 80))
    occupied = occupied_by(nginx(8080), ports=ports)

    assert occupied.admitted("web", given) == given[1:]
    (problem,) = occupied.problems()
    assert problem.about == "service web"
    assert problem.message.startswith("port 8080/tcp on node n1 is used by nginx (pid 812)")
    assert problem.message.endswith("other nodes serve it")


def test_forced_ingress_ports_are_served_everywhere() -> None:
    ports = (port(80, 8080, mode=PublishMode.INGRESS, force=True),)
    occupied = occupied_by(nginx(8080), ports=ports)

    assert occupied.admitted("web", (IngressPort(TCP, 8080, 80),))
    assert list(occupied.problems()) == []


def test_only_ports_whose_listeners_changed_are_looked_at_again() -> None:
    occupied = Occupied("n1")
    occupied.observe(listener.by_port((nginx(80), nginx(81))), frozenset(((TCP, 90),)))

    again = occupied.observe(listener.by_port((nginx(80), nginx(81))), frozenset(((TCP, 90),)))
    changed = occupied.observe(listener.by_port((nginx(80), nginx(81, "::"))), frozenset())

    assert again == frozenset()
    assert changed == {(TCP, 81), (TCP, 90)}


def test_owners_are_named_as_far_as_they_are_known() -> None:
    assert nginx(80).owner == "nginx (pid 812)"
    assert Listener(protocol=TCP, port=80, process="the kernel").owner == "the kernel"
    assert Listener(protocol=TCP, port=80).owner == "a process that this agent cannot see"

"""The host ports of a node: dynamic numbers, and ports that are protected."""

from __future__ import annotations

import msgspec
import pytest

from mesh.model.mapping import Cursors
from mesh.model.publish import Protocol, PublishedPort, PublishMode
from tests.support.hostports import CLUSTER, Node, port

TCP, UDP, SCTP = Protocol


# ---- dynamic numbers


def test_dynamic_ports_are_given_in_the_order_of_tasks_and_ports() -> None:
    node = Node()
    node.publish("b", port(80), port(90), tasks=["b-1"])
    node.publish("a", port(80), tasks=["a-1"])

    changed = node.settle()

    assert changed == {"a", "b"}
    assert node.numbers("b") == {("b-1", 80): 32000, ("b-1", 90): 32001}
    assert node.numbers("a") == {("a-1", 80): 32002}


def test_protocols_have_numbers_of_their_own() -> None:
    node = Node()
    node.publish("a", *(port(80, protocol=protocol) for protocol in Protocol), tasks=["a-1"])

    node.settle()

    granted = node.ports.granted("a")
    assert {claim.protocol for claim in granted} == set(Protocol)
    assert {claim.published for claim in granted} == {32000}


def test_a_freed_number_rests_until_the_others_were_used() -> None:
    node = Node()
    node.publish("a", port(), tasks=["a-1"])
    node.settle()
    seen: list[int] = []
    for count in range(2, 6):
        node.end("a", f"a-{count - 1}")
        node.publish("a", port(), tasks=[f"a-{count}"])
        node.settle()
        seen += node.numbers("a").values()

    assert seen == [32001, 32002, 32003, 32000]


def test_a_number_stays_while_its_task_lives() -> None:
    node = Node()
    node.publish("a", port(80), port(90), tasks=["a-1"])
    node.settle()
    before = node.numbers("a")

    node.publish("b", port(), tasks=["b-1"])
    node.drain("a", "a-1")
    node.publish("a", port(90), port(80), port(100, 8100))
    changed = node.settle()

    assert changed == {"b"}
    assert {**before, ("a-1", 100): 8100} == node.numbers("a")


def test_what_is_gone_for_a_moment_keeps_its_number() -> None:
    node = Node()
    node.publish("a", port(), tasks=["a-1"])
    node.publish("b", port(), tasks=["b-1"])
    node.settle()
    services = dict(node.services)

    node.services = {name: ((), []) for name in services}  # etcd lost everything
    for name in services:
        node.tell(name)
    assert node.numbers("b") == {}
    node.services = services
    for name in reversed(services):
        node.tell(name)

    assert node.numbers("b") == {("b-1", 80): 32001}
    assert node.settle() == frozenset()


def test_names_that_come_again_are_another_draw_of_a_random_port() -> None:
    wide = msgspec.structs.replace(CLUSTER, host_ports=(20000, 29999))
    node = Node(wide)
    seen: list[int] = []
    for _ in range(5):
        node.publish("a", port(random=True), tasks=["a-1"])
        node.settle()
        seen += node.numbers("a").values()
        node.end("a", "a-1")
        node.settle()

    assert len(set(seen)) == 5
    assert all(number in range(20000, 30000) for number in seen)
    assert seen != sorted(seen)
    assert node.ports.cursors == Cursors()


def test_numbers_that_ran_out_are_reported_and_given_when_one_is_freed() -> None:
    node = Node()
    node.publish("a", *(port(target) for target in range(80, 84)), tasks=["a-1"])
    node.publish("b", port(), port(protocol=UDP), tasks=["b-1"])
    node.settle()
    problems = node.problems()

    node.publish("a", port(80))
    changed = node.settle()

    assert problems == [
        "task b-1 of service b: all dynamic tcp ports of node n1 (32000-32003) are taken: name a "
        "published port, or widen hostPorts; until then none of the task's 2 ports is published"
    ]
    assert "b" in changed
    assert node.problems() == []
    assert len(node.ports.granted("b")) == 2


def test_numbers_avoid_what_others_name_and_what_is_protected() -> None:
    node = Node(msgspec.structs.replace(CLUSTER, protected_ports=("32001",)))
    node.publish("named", port(80, 32000), tasks=["n-1"])
    node.ports.reserve(TCP, 32002, "web")
    node.publish("a", port(), tasks=["a-1"])

    node.settle()

    assert node.numbers("a") == {("a-1", 80): 32003}


def test_an_ingress_port_displaces_a_number() -> None:
    node = Node()
    node.publish("a", port(), tasks=["a-1"])
    node.settle()

    changed = node.ports.reserve(TCP, 32000, "web")
    between = node.numbers("a")
    node.settle()

    assert "a" in changed
    assert between == {}
    assert node.numbers("a") == {("a-1", 80): 32001}


def test_who_comes_to_name_a_number_in_use_is_refused() -> None:
    node = Node()
    node.publish("old", port(80, 8080), tasks=["o-1"])
    node.publish("a", port(), tasks=["a-1"])
    node.settle()
    node.publish("old", port(80, 32000))
    node.settle()

    assert node.numbers("a") == {("a-1", 80): 32000}
    assert node.problems() == [
        "task o-1 of service old: port 32000/tcp on node n1 belongs to task a-1 of service a: "
        "choose another port or node"
    ]


def test_another_range_moves_only_what_is_outside() -> None:
    node = Node()
    node.publish("a", port(80), port(81), port(82), tasks=["a-1"])
    node.settle()

    changed = node.ports.confine(msgspec.structs.replace(CLUSTER, host_ports=(32002, 32009)))
    node.settle()

    assert changed == {"a"}
    assert node.numbers("a") == {("a-1", 80): 32003, ("a-1", 81): 32004, ("a-1", 82): 32002}


# ---- claims


def test_a_draining_task_hands_its_port_to_its_replacement() -> None:
    node = Node()
    node.publish("a", port(80, 8080), tasks=["a-1", "a-2"])
    before = node.numbers("a")
    node.drain("a", "a-1")

    assert before == {("a-1", 80): 8080}
    assert node.numbers("a") == {("a-2", 80): 8080}


def test_ingress_ports_are_nothing_a_task_claims() -> None:
    node = Node()
    node.publish("a", port(80, 8080, mode=PublishMode.INGRESS), port(81), tasks=["a-1"])
    node.settle()

    assert node.numbers("a") == {("a-1", 81): 32000}


# ---- loopback addresses


@pytest.mark.parametrize(
    "asked",
    [
        port(80, 8080, host_ip="127.0.0.1"),
        port(80, host_ip="127.0.0.1"),
        port(80, 8080, host_ip="::1"),
        port(80, 8080, host_ip="127.1.2.3"),
    ],
    ids=str,
)
@pytest.mark.parametrize("allowed", [False, True])
def test_loopback_addresses_are_published_on_if_the_node_allows_it(
    asked: PublishedPort, allowed: bool
) -> None:
    node = Node(loopback=allowed)
    node.publish("a", asked, tasks=["a-1"])
    node.settle()

    assert bool(node.numbers("a")) is allowed
    told = "\n".join(node.problems())
    assert ("set loopback_ports = true" in told) is not allowed
    assert (f"on {asked.host_ip}," in told) is not allowed


# ---- all or nothing


@pytest.mark.parametrize("taken", [port(80, 8443), port(80, 8443, host_ip="192.0.2.1")])
def test_a_task_gets_all_of_its_ports_or_none(taken: PublishedPort) -> None:
    node = Node()
    node.publish("first", taken, tasks=["f-1"])
    node.publish("a", port(80, 8080), port(443, 8443), port(90), tasks=["a-1"])
    node.settle()

    assert node.numbers("a") == {}
    assert node.problems() == [
        "task a-1 of service a: port 8443/tcp on node n1 belongs to task f-1 of service first: "
        "choose another port or node; until then none of the task's 3 ports is published"
    ]
    node.end("first", "f-1")
    assert node.numbers("a") == {("a-1", 80): 8080, ("a-1", 443): 8443, ("a-1", 90): 32000}
    assert node.problems() == []


def test_what_a_task_does_not_get_is_there_for_others() -> None:
    node = Node()
    node.publish("first", port(80, 8443), tasks=["f-1"])
    node.publish("a", port(80, 8080), port(443, 8443), tasks=["a-1"])
    node.publish("b", port(80, 8080), tasks=["b-1"])

    assert node.numbers("b") == {("b-1", 80): 8080}


def test_the_next_task_is_decided_by_itself() -> None:
    node = Node()
    node.publish("first", port(80, 8443, host_ip="192.0.2.1"), tasks=["f-1"])
    node.publish("a", port(80), port(443, 8443), tasks=["a-1"])
    node.publish("c", port(80), tasks=["c-1", "c-2"])
    node.settle()

    assert node.numbers("c") == {("c-1", 80): 32001, ("c-2", 80): 32002}
    assert node.numbers("a") == {}


def test_many_ports_in_the_way_are_one_problem() -> None:
    node = Node()
    wide = [port(80, number) for number in range(8000, 8100)]
    node.publish("first", *wide[40:], tasks=["f-1"])
    node.publish("a", *wide, tasks=["a-1"])

    (problem,) = node.problems()
    assert "port 8040/tcp on node n1 belongs to task f-1" in problem
    assert "service first (59 more not free): choose" in problem


def test_numbers_are_given_to_a_task_as_a_whole() -> None:
    node = Node()
    node.publish("a", *(port(target) for target in range(80, 85)), tasks=["a-1"])
    node.publish("b", *(port(target) for target in range(80, 83)), tasks=["b-1"])
    node.settle()

    assert node.numbers("a") == {}
    assert sorted(node.numbers("b").values()) == [32000, 32001, 32002]
    assert len(node.problems()) == 1


def test_tasks_that_lack_numbers_do_not_keep_each_other_from_them() -> None:
    node = Node()
    node.publish("a", port(80), port(81), tasks=["a-1"])
    node.publish("b", port(80), port(81), tasks=["b-1"])
    node.settle()
    node.ports.confine(msgspec.structs.replace(CLUSTER, host_ports=(32001, 32002)))

    changed = node.settle()

    assert "a" in changed
    assert node.numbers("a") == {("a-1", 80): 32002, ("a-1", 81): 32001}
    assert node.numbers("b") == {}


def test_a_replacement_that_lacks_a_port_leaves_all_to_its_predecessor() -> None:
    node = Node()
    node.publish("other", port(80, 8443, host_ip="192.0.2.1"), tasks=["o-1"])
    node.publish("a", port(80, 8080), tasks=["a-1"])
    node.publish("b", port(80, 8080), port(443, 8443), tasks=["b-1"])
    node.drain("a", "a-1")
    kept = node.numbers("a")

    node.end("other", "o-1")

    assert kept == {("a-1", 80): 8080}
    assert node.numbers("a") == {}
    assert node.numbers("b") == {("b-1", 80): 8080, ("b-1", 443): 8443}


# ---- protected ports


@pytest.mark.parametrize(
    ("asked", "granted", "reason"),
    [
        (port(22, 22), False, "is protected (22/tcp in the cluster's protectedPorts)"),
        (port(22, 22, force=True), True, ""),
        (port(22, 22, protocol=UDP), True, ""),
        (port(80, 2380, host_ip="192.0.2.1"), False, "is protected (2379-2380/tcp"),
        (port(80, 51820, protocol=UDP), False, "carries the overlay itself"),
        (port(80, 4790, protocol=UDP, force=True), False, "carries the overlay itself"),
        (port(80, 4790, protocol=SCTP), True, ""),
    ],
)
def test_protected_ports_are_refused_with_the_reason(
    asked: PublishedPort, granted: bool, reason: str
) -> None:
    node = Node()
    node.publish("a", asked, port(81, 8081), tasks=["a-1"])
    node.settle()

    assert (("a-1", asked.target) in node.numbers("a")) is granted
    assert (("a-1", 81) in node.numbers("a")) is granted
    told = "\n".join(node.problems())
    assert bool(told) is not granted
    assert reason in told
    if reason:
        assert f"port {asked.published}/{asked.protocol.value} on node n1" in told


def test_a_port_that_becomes_protected_is_taken_back() -> None:
    node = Node()
    node.publish("a", port(80, 8080), tasks=["a-1"])

    changed = node.ports.confine(msgspec.structs.replace(CLUSTER, protected_ports=("8000-9000",)))

    assert changed == {"a"}
    assert node.numbers("a") == {}
    assert node.ports.confine(CLUSTER) == {"a"}
    assert node.problems() == []

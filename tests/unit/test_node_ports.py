"""The host ports of a node: dynamic numbers, protected ports, and what is written down."""

from __future__ import annotations

import msgspec
import pytest

from mesh.model.mapping import Cursors, PortMapping
from mesh.model.publish import Protocol, PublishedPort, PublishMode
from tests.support.hostports import CLUSTER, Node, port, task

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

    assert len(problems) == 1
    assert "task b-1 of service b: all dynamic tcp ports of node n1 (32000-32003)" in problems[0]
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


# ---- restarts


def test_a_new_agent_gives_everybody_the_same_number_and_the_next_one_goes_on() -> None:
    node = Node()
    for name in ("a", "b", "c"):
        node.publish(name, port(80), port(80, host_ip="192.0.2.1"), tasks=[f"{name}-1"])
        node.end(name, f"{name}-1")
        node.publish(name, port(80), tasks=[f"{name}-2"])
        node.settle()
    before = {name: node.numbers(name) for name in node.services}
    node.write()

    node.restart()
    node.settle()
    after = {name: node.numbers(name) for name in node.services}
    node.publish("d", port(), tasks=["d-1"])
    node.settle()

    assert after == before
    assert node.ports.unwritten().keys() == {"d-1"}
    assert node.numbers("d") == {("d-1", 80): 32003}


def test_what_ended_while_no_agent_ran_is_free_and_its_record_goes() -> None:
    node = Node()
    node.publish("a", *(port(target) for target in range(80, 84)), tasks=["a-1"])
    node.settle()
    node.write()

    node.services["a"] = (port(90),), [(task("a", "a-2"), 9)]
    node.restart()
    node.settle()

    assert len(node.numbers("a")) == 1
    assert node.ports.unwritten()["a-1"] == ()


def test_who_named_a_number_while_no_agent_ran_is_refused() -> None:
    node = Node()
    node.publish("old", port(80, 8080), tasks=["o-1"])
    node.publish("a", port(80, 32000), port(80), tasks=["a-1"])
    node.settle()
    node.write()
    node.services["old"] = (port(80, 32001),), node.services["old"][1]

    node.restart()
    node.settle()

    assert {claim.published for claim in node.ports.granted("a")} == {32000, 32001}
    assert node.numbers("old") == {}


def test_a_number_that_became_an_ingress_port_while_no_agent_ran_is_exchanged() -> None:
    node = Node()
    node.publish("a", port(), tasks=["a-1"])
    node.settle()
    node.write()

    node.restart()
    node.ports.reserve(TCP, 32000, "web")
    node.settle()

    assert node.numbers("a") == {("a-1", 80): 32001}


def test_a_record_of_a_task_that_ended_is_no_promise_to_the_next_of_its_name() -> None:
    node = Node()
    node.publish("a", port(), tasks=["a-1"])
    node.settle()
    node.write()
    node.services["a"] = (port(),), []
    node.restart()
    node.settle()

    node.publish("a", port(), tasks=["a-1"])
    node.settle()

    assert node.numbers("a") == {("a-1", 80): 32001}


@pytest.mark.parametrize("number", [22, 31999, 32004])
def test_a_record_that_claims_too_much_is_not_believed(number: int) -> None:
    node = Node()
    node.publish("a", port(), tasks=["a-1"])
    node.records["a-1"] = (
        PortMapping(
            host_port=number,
            container_port=80,
            protocol=TCP,
            pod_name="a-1",
            pod_ip="10.0.1.5",
            service="a",
        ),
    )

    node.restart()
    node.settle()

    assert node.numbers("a") == {("a-1", 80): 32000}
    assert node.ports.unwritten().keys() == {"a-1"}


def test_a_record_nobody_can_read_is_written_again() -> None:
    node = Node()
    node.ports.recorded("a-1", None)
    node.ports.recorded("gone", None)
    node.publish("a", port(), tasks=["a-1"])
    node.settle()

    unwritten = node.ports.unwritten()

    assert unwritten["gone"] == ()
    assert [one.host_port for one in unwritten["a-1"]] == [32000]


# ---- records


def test_a_record_is_what_galaxy_reads() -> None:
    node = Node()
    mine = port(19998, 52701, host_ip="192.0.2.7")
    node.publish("loader", mine, port(53, protocol=UDP), tasks=["loader-1"])
    node.settle()

    record = node.ports.unwritten()["loader-1"]

    assert msgspec.json.encode(record) == (
        b'[{"hostPort":52701,"containerPort":19998,"protocol":"tcp","hostIP":"192.0.2.7",'
        b'"podName":"loader-1","podIP":"10.0.1.5","service":"loader"},'
        b'{"hostPort":32000,"containerPort":53,"protocol":"udp",'
        b'"podName":"loader-1","podIP":"10.0.1.5","service":"loader"}]'
    )


def test_what_galaxy_wrote_is_read_whatever_the_case() -> None:
    written = (
        b'[{"hostPort":52701,"containerPort":19998,"protocol":"TCP","hostIP":"192.0.2.7",'
        b'"podName":"loader-server-1","podIP":"172.16.24.119","extra":1}]'
    )

    (found,) = msgspec.json.decode(written, type=tuple[PortMapping, ...])

    assert (found.host_port, found.protocol, found.host_ip) == (52701, TCP, "192.0.2.7")


def test_tasks_of_one_name_share_a_record() -> None:
    node = Node()
    node.publish("a", port(), tasks=["x"])
    node.publish("b", port(80, 8080), tasks=["x"])
    node.settle()
    node.write()

    assert [(one.service, one.host_port) for one in node.records["x"]] == [
        ("a", 32000),
        ("b", 8080),
    ]
    node.end("b", "x")
    node.settle()
    node.write()
    assert [one.service for one in node.records["x"]] == ["a"]
    node.end("a", "x")
    node.settle()
    node.write()
    assert node.records == {}


def test_only_what_is_granted_is_written() -> None:
    node = Node()
    node.publish("a", port(80, 8080), tasks=["a-1", "a-2"])
    node.settle()
    node.write()

    assert node.records.keys() == {"a-1"}
    node.end("a", "a-1")
    node.settle()
    node.write()
    assert node.records.keys() == {"a-2"}


def test_whoever_gets_a_port_that_another_service_left_is_written() -> None:
    node = Node()
    node.publish("a", port(80, 8080), tasks=["a-1"])
    node.publish("b", port(80, 8080), tasks=["b-1"])
    node.write()
    node.write()

    node.publish("a")
    node.write()

    assert node.records.keys() == {"b-1"}


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
    assert node.numbers("a")["a-1", 81] == 8081
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

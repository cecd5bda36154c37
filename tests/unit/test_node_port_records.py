"""What is written of a node's host ports, and what the next agent makes of it."""

from __future__ import annotations

import msgspec
import pytest

from mesh.model.mapping import PortMapping
from mesh.model.publish import Protocol
from tests.support.hostports import Node, port, task

TCP, UDP, SCTP = Protocol


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

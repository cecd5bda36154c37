"""Which connections lead to what drains, how long they may, and what their marks become."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import msgspec
import pytest

from mesh.agent.drains import TAIL, Deadlines, Drains
from mesh.model.address import packed
from mesh.model.maintenance import Duty, Maintenance
from mesh.model.publish import Protocol, PublishedPort
from mesh.model.service import ServiceSpec
from mesh.model.task import Task, TaskState
from mesh.rules import ended, marks
from mesh.rules.ended import Leaving
from mesh.rules.remark import Remark
from mesh.rules.stale import Flow
from mesh.store import schema

if TYPE_CHECKING:
    from mesh.rules.ended import Name

LAYOUT: Final = marks.DEFAULT
OTHER: Final = marks.Layout.of(0x000FFF00, 0xFFFFFFFF)
ADDRESS: Final = "10.0.1.5"
HOST: Final = packed(ADDRESS)
POOLS: Final = {1: "web/80/tcp", 2: "web/80/tcp/host/a", 3: "db/80/tcp"}
WEB_A: Final = ("web", "a")
SERVICES: Final = {
    "web": ServiceSpec(name="web", ports=(PublishedPort(target=80),), drain="5s"),
    "db": ServiceSpec(name="db", ports=(PublishedPort(target=5432),)),
}


def task(service: str = "web", id: str = "a", node: str = "n1", address: str = ADDRESS) -> Task:
    return Task(service=service, id=id, node=node, addresses=(address,))


def draining(record: Task) -> Task:
    return msgspec.structs.replace(record, state=TaskState.DRAINING)


def flow(
    mark: int,
    port: int = 80,
    protocol: Protocol = Protocol.TCP,
    backend: bytes = HOST,
    *,
    live: bool = True,
) -> Flow:
    return Flow(
        mark=mark,
        protocol=protocol.number,
        source=(packed("192.0.2.9"), 40000),
        destination=(packed("192.0.2.1"), 8080),
        backend=(backend, port),
        bare=False,
        handle=b"",
        live=live,
    )


def leaving(*, host_ports: bool = True, arrivals: bool = True) -> dict[Name, Leaving]:
    at = frozenset({(HOST, 80)}) if arrivals else frozenset[tuple[bytes, int]]()
    return {WEB_A: Leaving(frozenset({HOST}), 5.0, at, host_ports)}


def left(*flows: Flow, of: dict[Name, Leaving] | None = None) -> tuple[int, int]:
    """How many connections the replica has: translated here, and arrived."""
    found = ended.connections(flows, of or leaving(), POOLS.get, LAYOUT)[WEB_A]
    return len(found.translated), len(found.arrived)


# ---- which connections


def test_connections_that_are_translated_here_belong_to_their_service() -> None:
    web, host, db, free = (LAYOUT.frontend(number, 3) for number in (1, 2, 3, 9))

    assert left(flow(web)) == (1, 0)
    assert left(flow(host)) == (1, 0)
    assert left(flow(db)) == (0, 0)
    assert left(flow(free)) == (0, 0)
    assert left(flow(web, backend=packed("10.0.1.6"))) == (0, 0)
    assert left(flow(LAYOUT.plain)) == (0, 0)


def test_ports_of_host_mode_do_not_drain_with_their_node() -> None:
    web, host = (LAYOUT.frontend(number, 3) for number in (1, 2))

    assert left(flow(web), flow(host), of=leaving(host_ports=False)) == (1, 0)


def test_what_arrived_through_another_node_counts_where_it_is_surely_meant() -> None:
    arrived = LAYOUT.arrival(7)

    assert left(flow(arrived)) == (0, 1)
    assert left(flow(arrived, port=81)) == (0, 0)
    assert left(flow(arrived), of=leaving(arrivals=False)) == (0, 0)


def test_what_has_ended_or_moves_by_itself_is_not_left() -> None:
    web = LAYOUT.frontend(1, 3)

    assert left(flow(web, live=False)) == (0, 0)
    assert left(flow(web, protocol=Protocol.UDP)) == (0, 0)
    assert left(flow(LAYOUT.end(web)), flow(LAYOUT.end(LAYOUT.arrival(7)))) == (0, 0)


# ---- marks


@pytest.mark.parametrize("layout", [LAYOUT, OTHER])
def test_an_ended_connection_is_answered_on_the_way_that_it_came(layout: marks.Layout) -> None:
    here = layout.end(layout.frontend(5, 3, hashed=True, stays=True))
    arrived = layout.end(layout.arrival(7))

    assert layout.is_ended(here)
    assert layout.is_ended(arrived)
    assert here & layout.packet_mark == 0
    assert arrived & layout.packet_mark == layout.node(7)
    for mark in (layout.frontend(5, 3, stays=True), layout.arrival(7), layout.plain):
        assert not layout.is_ended(mark)


@pytest.mark.parametrize("mark", [LAYOUT.end(LAYOUT.plain), LAYOUT.end(LAYOUT.arrival(7))])
def test_what_was_ended_stays_so_when_marks_change(mark: int) -> None:
    became = Remark({}, LAYOUT, OTHER).mark(mark)

    assert OTHER.is_ended(became)
    assert (became & OTHER.packet_mark) >> OTHER.node_shift == mark >> LAYOUT.node_shift


# ---- what drains


def test_a_task_drains_until_its_record_says_otherwise() -> None:
    drains = Drains("n1")
    record = task()
    drains.task(record, draining(record))
    found = drains.leaving([record], SERVICES)

    assert found == {WEB_A: Leaving(frozenset({HOST}), 5.0, frozenset({(HOST, 80)}), True)}
    drains.task(draining(record), record)
    assert not drains
    drains.task(draining(record), None)
    assert drains.leaving([record], SERVICES) == {}


def test_a_node_drains_all_its_tasks_but_their_host_ports() -> None:
    drains = Drains("n2")
    news = [drains.node("n1", Maintenance(state=Duty.DRAINING)) for _ in range(2)]
    tasks = [task(), task(id="b", node="n2", address="10.0.2.5"), task("gone", "c")]
    found = drains.leaving(tasks, SERVICES)

    assert news == [True, False]
    assert found == {WEB_A: Leaving(frozenset({HOST}), 5.0, frozenset(), False)}
    assert drains.node("n1", Maintenance())
    assert not drains


def test_only_what_concerns_something_that_drains_is_news() -> None:
    drains = Drains("n1")
    seen = [drains.version]
    for change in (
        lambda: drains.task(None, task()),
        lambda: drains.service("web"),
        lambda: drains.task(task(), draining(task())),
        lambda: drains.service("db"),
        lambda: drains.service("web"),
        lambda: drains.task(draining(task()), None),
        lambda: drains.node("n2", Maintenance(state=Duty.DRAINING)),
        lambda: drains.task(None, task(id="b")),
        lambda: drains.task(None, task(id="c", node="n2")),
        lambda: drains.task(task(id="c", node="n2"), None),
    ):
        change()
        seen.append(drains.version)

    news = [now > before for before, now in pairwise(seen)]
    assert news == [False, False, True, False, True, True, True, False, True, True]


def test_what_arrives_at_an_endpoint_that_two_tasks_have_is_left_alone() -> None:
    drains = Drains("n1")
    drains.task(None, draining(task()))
    same = ServiceSpec(name="same", ports=(PublishedPort(target=80),))

    for service, spared in (("same", True), ("db", False), ("unknown", False)):
        found = drains.leaving([task(), task(service, "x")], SERVICES | {"same": same})
        assert (found[WEB_A].arrivals == frozenset()) is spared


@pytest.mark.parametrize("value", [b"draining", b'"draining"', b'{"state":"draining"}\n'])
def test_maintenance_is_a_record_or_a_word(value: bytes) -> None:
    assert schema.parse_maintenance("/mesh/maintenance/n1", value).state is Duty.DRAINING


# ---- when their time is up


def test_time_counts_from_when_a_task_was_first_seen_to_drain() -> None:
    deadlines = Deadlines()
    deadlines.see(leaving(), 100.0)
    deadlines.see(leaving(), 103.0)

    assert deadlines.due(104.9) == frozenset()
    assert deadlines.next(104.0) == 1.0
    assert deadlines.due(105.0) == {WEB_A}
    assert deadlines.next(105.0) is None
    assert not deadlines.over(105.0)
    assert deadlines.over(105.0 + TAIL)


def test_a_service_that_is_given_less_time_has_less_at_once() -> None:
    deadlines = Deadlines()
    deadlines.see(leaving(), 100.0)
    deadlines.see({WEB_A: leaving()[WEB_A]._replace(drain=1.0)}, 102.0)

    assert deadlines.due(102.0) == {WEB_A}


def test_a_task_that_took_part_again_has_all_its_time_again() -> None:
    deadlines = Deadlines()
    deadlines.see(leaving(), 100.0)
    deadlines.see({}, 104.0)
    deadlines.see(leaving(), 105.0)

    assert deadlines.due(106.0) == frozenset()
    assert deadlines.due(110.0) == {WEB_A}

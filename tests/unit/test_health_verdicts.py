"""Whose word counts on a task's health, and until when."""

from __future__ import annotations

from typing import Final

import pytest

from mesh.agent.state import State
from mesh.model.report import Health
from tests.support import records
from tests.support.records import KEYS, Record

CHECK: Final = {"type": "tcp", "port": 80}


def state(*more: dict[str, Record], check: object = CHECK) -> State:
    found = records.cluster() | records.service("web", health=check)
    found |= records.task("web", "a", 1, 2) | records.task("web", "b", 2, 2)
    for each in more:
        found |= each
    made = State(KEYS, "n1")
    made.apply(records.snapshot(found))
    return made


def put(to: State, record: dict[str, Record], revision: int = 5) -> frozenset[str]:
    ((key, value),) = record.items()
    return to.apply(records.put(key, value, revision)).services


def healthy(of: State) -> set[str]:
    view = of.service_view("web")
    assert view is not None
    return {task.id for task in view.eligible({"n1", "n2", "n3"})}


def found(task: str, *, healthy: bool, starting: bool = False, node: int = 1) -> Health:
    host = "10.0.1.2" if node == 1 else "10.0.2.2"
    return Health(service="web", healthy=healthy, starting=starting, address=host)


def test_a_task_that_nobody_has_judged_gets_nothing() -> None:
    assert healthy(state()) == set()


def test_a_task_is_used_while_its_node_says_so() -> None:
    known = state()
    told = [put(known, records.health("web", "b", 2, 2)), healthy(known)]
    told += [put(known, records.health("web", "b", 2, 2, healthy=False)), healthy(known)]
    told += [put(known, records.health("web", "b", 2, 2)), healthy(known)]

    known.apply(records.delete(KEYS.health("n2", "b"), 9))

    assert told == [{"web"}, {"b"}, {"web"}, set(), {"web"}, {"b"}]
    assert healthy(known) == set()


@pytest.mark.parametrize(
    "record",
    [
        records.health("web", "b", 3, 2),
        records.health("web", "b", 2, 3),
        records.health("api", "b", 2, 2),
        {KEYS.health("n3", "b"): records.health("web", "b", 2, 2)[KEYS.health("n2", "b")]},
    ],
    ids=["on another node", "at another address", "of another service", "told by another node"],
)
def test_no_verdict_counts_that_is_about_another_task(record: dict[str, Record]) -> None:
    assert healthy(state(record)) == set()


def test_tasks_of_one_name_are_told_apart_by_their_services() -> None:
    both = [
        {"service": "web", "healthy": True, "address": "10.0.2.2"},
        {"service": "api", "healthy": False, "address": "10.0.2.2"},
    ]
    known = state(records.service("api", health=CHECK), records.task("api", "b", 2, 2))

    touched = known.apply(records.put(KEYS.health("n2", "b"), _list(both), 5)).services
    api = known.service_view("api")

    assert touched == {"web", "api"}
    assert healthy(known) == {"b"}
    assert api is not None
    assert api.healthy == set()


def _list(each: object) -> bytes:
    import json

    return json.dumps(each).encode()


def test_a_service_without_a_check_heeds_no_verdict() -> None:
    known = state(records.health("web", "b", 2, 2, healthy=False), check=None)

    assert healthy(known) == {"a", "b"}


def test_a_check_that_is_switched_on_interrupts_nothing() -> None:
    known = state(check=None)

    put(known, records.service("web", health=CHECK), 5)
    switched_on = healthy(known)
    put(known, records.task("web", "c", 3, 2), 6)
    put(known, records.health("web", "a", 1, 2, healthy=False, starting=True), 7)
    starting = healthy(known)
    put(known, records.health("web", "a", 1, 2, healthy=False), 8)
    known.apply(records.delete(KEYS.health("n1", "a"), 9))

    assert switched_on == {"a", "b"}
    assert starting == {"a", "b"}
    assert healthy(known) == {"b"}


def test_a_check_that_is_switched_off_and_on_trusts_those_who_run_then() -> None:
    known = state(check=None)
    put(known, records.service("web", health=CHECK), 5)
    known.apply(records.delete(KEYS.task("web", "a"), 6))
    put(known, records.task("web", "a", 1, 2), 7)
    trusted = healthy(known)
    put(known, records.service("web"), 8)
    put(known, records.service("web", health=CHECK), 9)

    assert trusted == {"b"}
    assert healthy(known) == {"a", "b"}


def test_another_check_drops_nobody() -> None:
    known = state(records.health("web", "a", 1, 2))

    put(known, records.service("web", health={"type": "http", "port": 81}), 5)

    assert healthy(known) == {"a"}


def test_what_this_node_finds_itself_counts_more_than_its_record() -> None:
    known = state(records.health("web", "a", 1, 2))

    known.health.found("web", "a", found("a", healthy=False))
    fallen = healthy(known)
    put(known, records.health("web", "a", 1, 2, reason="again"), 5)
    told_otherwise = healthy(known)
    known.health.found("web", "a", found("a", healthy=True))
    risen = healthy(known)
    known.health.found("web", "a", None)
    known.apply(records.delete(KEYS.health("n1", "a"), 9))

    assert (fallen, told_otherwise, risen) == (set(), set(), {"a"})
    assert healthy(known) == set()


def test_a_node_finds_nothing_of_tasks_elsewhere() -> None:
    known = state(records.health("web", "b", 2, 2))

    known.health.found("web", "b", found("b", healthy=False, node=2))

    assert healthy(known) == {"b"}


def test_records_that_etcd_does_not_hold_as_they_are_wanted_are_named() -> None:
    known = state(records.health("web", "a", 1, 2))
    kept = (found("a", healthy=True),)

    assert list(known.health.unreported({"a": kept, "x": ()})) == []
    assert list(known.health.unreported({"a": (found("a", healthy=False),), "b": kept})) == [
        "a",
        "b",
    ]


def test_a_record_that_nobody_can_read_leaves_the_last_one_in_force() -> None:
    known = state(records.health("web", "b", 2, 2))

    known.apply(records.put(KEYS.health("n2", "b"), b'{"service": "web"}', 5))

    assert healthy(known) == {"b"}
    assert KEYS.health("n2", "b") in known.invalid

"""Ingress ports of services that select nodes: who has a port here, and who is told."""

from __future__ import annotations

from itertools import permutations

import pytest

from mesh.agent.state import State
from tests.support import records
from tests.support.records import KEYS

PORT = {"target": 80, "published": 8080, "mode": "ingress"}


def selecting(name: str, selector: str) -> dict[str, records.Record]:
    """A service and its share of port 8080."""
    share = {KEYS.port_share("tcp", 8080, name): {"service": name, "target": 80}}
    return records.service(name, PORT, publishOn=selector) | share


def seen_from(node: str, labels: dict[str, str], *parts: dict[str, records.Record]) -> State:
    state = State(KEYS, node)
    found = records.cluster() | {KEYS.labels(node): {"labels": labels}}
    for part in parts:
        found |= part
    state.apply(records.snapshot(found))
    return state


def owner(state: State) -> list[str]:
    """Whose port 8080 is."""
    return [name for name in sorted(state.services()) if state.ingress(name)]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"zone": "a"}, ["west"]),
        ({"zone": "b"}, ["east"]),
        ({"zone": "c"}, []),
        ({}, []),
    ],
)
def test_a_port_belongs_to_the_service_that_selects_the_node(
    labels: dict[str, str], expected: list[str]
) -> None:
    state = seen_from("n1", labels, selecting("west", "zone=a"), selecting("east", "zone=b"))

    assert owner(state) == expected
    assert list(state.problems()) == []


@pytest.mark.parametrize("order", list(permutations(("first", "second", "third"))))
def test_where_services_meet_the_first_has_the_port_whatever_is_heard_first(
    order: tuple[str, ...],
) -> None:
    state = seen_from("n1", {"zone": "a"})
    at = {"first": 11, "second": 12, "third": 13}
    for name in order:
        state.apply(records.put(KEYS.service(name), records.service(
            name, PORT, publishOn="zone")[KEYS.service(name)], 5))  # fmt: skip
        share = {"service": name, "target": 80}
        state.apply(records.put(KEYS.port_share("tcp", 8080, name), share, at[name]))

    assert owner(state) == ["first"]
    assert [problem.about for problem in state.problems()] == ["service second", "service third"]
    touched = state.apply(records.delete(KEYS.port_share("tcp", 8080, "first"), 20))
    assert touched.services >= {"first", "second"}
    assert owner(state) == ["second"]


def test_labels_that_change_hand_a_port_over_and_free_it() -> None:
    host = records.service("host", {**PORT, "mode": "host"}) | records.task("host", "h", 1, 5)
    state = seen_from("n1", {"zone": "a"}, selecting("west", "zone=a"), host)

    held = owner(state), state.hostports.granted("host")
    touched = state.apply(records.put(KEYS.labels("n1"), {"labels": {"zone": "b"}}, 9))
    state.settle(touched)

    assert held == (["west"], frozenset())
    assert touched.services == {"west", "host"}
    assert owner(state) == []
    assert [claim.task for claim in state.hostports.granted("host")] == ["h"]


@pytest.mark.parametrize(("selector", "expected"), [("role=worker", ["web"]), ("node=n2", [])])
def test_nodes_are_selected_by_name_and_role_too(selector: str, expected: list[str]) -> None:
    assert owner(seen_from("n1", {}, selecting("web", selector))) == expected

"""What etcd's events do to a node's picture of the cluster, and which services they touch."""

from __future__ import annotations

import pytest

from mesh.agent.state import State
from mesh.engine.desired import Touched
from tests.support import records
from tests.support.records import KEYS

WEB = {"target": 80, "published": 8080, "mode": "ingress"}
DB = {"target": 5432, "published": 5432, "mode": "host"}


def _state(*parts: dict[str, records.Record]) -> State:
    state = State(KEYS, "n1")
    everything = records.cluster()
    for part in parts:
        everything |= part
    state.apply(records.snapshot(everything))
    return state


def test_a_service_is_seen_with_what_is_allocated_to_it_and_its_tasks() -> None:
    state = _state(
        records.service("web", WEB),
        records.vip("web", 1),
        records.ingress("web", 8080, 80),
        records.task("web", "a", 1, 2),
        records.task("web", "b", 2, 2),
    )

    view = state.service_view("web")

    assert view is not None
    assert view.vips == ("10.1.0.1", "fd12:3456:789a:f000::1")
    assert [(p.published, p.target) for p in view.ingress] == [(8080, 80)]
    assert [task.id for task in view.tasks] == ["a", "b"]


@pytest.mark.parametrize(
    ("event", "services", "nodes"),
    [
        (records.put(KEYS.service("web"), {"name": "web"}, 5), {"web"}, False),
        (records.delete(KEYS.service("web"), 5), {"web"}, False),
        (records.delete(KEYS.task("web", "b"), 5), {"web"}, False),
        (records.delete(KEYS.alive("n2"), 5), {"web"}, True),
        (records.delete(KEYS.alive("n3"), 5), set(), True),
        (records.delete(KEYS.node("n2"), 5), set(), True),
        (records.delete(KEYS.vip_allocation(1), 5), {"web"}, False),
        (records.put(KEYS.maintenance("n2"), {"state": "draining"}, 5), {"web"}, False),
        (records.put(KEYS.maintenance("n2"), {"state": "active"}, 5), set(), False),
        (records.put(KEYS.maintenance("n3"), {"state": "draining"}, 5), set(), False),
        (records.put(KEYS.maintenance("n2"), {"state": "away"}, 5), set(), False),
        (records.put("/mesh/unknown/thing", {}, 5), set(), False),
    ],
)
def test_an_event_touches_what_it_concerns_and_nothing_else(
    event: object, services: set[str], nodes: bool
) -> None:
    state = _state(
        records.service("web", WEB),
        records.service("db", DB),
        records.vip("web", 1),
        records.task("web", "b", 2, 2),
        records.task("db", "d", 1, 3),
    )

    touched = state.apply(event)  # type: ignore[arg-type]

    assert touched.services == services
    assert touched.nodes is nodes


@pytest.mark.parametrize(
    ("event", "services"),
    [
        (records.put(KEYS.labels("n2"), {"labels": {"zone": "b"}}, 5), {"web"}),
        (records.put(KEYS.labels("n2"), {"labels": {"zone": "a"}}, 5), set()),
        (records.put(KEYS.labels("n2"), {"labels": {"zone": ""}}, 5), {"web"}),
        (records.put(KEYS.labels("n2"), {"labels": {"/": "b"}}, 5), set()),
        (records.delete(KEYS.labels("n1"), 5), {"web"}),
    ],
    ids=["another", "the same", "none", "unreadable", "gone"],
)
def test_labels_touch_the_services_to_which_they_matter(event: object, services: set[str]) -> None:
    nodes = records.cluster()
    labelled = {**nodes[KEYS.node("n2")], "labels": {"zone": "a"}}  # type: ignore[dict-item]
    state = _state(
        records.service("web", WEB, prefer="zone"),
        records.service("db", DB),
        {KEYS.node("n2"): labelled},
        {KEYS.labels("n1"): {"labels": {"zone": "a"}}},
    )

    touched = state.apply(event)  # type: ignore[arg-type]

    assert touched.services == services
    assert not touched.nodes


@pytest.mark.parametrize(
    ("changed", "services"),
    [({"labels": {"zone": "b"}}, {"web"}), ({"role": "manager"}, {"web"}), ({}, set())],
)
def test_a_node_that_comes_back_with_other_traits_touches_whom_they_matter_to(
    changed: dict[str, object], services: set[str]
) -> None:
    state = _state(records.service("web", WEB, publishOn="zone!=b"), records.service("db", DB))
    node = {**records.cluster()[KEYS.node("n2")], **changed}  # type: ignore[dict-item]

    touched = state.apply(records.put(KEYS.node("n2"), node, 5))

    assert touched.services == services


def test_the_same_record_again_touches_nothing() -> None:
    state = _state(records.service("web", WEB))
    again = records.put(KEYS.service("web"), records.service("web", WEB)[KEYS.service("web")], 1)

    assert state.apply(again).services == frozenset()


def test_a_record_that_cannot_be_read_is_reported_and_its_last_good_version_stays() -> None:
    state = _state(records.service("web", WEB))

    touched = state.apply(records.put(KEYS.service("web"), b'{"name": "web", "ports": 7}', 5))

    view = state.service_view("web")
    assert touched.services == frozenset()
    assert view is not None
    assert view.spec.ports[0].published == 8080
    assert "Expected `array`" in state.invalid[KEYS.service("web")].message
    state.apply(records.put(KEYS.service("web"), {"name": "web"}, 6))
    assert state.invalid == {}


@pytest.mark.parametrize(
    "key",
    [
        "/mesh/tasks/web/x/y",
        "/mesh/services/web/extra",
        "/mesh/allocations/nodes/zero",
        "/mesh/allocations/ports/tcp/70000",
        "/mesh/allocations/ports/dccp/80",
        "/mesh/allocations/vips/-1",
        "/mesh/health/n1",
        "/mesh/",
        "/mesh/services/",
    ],
)
def test_a_key_of_the_wrong_shape_changes_nothing(key: str) -> None:
    state = _state(records.service("web", WEB))

    touched = state.apply(records.put(key, {"service": "web", "target": 80, "node": "n1"}, 5))

    assert touched.services == frozenset()
    assert state.services() == {"web"}


def test_a_snapshot_replaces_what_was_known() -> None:
    state = _state(records.service("web", WEB), records.service("db", DB), records.vip("web", 1))

    touched = state.apply(records.snapshot(records.cluster() | records.service("db", DB), 9))

    assert touched.services == {"web", "db"}  # db's creation revision moved, web is gone
    assert state.services() == {"db"}
    assert state.service_view("web") is None


def test_a_vip_outside_the_clusters_range_is_not_believed() -> None:
    hostile: dict[str, records.Record] = {
        KEYS.vip_allocation(1): {"service": "web", "addresses": ["192.0.2.1", "10.1.0.9"]}
    }

    state = _state(records.service("web", WEB), hostile)

    view = state.service_view("web")
    assert view is not None
    assert view.vips == ("10.1.0.9",)


def test_a_node_is_live_while_its_key_is_and_this_node_always() -> None:
    state = _state()

    state.apply(records.delete(KEYS.alive("n1"), 5))
    state.apply(records.delete(KEYS.alive("n2"), 6))

    node = state.node_view()
    assert node is not None
    assert node.live == {"n1", "n3"}


def test_nodes_that_are_not_reached_are_known_to_who_plans() -> None:
    web, db = records.service("web", WEB), records.service("db", DB)
    state = _state(web, db, records.task("web", "a", 2, 2), records.task("db", "b", 3, 2))

    lost = state.nodes.lack(frozenset({"n2"}))
    node = state.node_view()
    other = state.nodes.lack(frozenset({"n3"}))

    assert node is not None
    assert node.unreachable == lost == {"n2"}
    assert node.live == {"n1", "n2", "n3"}
    assert other == {"n2", "n3"}
    assert [state.services_on(names) for names in (lost, other)] == [{"web"}, {"web", "db"}]


def test_a_task_that_moves_to_another_node_follows_that_nodes_life() -> None:
    state = _state(records.service("web", WEB), records.task("web", "a", 2, 2))
    moved = records.task("web", "a", 3, 2)[KEYS.task("web", "a")]

    state.apply(records.put(KEYS.task("web", "a"), moved, 5, created=1))

    assert state.apply(records.delete(KEYS.alive("n2"), 6)).services == frozenset()
    assert state.apply(records.delete(KEYS.alive("n3"), 7)).services == {"web"}


def test_a_host_port_is_granted_to_the_oldest_task_and_passed_on() -> None:
    state = _state(records.service("db", DB), records.service("db2", DB))
    first = records.task("db2", "y", 1, 4)[KEYS.task("db2", "y")]
    second = records.task("db", "x", 1, 3)[KEYS.task("db", "x")]

    state.apply(records.put(KEYS.task("db2", "y"), first, 5))
    state.apply(records.put(KEYS.task("db", "x"), second, 6))
    before = [view.host_ports for name in ("db", "db2") if (view := state.service_view(name))]
    touched = state.apply(records.delete(KEYS.task("db2", "y"), 7))
    after = [view.host_ports for name in ("db", "db2") if (view := state.service_view(name))]

    assert [len(ports) for ports in before] == [0, 1]
    assert touched.services == {"db", "db2"}
    assert [len(ports) for ports in after] == [1, 0]


def test_a_node_believes_its_own_record_of_dynamic_ports_and_nobody_else_s() -> None:
    def record(number: int) -> bytes:
        mapping = f'{{"hostPort": {number}, "containerPort": 80, "protocol": "TCP"'
        return f'[{mapping}, "podName": "a", "podIP": "10.0.1.2", "service": "web"}}]'.encode()

    state = _state(
        records.service("web", {"target": 80}),
        records.task("web", "a", 1, 2),
        {KEYS.published("n1", "a"): record(32007), KEYS.published("n2", "a"): record(32005)},
    )
    before = state.service_view("web")

    touched = state.settle(Touched(frozenset({"x"}), nodes=True))

    after = state.service_view("web")
    assert before is not None
    assert after is not None
    assert before.host_ports == frozenset()
    assert {claim.published for claim in after.host_ports} == {32007}
    assert touched == (frozenset({"x", "web"}), True, False)
    assert state.hostports.unwritten() == {}


def test_an_unreadable_record_of_ports_is_a_node_s_own_business() -> None:
    state = _state({KEYS.published("n1", "a"): b"{", KEYS.published("n2", "a"): b"{"})

    assert state.hostports.unwritten() == {"a": ()}
    assert list(state.problems()) == []

"""Host ports: who gets one, and where it leads."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mesh.hostports import plan
from mesh.hostports.claims import Claims
from mesh.model.cluster import Cluster
from mesh.model.health import CheckType, HealthCheck
from mesh.model.publish import Protocol, PublishedPort
from mesh.model.service import ServiceSpec
from mesh.model.task import Task, TaskState
from mesh.model.view import HostClaim, NodeView, ServiceView
from mesh.rules.forwarding import Backend, Frontend, Scope

TCP, UDP = Protocol.TCP, Protocol.UDP
CLUSTER = Cluster(id="c", prefix6="fd00:1::/48")
N1 = NodeView(name="n1", network=CLUSTER.network(1), live=frozenset({"n1"}))


def claim(service: str, revision: int, address: str | None = None, port: int = 80) -> HostClaim:
    return HostClaim(service, f"{service}-1", TCP, port, 8080, address, revision)


def granted(held: Claims, *services: str) -> set[HostClaim]:
    return {one for service in services for one in held.granted(service)}


def test_the_older_task_keeps_the_port_whichever_is_heard_of_first() -> None:
    held = Claims()
    old, new = claim("old", 5), claim("new", 6)

    first = held.update("new", (new,))
    second = held.update("old", (old,))

    assert first == {"new"}
    assert second == {"new", "old"}
    assert granted(held, "old", "new") == {old}
    assert held.refused("new") == ((new, old),)


def test_a_freed_port_goes_to_the_next_in_line() -> None:
    held = Claims()
    held.update("a", (claim("a", 1),))
    held.update("b", (claim("b", 2),))
    held.update("c", (claim("c", 3),))

    changed = held.update("a", ())

    assert changed == {"a", "b"}
    assert granted(held, "a", "b", "c") == {claim("b", 2)}
    assert held.refused("c") == ((claim("c", 3), claim("b", 2)),)


def test_different_host_addresses_do_not_conflict() -> None:
    held = Claims()

    held.update("a", (claim("a", 1, "192.0.2.1"),))
    held.update("b", (claim("b", 2, "192.0.2.2"),))
    held.update("c", (claim("c", 3, None),))

    assert granted(held, "a", "b", "c") == {claim("a", 1, "192.0.2.1"), claim("b", 2, "192.0.2.2")}


def test_protocols_do_not_conflict() -> None:
    held = Claims()
    udp = HostClaim("b", "b-1", UDP, 80, 8080, None, 2)

    held.update("a", (claim("a", 1),))
    held.update("b", (udp,))

    assert held.granted("b") == {udp}


def test_a_replica_that_wants_its_sibling_s_port_is_refused() -> None:
    held = Claims()
    one = HostClaim("a", "a-1", TCP, 80, 8080, None, 1)
    two = HostClaim("a", "a-2", TCP, 80, 8080, None, 2)

    changed = held.update("a", (two, one))

    assert changed == {"a"}
    assert held.granted("a") == {one}
    assert held.refused("a") == ((two, one),)


def test_an_unchanged_update_changes_nothing() -> None:
    held = Claims()
    held.update("a", (claim("a", 1),))

    assert held.update("a", (claim("a", 1),)) == frozenset()


def test_a_changed_target_is_a_change_for_its_own_service_only() -> None:
    held = Claims()
    held.update("a", (claim("a", 1),))
    held.update("b", (claim("b", 2),))

    assert held.update("a", (claim("a", 1)._replace(target=9090),)) == {"a"}


def test_an_ingress_port_belongs_to_no_task() -> None:
    held = Claims()
    held.update("a", (claim("a", 1),))

    taken = held.reserve(TCP, 80, "web")
    owner = held.refused("a")[0][1]
    freed = held.reserve(TCP, 80, None)

    assert "a" in taken
    assert (owner.service, owner.task) == ("web", "")
    assert "a" in freed
    assert held.granted("a") == {claim("a", 1)}


_SERVICES = ("a", "b", "c")
_TASKS = st.sampled_from(["1", "2"])
_PORTS = st.dictionaries(
    st.integers(80, 83), st.sampled_from((None, None, "192.0.2.1", "192.0.2.2")), max_size=3
)
_WANTED = st.dictionaries(
    _TASKS, st.tuples(st.integers(1, 4), _PORTS, st.integers(0, 5).map(lambda n: n == 0))
)
"""By task: revision, ports with their addresses, and whether it lacks something else."""

_Wanted = dict[str, tuple[int, dict[int, str | None], bool]]
_Event = tuple[str, _Wanted] | tuple[int, str | None]
_EVENTS = st.tuples(st.sampled_from(_SERVICES), _WANTED) | st.tuples(
    st.integers(80, 83), st.sampled_from((None, "web"))
)


def _claims(service: str, wanted: _Wanted) -> list[HostClaim]:
    return [
        HostClaim(service, task, TCP, port, 8080, address, revision)
        for task, (revision, ports, _) in wanted.items()
        for port, address in ports.items()
    ]


def _tell(held: Claims, event: _Event) -> frozenset[str]:
    match event:
        case (str() as service, dict() as wanted):
            waiting = {task for task, (_, _, waits) in wanted.items() if waits}
            return held.update(service, _claims(service, wanted), waiting)
        case (int() as port, owner):
            assert not isinstance(owner, dict)
            return held.reserve(TCP, port, owner)
    raise AssertionError(event)


def _promised(events: list[_Event]) -> set[HostClaim]:
    """Who should have what, said in the simplest way: one task after the other."""
    final: dict[str | int, Any] = dict(events)
    ingress = {port for port, owner in final.items() if isinstance(port, int) and owner}
    tasks = [
        (revision, service, task, ports)
        for service, wanted in final.items()
        if isinstance(service, str)
        for task, (revision, ports, waits) in wanted.items()
        if not waits
    ]
    found: set[HostClaim] = set()
    for revision, service, task, ports in sorted(tasks, key=lambda one: one[:3]):
        mine = _claims(service, {task: (revision, ports, False)})
        if ingress.isdisjoint(ports) and not any(map(_conflict, product(mine, found))):
            found.update(mine)
    return found


def _conflict(pair: tuple[HostClaim, HostClaim]) -> bool:
    one, other = pair
    if one.published != other.published:
        return False
    return one.address is None or other.address is None or one.address == other.address


@given(st.lists(_EVENTS, max_size=12))
def test_the_outcome_does_not_depend_on_the_history(events: list[_Event]) -> None:
    held, fresh = Claims(), Claims()
    for event in events:
        before = {name: held.granted(name) for name in _SERVICES}

        changed = _tell(held, event)

        assert {n for n in _SERVICES if held.granted(n) != before[n]} <= changed
    for last in reversed(list(dict(events).items())):
        _tell(fresh, last)  # type: ignore[arg-type]

    assert granted(held, *_SERVICES) == _promised(events)
    for service in _SERVICES:
        assert held.granted(service) == fresh.granted(service)
        assert held.refused(service) == fresh.refused(service)


@given(st.lists(_EVENTS, max_size=12))
def test_whoever_gets_nothing_is_told_what_is_in_the_way(events: list[_Event]) -> None:
    held = Claims()
    for event in events:
        _tell(held, event)

    for service, wanted in dict(events).items():
        if isinstance(wanted, dict):
            assert isinstance(service, str)
            told = {claim for claim, _ in held.refused(service)}
            for task, (_, ports, waits) in wanted.items():
                got = {one.published for one in held.granted(service) if one.task == task}
                assert got in (set(), set(ports))
                assert got == set(ports) or waits or any(one.task == task for one in told)
            assert all(owner != claim for claim, owner in held.refused(service))


SPEC = ServiceSpec(name="a", ports=(PublishedPort(target=8080, published=80),))
TASK = Task(service="a", id="a-1", node="n1", addresses=("10.0.1.5", "fd00::5"))


def view(*granted: HostClaim, task: Task = TASK, sick: bool = False) -> ServiceView:
    return ServiceView(
        replace(SPEC, health=HealthCheck(type=CheckType.TCP)),
        tasks=(task,),
        healthy=frozenset(() if sick else {"a-1"}),
        host_ports=frozenset(granted),
    )


def test_a_granted_port_leads_to_its_task_on_every_address_of_the_node() -> None:
    (forwarding,) = plan.plan(view(claim("a", 1)), N1)

    assert (Frontend(Scope.NODE, None, TCP, 80),) == forwarding.frontends
    assert (Backend("10.0.1.5", 8080), Backend("fd00::5", 8080)) == forwarding.backends


def test_a_port_with_a_host_address_answers_there_only() -> None:
    (forwarding,) = plan.plan(view(claim("a", 1, "192.0.2.1")), N1)

    assert (Frontend(Scope.HOST_IP, "192.0.2.1", TCP, 80),) == forwarding.frontends


def test_ports_of_one_task_and_target_share_a_pool() -> None:
    (forwarding,) = plan.plan(view(claim("a", 1, port=80), claim("a", 1, port=81)), N1)

    assert [frontend.port for frontend in forwarding.frontends] == [80, 81]


def test_tasks_have_pools_of_their_own() -> None:
    other = Task(service="a", id="a-2", node="n1", addresses=("10.0.1.6",))
    service = ServiceView(
        SPEC,
        tasks=(TASK, other),
        host_ports=frozenset({claim("a", 1), claim("a", 2, port=81)._replace(task="a-2")}),
    )

    first, second = plan.plan(service, N1)

    assert first.key != second.key
    assert second.backends == (Backend("10.0.1.6", 8080),)


@pytest.mark.parametrize(
    ("task", "sick"),
    [
        (
            Task(
                service="a",
                id="a-1",
                node="n1",
                addresses=("10.0.1.5",),
                state=TaskState.DRAINING,
            ),
            False,
        ),
        (Task(service="a", id="a-1", node="n1", addresses=("10.0.1.5",), weight=0), False),
        (TASK, True),
    ],
    ids=["draining", "without weight", "unhealthy"],
)
def test_the_port_refuses_while_its_task_is(task: Task, sick: bool) -> None:
    (forwarding,) = plan.plan(view(claim("a", 1), task=task, sick=sick), N1)

    assert len(forwarding.frontends) == 1
    assert forwarding.backends == ()


def test_a_claim_of_a_task_that_is_gone_opens_nothing() -> None:
    service = ServiceView(SPEC, host_ports=frozenset({claim("a", 1)}))

    assert plan.plan(service, N1) == ()

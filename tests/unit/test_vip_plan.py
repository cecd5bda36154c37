"""What a service's VIP and ingress ports mean on a node."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mesh.model.cluster import Cluster
from mesh.model.health import CheckType, HealthCheck
from mesh.model.publish import Protocol, PublishedPort, PublishMode
from mesh.model.service import Affinity, Prefer, ServiceSpec, Source
from mesh.model.task import Task, TaskState
from mesh.model.view import IngressPort, NodeView, ServiceView
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.vip import eligibility, plan

TCP, UDP = Protocol.TCP, Protocol.UDP
INGRESS, HOST = PublishMode.INGRESS, PublishMode.HOST
CLUSTER = Cluster(id="c", prefix6="fd00:1::/48")
N1 = NodeView(name="n1", network=CLUSTER.network(1), live=frozenset({"n1", "n2"}))
WEB = ServiceSpec(name="web", ports=(PublishedPort(target=80, published=8080, mode=INGRESS),))
GIVEN = (IngressPort(TCP, 8080, 80),)


def task(name: str, node: str, *addresses: str, weight: int = 1) -> Task:
    return Task(service="web", id=name, node=node, addresses=addresses, weight=weight)


ON_N1 = task("a", "n1", "10.0.1.5")
ON_N2 = task("b", "n2", "10.0.2.5")


def pools(service: ServiceView, node: NodeView = N1) -> dict[str, tuple[Backend, ...]]:
    return {forwarding.key: forwarding.backends for forwarding in plan.plan(service, node)}


def test_vip_and_ingress_port_share_a_pool_over_all_nodes() -> None:
    service = ServiceView(
        WEB, tasks=(ON_N2, ON_N1), vips=("10.1.0.1", "fd00:1:0:f000::1"), ingress=GIVEN
    )

    forwardings = plan.plan(service, N1)

    assert forwardings == (
        Forwarding(
            key="web/80/tcp",
            frontends=(
                Frontend(Scope.VIP, "10.1.0.1", TCP, 80),
                Frontend(Scope.VIP, "fd00:1:0:f000::1", TCP, 80),
                Frontend(Scope.INGRESS, None, TCP, 8080),
            ),
            backends=(Backend("10.0.1.5", 80), Backend("10.0.2.5", 80)),
        ),
    )


LOST_N2 = N1._replace(unreachable=frozenset({"n2"}))


def test_tasks_that_the_node_cannot_reach_are_left_out_unless_there_are_no_others() -> None:
    both = ServiceView(WEB, tasks=(ON_N1, ON_N2), ingress=GIVEN)
    far = ServiceView(WEB, tasks=(ON_N2,), ingress=GIVEN)

    assert pools(both, LOST_N2) == {"web/80/tcp": (Backend("10.0.1.5", 80),)}
    assert pools(far, LOST_N2) == {"web/80/tcp": (Backend("10.0.2.5", 80),)}


def test_the_vip_answers_on_the_target_of_a_host_mode_port_too() -> None:
    spec = ServiceSpec(name="web", ports=(PublishedPort(target=53, published=5353, protocol=UDP),))

    (forwarding,) = plan.plan(ServiceView(spec, tasks=(ON_N1,), vips=("10.1.0.1",)), N1)

    assert (Frontend(Scope.VIP, "10.1.0.1", UDP, 53),) == forwarding.frontends


def test_several_published_ports_to_one_target_share_its_pool() -> None:
    spec = ServiceSpec(
        name="web",
        ports=(
            PublishedPort(target=80, published=8080, mode=INGRESS),
            PublishedPort(target=80, published=8081, mode=INGRESS),
            PublishedPort(target=80, published=8080, mode=INGRESS, protocol=UDP),
        ),
    )
    given = (IngressPort(TCP, 8081, 80), IngressPort(TCP, 8080, 80), IngressPort(UDP, 8080, 80))

    forwardings = plan.plan(ServiceView(spec, tasks=(ON_N1,), ingress=given), N1)

    assert {
        "web/80/tcp": (
            Frontend(Scope.INGRESS, None, TCP, 8080),
            Frontend(Scope.INGRESS, None, TCP, 8081),
        ),
        "web/80/udp": (Frontend(Scope.INGRESS, None, UDP, 8080),),
    } == {forwarding.key: forwarding.frontends for forwarding in forwardings}


def test_a_service_without_backends_keeps_its_frontends_and_refuses() -> None:
    (forwarding,) = plan.plan(ServiceView(WEB, vips=("10.1.0.1",), ingress=GIVEN), N1)

    assert len(forwarding.frontends) == 2
    assert forwarding.backends == ()


def test_a_service_that_nothing_can_reach_has_no_forwarding() -> None:
    assert plan.plan(ServiceView(WEB, tasks=(ON_N1,)), N1) == ()


def test_a_port_is_served_only_once_it_is_allocated() -> None:
    (forwarding,) = plan.plan(ServiceView(WEB, vips=("10.1.0.1",)), N1)

    assert [frontend.scope for frontend in forwarding.frontends] == [Scope.VIP]


def test_a_port_that_the_spec_dropped_is_closed_before_it_is_freed() -> None:
    spec = ServiceSpec(name="web", ports=(PublishedPort(target=80, published=8081, mode=INGRESS),))

    assert plan.plan(ServiceView(spec, tasks=(ON_N1,), ingress=GIVEN), N1) == ()


def test_a_changed_target_takes_effect_with_the_spec() -> None:
    spec = ServiceSpec(name="web", ports=(PublishedPort(target=81, published=8080, mode=INGRESS),))

    (forwarding,) = plan.plan(ServiceView(spec, tasks=(ON_N1,), ingress=GIVEN), N1)

    assert forwarding.frontends == (Frontend(Scope.INGRESS, None, TCP, 8080),)
    assert forwarding.backends == (Backend("10.0.1.5", 81),)


def test_a_dynamic_port_leads_to_the_target_it_was_given_for() -> None:
    spec = ServiceSpec(
        name="web",
        ports=(PublishedPort(target=80, mode=INGRESS), PublishedPort(target=90, mode=INGRESS)),
    )
    given = (IngressPort(TCP, 30000, 90), IngressPort(TCP, 30001, 80))

    forwardings = plan.plan(ServiceView(spec, ingress=given), N1)

    assert {("web/80/tcp", 30001), ("web/90/tcp", 30000)} == {
        (forwarding.key, forwarding.frontends[0].port) for forwarding in forwardings
    }


@pytest.mark.parametrize(
    "other",
    [
        Task(service="web", id="b", node="n1", addresses=("10.0.1.6",), state=TaskState.DRAINING),
        task("b", "n1", "10.0.1.6", weight=0),
        task("b", "n3", "10.0.3.6"),
    ],
    ids=["draining", "without weight", "on a dead node"],
)
def test_no_new_connections_go_to_a_task_that_is(other: Task) -> None:
    service = ServiceView(WEB, tasks=(ON_N1, other), ingress=GIVEN)

    assert pools(service) == {"web/80/tcp": (Backend("10.0.1.5", 80),)}


def test_a_task_is_reached_at_its_first_address_of_each_family() -> None:
    many = task("a", "n1", "fd00::1", "10.0.1.5", "10.0.1.6", "fd00::2", weight=3)

    assert pools(ServiceView(WEB, tasks=(many,), ingress=GIVEN)) == {
        "web/80/tcp": (Backend("10.0.1.5", 80, 3), Backend("fd00::1", 80, 3))
    }


def test_policies_of_the_service_stand_in_its_forwarding() -> None:
    spec = ServiceSpec(
        name="web",
        ports=WEB.ports,
        affinity=Affinity.CLIENT_IP,
        source=Source.MASQUERADE,
        allow=("192.0.2.0/24",),
    )

    (forwarding,) = plan.plan(ServiceView(spec, ingress=GIVEN), N1)

    assert forwarding.affinity is Affinity.CLIENT_IP
    assert forwarding.source is Source.MASQUERADE
    assert forwarding.allow == ("192.0.2.0/24",)


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [((ON_N1, ON_N2), ("10.0.1.5",)), ((ON_N2,), ("10.0.2.5",))],
    ids=["own replica", "none here"],
)
def test_prefer_local_balances_over_own_replicas_while_there_are_any(
    tasks: tuple[Task, ...], expected: tuple[str, ...]
) -> None:
    spec = ServiceSpec(name="web", ports=WEB.ports, prefer=Prefer.LOCAL)

    (forwarding,) = plan.plan(ServiceView(spec, tasks=tasks, ingress=GIVEN), N1)

    assert expected == tuple(backend.address for backend in forwarding.backends)


def test_local_only_restricts_the_published_port_and_not_the_vip() -> None:
    spec = ServiceSpec(name="web", ports=WEB.ports, prefer=Prefer.LOCAL_ONLY)
    service = ServiceView(spec, tasks=(ON_N1, ON_N2), vips=("10.1.0.1",), ingress=GIVEN)

    vip, port = plan.plan(service, N1)

    assert (Frontend(Scope.VIP, "10.1.0.1", TCP, 80),) == vip.frontends
    assert [backend.address for backend in vip.backends] == ["10.0.1.5", "10.0.2.5"]
    assert (Frontend(Scope.NODE, None, TCP, 8080),) == port.frontends
    assert [backend.address for backend in port.backends] == ["10.0.1.5"]
    assert vip.key != port.key


def test_local_only_without_a_replica_here_refuses() -> None:
    spec = ServiceSpec(name="web", ports=WEB.ports, prefer=Prefer.LOCAL_ONLY)

    assert pools(ServiceView(spec, tasks=(ON_N2,), ingress=GIVEN)) == {"web/80/tcp/local": ()}


ZONES = {"n1": {"zone": "a", "rack": "1"}, "n2": {"zone": "a"}, "n3": {"zone": "b", "rack": "1"}}
ZONED = N1._replace(live=frozenset(ZONES), labels=ZONES)
ON_N3 = task("c", "n3", "10.0.3.5")


@pytest.mark.parametrize(
    ("tasks", "label", "expected"),
    [
        ((ON_N1, ON_N2, ON_N3), "zone", ["10.0.1.5", "10.0.2.5"]),
        ((ON_N2, ON_N3), "zone", ["10.0.2.5"]),
        ((ON_N3,), "zone", ["10.0.3.5"]),
        ((ON_N1, ON_N2, ON_N3), "rack", ["10.0.1.5", "10.0.3.5"]),
        ((ON_N1, ON_N2, ON_N3), "hall", ["10.0.1.5", "10.0.2.5", "10.0.3.5"]),
    ],
    ids=["own and neighbour", "neighbour", "none in the zone", "another label", "no such label"],
)
def test_prefer_zone_balances_over_the_own_zone_while_it_has_replicas(
    tasks: tuple[Task, ...], label: str, expected: list[str]
) -> None:
    spec = ServiceSpec(name="web", ports=WEB.ports, prefer=Prefer.ZONE, zone_label=label)

    (forwarding,) = plan.plan(ServiceView(spec, tasks=tasks, ingress=GIVEN), ZONED)

    assert expected == [backend.address for backend in forwarding.backends]


@pytest.mark.parametrize("prefer", [Prefer.LOCAL, Prefer.ZONE])
@pytest.mark.parametrize(
    "ill",
    [
        {"tasks": (replace(ON_N1, state=TaskState.DRAINING), ON_N3)},
        {"tasks": (replace(ON_N1, weight=0), ON_N3)},
        {"draining": frozenset({"n1"})},
        {"healthy": frozenset({"c"})},
    ],
    ids=["draining", "weight 0", "node draining", "unhealthy"],
)
def test_a_near_replica_that_takes_no_connections_is_not_preferred(
    prefer: Prefer, ill: dict[str, Any]
) -> None:
    check = HealthCheck(type=CheckType.TCP) if "healthy" in ill else None
    spec = ServiceSpec(name="web", ports=WEB.ports, prefer=prefer, health=check)
    service = ServiceView(spec, **{"tasks": (ON_N1, ON_N3), "ingress": GIVEN, **ill})

    (forwarding,) = plan.plan(service, ZONED)

    assert [backend.address for backend in forwarding.backends] == ["10.0.3.5"]


@pytest.mark.parametrize(
    ("prefer", "label", "tasks", "told"),
    [
        (Prefer.ANY, "zone", (ON_N1,), ""),
        (Prefer.LOCAL, "zone", (ON_N1, ON_N2), "prefer local: 1 of 2 replicas, those here"),
        (Prefer.LOCAL, "zone", (ON_N2,), "prefer local: none of 1 replicas is here, so all"),
        (Prefer.LOCAL_ONLY, "zone", (ON_N2,), "local-only: published ports have 0 of 1"),
        (Prefer.ZONE, "zone", (ON_N2, ON_N3), "zone: 1 of 2 replicas, those in zone 'a'"),
        (Prefer.ZONE, "hall", (ON_N2, ON_N3), "node n1 has no label 'hall', so all 2 replicas"),
    ],
)
def test_what_a_preference_comes_to_is_told(
    prefer: Prefer, label: str, tasks: tuple[Task, ...], told: str
) -> None:
    spec = ServiceSpec(name="web", ports=WEB.ports, prefer=prefer, zone_label=label)

    assert told in eligibility.told(ServiceView(spec, tasks=tasks), ZONED)


@given(st.permutations([task(str(i), f"n{i % 2 + 1}", f"10.0.1.{i}") for i in range(2, 9)]))
def test_the_order_of_tasks_does_not_matter(tasks: list[Task]) -> None:
    service = ServiceView(WEB, tasks=tuple(tasks), vips=("10.1.0.1",), ingress=GIVEN)
    ordered = ServiceView(
        WEB,
        tasks=tuple(sorted(tasks, key=lambda t: t.id)),
        vips=("10.1.0.1",),
        ingress=GIVEN,
    )

    assert plan.plan(service, N1) == plan.plan(ordered, N1)

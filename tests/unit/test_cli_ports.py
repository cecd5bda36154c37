"""Published ports in Swarm's and Warren's words."""

from __future__ import annotations

import pytest

from mesh.cli import ports
from mesh.model.cluster import Cluster
from mesh.model.publish import Protocol, PublishedPort, PublishMode
from mesh.model.service import ServiceSpec
from mesh.model.view import IngressPort, ServiceView


def _ingress(*pairs: tuple[int, int]) -> ServiceView:
    """A service whose ingress ports the controller has given."""
    asked = [PublishedPort(target=t, published=p, mode=PublishMode.INGRESS) for p, t in pairs]
    given = [IngressPort(Protocol.TCP, p, t) for p, t in pairs]
    return ServiceView(ServiceSpec(name="web", ports=tuple(asked)), ingress=tuple(given))


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(8080, 80)], "*:8080->80/tcp"),
        ([(80, 8080), (81, 8081)], "*:80-81->8080-8081/tcp"),
        ([(81, 8081), (80, 8080)], "*:80-81->8080-8081/tcp"),
        ([(80, 80), (81, 80)], "*:80-81->80/tcp"),
        ([(60, 60), (61, 61), (62, 61)], "*:60-61->60-61/tcp, *:62->61/tcp"),
        ([(60, 60), (61, 60), (62, 61)], "*:60-61->60/tcp, *:62->61/tcp"),
        ([(80, 80), (82, 82)], "*:80->80/tcp, *:82->82/tcp"),
        ([(80, 81), (81, 80)], "*:80->81/tcp, *:81->80/tcp"),
        ([], ""),
    ],
)
def test_ingress_ports_read_as_in_swarm(pairs: list[tuple[int, int]], expected: str) -> None:
    view = _ingress(*pairs)

    assert ports.notation(ports.assign(view)) == expected


def test_protocols_modes_and_addresses_never_share_a_range() -> None:
    spec = ServiceSpec(
        name="web",
        ports=(
            PublishedPort(target=80, published=80),
            PublishedPort(target=81, published=81, host_ip="192.0.2.1"),
            PublishedPort(target=82, published=82, host_ip="2001:db8::1"),
            PublishedPort(target=83, published=83, protocol=Protocol.UDP),
            PublishedPort(target=84, published=84, mode=PublishMode.INGRESS),
        ),
    )
    view = ServiceView(spec, ingress=(IngressPort(Protocol.TCP, 84, 84),))

    assert ports.notation(ports.assign(view)).split(", ") == [
        "*:80->80/tcp (host)",
        "192.0.2.1:81->81/tcp (host)",
        "[2001:db8::1]:82->82/tcp (host)",
        "*:83->83/udp (host)",
        "*:84->84/tcp",
    ]


def test_a_dynamic_port_shows_the_number_that_the_controller_gave() -> None:
    asked = (
        PublishedPort(target=80, mode=PublishMode.INGRESS),
        PublishedPort(target=80, published=8080, mode=PublishMode.INGRESS),
    )
    given = (IngressPort(Protocol.TCP, 8080, 80), IngressPort(Protocol.TCP, 30001, 80))

    assigned = ports.assign(ServiceView(ServiceSpec(name="web", ports=asked), ingress=given))

    assert [(item.published, item.granted) for item in assigned] == [(30001, True), (8080, True)]
    assert ports.warren(assigned) == ["30001:80/tcp (ingress)", "8080:80/tcp (ingress)"]


def test_a_port_that_is_not_given_is_pending() -> None:
    asked = (
        PublishedPort(target=80, mode=PublishMode.INGRESS),
        PublishedPort(target=81, published=8081, mode=PublishMode.INGRESS),
    )

    assigned = ports.assign(ServiceView(ServiceSpec(name="web", ports=asked)))

    assert ports.notation(assigned) == "*:?->80/tcp (pending), *:8081->81/tcp (pending)"


def test_an_endpoint_is_what_swarms_tools_read() -> None:
    spec = ServiceSpec(
        name="web",
        ports=(
            PublishedPort(target=80, published=8080, mode=PublishMode.INGRESS),
            PublishedPort(target=53, published=53, protocol=Protocol.UDP),
            PublishedPort(target=90, mode=PublishMode.INGRESS),
        ),
    )
    view = ServiceView(spec, vips=("10.1.0.1",), ingress=(IngressPort(Protocol.TCP, 8080, 80),))

    found = ports.endpoint(view, Cluster(id="test", prefix6="fd12:3456:789a::/48"))

    assert found == {
        "Spec": {"Mode": "vip"},
        "Ports": [
            {
                "Protocol": "tcp",
                "TargetPort": 80,
                "PublishedPort": 8080,
                "PublishMode": "ingress",
            },
            {"Protocol": "udp", "TargetPort": 53, "PublishedPort": 53, "PublishMode": "host"},
            {"Protocol": "tcp", "TargetPort": 90, "PublishMode": "ingress"},
        ],
        "VirtualIPs": [{"Addr": "10.1.0.1/16"}],
    }

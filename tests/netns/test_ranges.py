"""A published range of a thousand ports, from its text to packets, on every backend."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Final

import pytest

from mesh.agent import planner
from mesh.hostports.ports import HostPorts
from mesh.model import publish_syntax
from mesh.model.address import FAMILIES, Family
from mesh.model.publish import Protocol, PublishMode
from mesh.model.service import ServiceSpec
from mesh.model.task import Task
from mesh.model.view import IngressPort, NodeView, ServiceView
from tests.support import drivers, rules
from tests.support.echo import REFUSED, ask
from tests.support.onenode import ADDRESSES, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.netns

RANGE: Final = range(9000, 10000)
SHIFTED: Final = 10000
"""Ingress mode publishes the same targets as many places further up."""

SERVED: Final = (RANGE[0], RANGE[499], RANGE[-1])


def _views() -> Iterator[ServiceView]:
    low, high = RANGE[0], RANGE[-1]
    task = Task(service="host", id="c2", node="n1", addresses=ADDRESSES["c2"])
    host = f"{low}-{high}:{low}-{high}"
    spec = ServiceSpec(name="host", ports=publish_syntax.parse(host, PublishMode.HOST))
    ports = HostPorts("n1")
    ports.update("host", spec, ((task, 1),))
    yield ServiceView(spec, (task,), host_ports=ports.granted("host"))
    mesh = f"{low + SHIFTED}-{high + SHIFTED}:{low}-{high}/udp"
    spec = ServiceSpec(name="mesh", ports=publish_syntax.parse(mesh, PublishMode.INGRESS))
    given = tuple(IngressPort(Protocol.UDP, n + SHIFTED, n) for n in RANGE)
    tasks = tuple(
        Task(service="mesh", id=name, node="n1", addresses=ADDRESSES[name]) for name in ("c1", "c2")
    )
    yield ServiceView(spec, tasks, ingress=given)


@pytest.fixture(scope="module", params=drivers.KERNEL)
def world(request: pytest.FixtureRequest) -> Iterator[OneNode]:
    with one_node(request.param) as made:
        for name in ("c1", "c2"):
            for port in SERVED:
                made.servers.start(name, name, port)
        node = NodeView("n1", rules.PARAMETERS.network, frozenset({"n1"}))
        made.publish(chain.from_iterable(planner.plan(view, node) for view in _views()))
        yield made


BOTH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"v{family.suffix}")


@BOTH
def test_every_port_of_a_range_leads_to_its_own_target(world: OneNode, family: Family) -> None:
    index = FAMILIES.index(family)
    node, client = ADDRESSES["node"][index], ADDRESSES["client"][index]

    host = [ask("client", Protocol.TCP, node, port) for port in SERVED]
    mesh = {ask("client", Protocol.UDP, node, port + SHIFTED) for port in SERVED for _ in range(9)}

    assert host == [f"c2 {client}"] * len(SERVED)
    assert mesh == {f"c1 {client}", f"c2 {client}"}


@BOTH
def test_beside_a_range_nothing_is_published(world: OneNode, family: Family) -> None:
    node = ADDRESSES["node"][FAMILIES.index(family)]

    for port in (RANGE[0] - 1, RANGE[-1] + 1):
        assert ask("client", Protocol.TCP, node, port) == REFUSED
        assert ask("client", Protocol.UDP, node, port + SHIFTED) == REFUSED

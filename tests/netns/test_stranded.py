"""A connection that a vanished replica never answered is answered by another one."""

from __future__ import annotations

import select
import socket
import subprocess
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Final

import pytest

from mesh.dataplane import netns
from mesh.dataplane.conntrack import Conntrack
from mesh.delta import Delta
from mesh.engine.flows import Flows
from mesh.model.address import FAMILIES, Family
from mesh.model.publish import Protocol
from mesh.rules import marks
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from tests.support.onenode import ADDRESSES, SERVER_PORT, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = pytest.mark.netns

PORT: Final = 30080
DOMAIN: Final = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}


def _web(*replicas: str) -> Forwarding:
    return Forwarding(
        "web/80/tcp",
        (Frontend(Scope.INGRESS, None, Protocol.TCP, PORT),),
        tuple(Backend(a, SERVER_PORT) for r in replicas for a in ADDRESSES[r]),
    )


def _nft(commands: str) -> None:
    """Run nft in the container c1."""
    with netns.entered("/run/netns/c1"):
        subprocess.run(("nft", commands), check=True)


@pytest.fixture
def world() -> Iterator[OneNode]:
    with one_node() as made:
        _nft("add table inet deaf; add chain inet deaf input { type filter hook input priority 0; "
             "}; add rule inet deaf input tcp dport 8080 drop")  # fmt: skip
        yield made


@contextmanager
def _flows() -> Iterator[tuple[Flows, Conntrack]]:
    with netns.entered("/run/netns/node"):
        conntrack = Conntrack(marks.DEFAULT)
    with closing(conntrack):
        yield Flows(conntrack, marks.DEFAULT), conntrack


def _republish(world: OneNode, flows: Flows, was: str, becomes: str) -> None:
    """Have another replica serve, and forget what is stranded, as an agent does."""
    before, now = world.lowered([_web(was)]), world.lowered([_web(becomes)])
    world.publish([_web(becomes)])
    flows.written(Delta.between(before, now))
    world.node.run(flows.settle(lambda _number: now, lambda _number: {}))


def _client(family: Family) -> socket.socket:
    """A client that has asked, and waits."""
    with netns.entered("/run/netns/client"):
        client = socket.socket(DOMAIN[family], socket.SOCK_STREAM)
    client.setblocking(False)
    client.connect_ex((ADDRESSES["node"][FAMILIES.index(family)], PORT))
    client.settimeout(30)
    return client


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"v{f.suffix}")
def test_a_syn_that_nobody_answered_goes_to_who_is_there(world: OneNode, family: Family) -> None:
    world.publish([_web("c1")])
    with _flows() as (flows, conntrack), _client(family) as client:
        _republish(world, flows, "c1", "c1")
        kept = world.node.run(conntrack.unanswered())
        _republish(world, flows, "c1", "c2")
        answer = client.recv(100).decode()

    assert len(kept) == 1
    assert answer.startswith("c2 ")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"v{f.suffix}")
def test_a_connection_that_is_answered_at_last_is_left_to_drain(
    world: OneNode, family: Family
) -> None:
    """Its replica left the pool while the answer was on its way, and somebody looked just then."""
    world.publish([_web("c1")])
    with _flows() as (_, conntrack), _client(family) as client:
        stranded = world.node.run(conntrack.unanswered())
        world.publish([_web("c2")])
        _nft("flush table inet deaf")
        answer = client.recv(100).decode()
        world.node.run(conntrack.delete_unanswered(stranded))
        layout = marks.DEFAULT
        left = world.node.run(conntrack.flows(layout.ours, layout.ours))

    assert answer.startswith("c1 ")
    assert {flow.handle for flow in left} == {flow.handle for flow in stranded} != set()


def test_a_connection_that_was_answered_is_left_to_drain(world: OneNode) -> None:
    _nft("flush table inet deaf")
    world.publish([_web("c1")])
    with _flows() as (flows, _), _client(Family.V4) as client:
        select.select([], [client], [], 30)
        _republish(world, flows, "c1", "c2")
        answer = client.recv(100).decode()

    assert answer.startswith("c1 ")

"""A connection that a vanished replica never answered is answered by another one."""

from __future__ import annotations

import socket
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

from mesh.dataplane import netns
from mesh.dataplane.conntrack import Conntrack
from mesh.model.address import FAMILIES, Family
from mesh.model.publish import Protocol
from mesh.rules import marks, stale
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from tests.support.onenode import ADDRESSES, SERVER_PORT, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.rules.elements import Elements

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


async def _look(conntrack: Conntrack, held: Elements) -> int:
    """Forget stranded connections, as an agent does; how many there were."""
    flows = list(stale.stranded(await conntrack.unanswered(), lambda _number: held, marks.DEFAULT))
    await conntrack.delete(flows)
    return len(flows)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"v{f.suffix}")
def test_a_syn_that_nobody_answered_goes_to_who_is_there(world: OneNode, family: Family) -> None:
    world.publish([_web("c1")])
    with netns.entered("/run/netns/node"):
        conntrack = Conntrack(marks.DEFAULT)
    with netns.entered("/run/netns/client"):
        client = socket.socket(DOMAIN[family], socket.SOCK_STREAM)
    with client:
        client.setblocking(False)
        client.connect_ex((ADDRESSES["node"][FAMILIES.index(family)], PORT))
        client.settimeout(30)
        kept = world.node.run(_look(conntrack, world.lowered([_web("c1")])))
        world.publish([_web("c2")])
        forgotten = world.node.run(_look(conntrack, world.lowered([_web("c2")])))
        answer = client.recv(100).decode()
    conntrack.close()

    assert (kept, forgotten) == (0, 1)
    assert answer.startswith("c2 ")


def test_a_connection_that_was_answered_is_left_to_drain(world: OneNode) -> None:
    _nft("flush table inet deaf")
    world.publish([_web("c1")])
    with netns.entered("/run/netns/node"):
        conntrack = Conntrack(marks.DEFAULT)
    with netns.entered("/run/netns/client"):
        client = socket.create_connection((ADDRESSES["node"][0], PORT), 10)
    with client:
        world.publish([_web("c2")])
        forgotten = world.node.run(_look(conntrack, world.lowered([_web("c2")])))
        answer = client.recv(100).decode()
    conntrack.close()

    assert forgotten == 0
    assert answer.startswith("c1 ")

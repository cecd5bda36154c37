"""What clients notice while replicas and nodes drain: nothing, until their time is up.

On every backend, one lab of three nodes, which every test leaves as it found it.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import pytest

from mesh.model.address import Family, family_of
from mesh.model.publish import Protocol
from tests.support import drivers
from tests.support.cluster import (
    PORT,
    Cluster,
    cluster,
    host,
    ingress,
    put,
    until,
    until_served,
)
from tests.support.requests import Answer, again, ask_all, born, held, stream
from tests.support.verbs import on_node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.requests import Ask, Held, Outcome

pytestmark = pytest.mark.cluster

WEB: Final = 8080
HOST: Final = 8081
RAW: Final = 8082
LISTENER: Final = 5000
REPLICAS: Final = ("a1", "b1", "d1")
CYCLE: Final = 60
LONG: Final = "1h"
RESET: Final = "ConnectionResetError"


@pytest.fixture(scope="module", params=drivers.KERNEL)
def mesh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    placed = ((id, {"a": "n1", "b": "n2", "d": "n3"}[id[0]]) for id in (*REPLICAS, "a2", "b2"))
    with cluster("draining", 3, *placed, backend=request.param) as made:
        asyncio.run(_furnish(made))
        yield made


async def _furnish(mesh: Cluster) -> None:
    _web(mesh)
    for replica in REPLICAS:
        mesh.task("web", replica)
    await mesh.allocated("web")
    await until_served(8 * everything(mesh), set(REPLICAS))


def _web(mesh: Cluster, drain: str = LONG) -> None:
    mesh.service("web", *ingress(WEB), *host(HOST), drain=drain)


def everything(mesh: Cluster) -> list[Ask]:
    """From outside through every node, and from containers to the VIP."""
    return mesh.from_outside(WEB) + mesh.asks(("a2", "b2"), mesh.vips("web"), PORT)


def on(replica: str, connections: dict[Held, Outcome]) -> dict[Held, Outcome]:
    """The TCP connections that a replica answered."""
    return {
        flow: outcome
        for flow, outcome in connections.items()
        if isinstance(outcome, Answer)
        and outcome.replica == replica
        and flow.asked.protocol is Protocol.TCP
    }


def left(mesh: Cluster, service: str = "web") -> int | None:
    """How many connections all nodes have left, once all have counted since the last change."""
    told = [record.get("drained", {}) for record in mesh.records.under("applied/").values()]
    if any(each.get("revision", 0) < mesh.revision for each in told):
        return None
    return sum(
        int(one["count"]) for each in told for one in each["left"] if one["service"] == service
    )


async def run_out(mesh: Cluster) -> None:
    """End the time that there is to drain."""
    _web(mesh, drain="0s")
    await until(lambda: left(mesh) == 0, "the nodes end what is left")


async def restore(mesh: Cluster) -> None:
    """All replicas take part, with all the time to drain."""
    _web(mesh)
    for replica in REPLICAS:
        mesh.task("web", replica)
    await mesh.settled()
    await until_served(8 * everything(mesh), set(REPLICAS))


async def test_a_draining_task_keeps_what_it_has_until_its_time_is_up(mesh: Cluster) -> None:
    async with held(4 * everything(mesh)) as first, stream(everything(mesh)) as traffic:
        await traffic.more(CYCLE)
        mesh.task("web", "a1", state="draining")
        await mesh.settled()
        await traffic.landed()
        before = traffic.answered["a1"]
        await traffic.more(CYCLE)
        await traffic.landed()
        mine = on("a1", first)
        await until(lambda: left(mesh) == len(mine), "the nodes tell what is left")
        kept = await again(mine)
        after = traffic.answered["a1"]
        await run_out(mesh)
        ended = await again(mine)
        others = on("b1", first)
        unharmed = await again(others)
    await restore(mesh)

    assert traffic.failures == []
    assert before == after
    assert mine
    assert kept == mine
    assert set(ended.values()) == {RESET}
    assert others == unharmed


async def test_an_agent_that_was_away_ends_what_is_left_too(mesh: Cluster) -> None:
    async with held(4 * everything(mesh)) as first, stream(everything(mesh)) as traffic:
        mesh.task("web", "a1", state="draining")
        await mesh.settled()
        await mesh.kill("n1")
        mine = on("a1", first)
        without = await again(mine)
        _web(mesh, drain="0s")
        await mesh.start_again("n1")
        await until(lambda: left(mesh) == 0, "the nodes end what is left")
        ended = await again(mine)
    await restore(mesh)

    assert traffic.failures == []
    assert without == mine
    assert set(ended.values()) == {RESET}


async def test_a_draining_node_forwards_and_gets_nothing_new(mesh: Cluster) -> None:
    async with held(4 * everything(mesh)) as first, stream(everything(mesh)) as traffic:
        put(mesh, "maintenance/n1", {"state": "draining"})
        await mesh.settled()
        await traffic.landed()
        await until_served(8 * everything(mesh), {"b1", "d1"})
        mine = on("a1", first)
        kept = await again(mine)
        at_its_port = await ask_all(mesh.from_outside(HOST, "n1"))
        async with held(mesh.from_outside(HOST, "n1")) as hosted:
            await run_out(mesh)
            ended = await again(mine)
            own = on("a1", hosted)
            still = await again(own)
        put(mesh, "maintenance/n1", {"state": "active"})
        await restore(mesh)

    assert traffic.failures == []
    assert kept == mine
    assert set(ended.values()) == {RESET}
    assert {a.replica if isinstance(a, Answer) else a for a in at_its_port} == {"a1"}
    assert own
    assert still == own


async def says(mesh: Cluster, *args: str) -> str:
    """What `mesh` printed on a node, while this process goes on; it must succeed."""
    return await asyncio.to_thread(on_node, mesh, "n2", *args)


async def test_replicas_are_replaced_one_by_one_and_no_request_is_lost(mesh: Cluster) -> None:
    """Each old one is killed the moment that the command line calls it drained."""
    await mesh.start(("x1", "n1"), ("y1", "n2"))
    for replica in ("x1", "y1"):
        mesh.task("web", replica)
    for replica in REPLICAS:
        mesh.untask("web", replica)
    await mesh.settled()
    waiting = []

    async with stream(everything(mesh)) as traffic:
        for old, new in (("x1", "x2"), ("y1", "y2")):
            await mesh.start((new, mesh.containers[old].node))
            mesh.task("web", new)
            await mesh.settled()
            async with held(4 * everything(mesh)) as first:
                mine = on(old, first)
                removal = asyncio.create_task(says(mesh, "task", "rm", "web", old, "--drain"))
                await until(lambda: left(mesh) == len(mine), "they are told")  # noqa: B023
                await traffic.more(CYCLE)
                kept = await again(mine)
                waiting.append(bool(mine) and kept == mine and mesh.records.get(f"tasks/web/{old}"))
            told = await removal
            await mesh.kill(old)
            await traffic.more(CYCLE)
        await until_served(8 * everything(mesh), {"x2", "y2"})
        for replica in REPLICAS:
            mesh.task("web", replica)
        for replica in ("x2", "y2"):
            mesh.untask("web", replica)
        await restore(mesh)

    assert traffic.failures == []
    assert all(waiting)
    assert "removed: web/y1" in told


class Pair:
    """Both ends of a connection."""

    def __init__(self, asked: Ask, listeners: dict[Family, socket.socket], room: ExitStack) -> None:
        self.asked = asked
        self.client = room.enter_context(born(asked.netns, asked.address, Protocol.TCP))
        self._listener = listeners[family_of(asked.address)]
        self._room = room

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.client, (self.asked.address, self.asked.port))
        self.server = self._room.enter_context((await loop.sock_accept(self._listener))[0])


async def heard(own: socket.socket) -> str:
    """What a side hears that says something."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(30):
            await loop.sock_sendall(own, b"?")
            return (await loop.sock_recv(own, 100)).decode()
    except (OSError, TimeoutError) as error:
        return type(error).__name__


@pytest.mark.parametrize("source", ["preserve", "masquerade"])
async def test_both_sides_hear_of_the_end_on_whatever_way(mesh: Cluster, source: str) -> None:
    ports = ingress(RAW, LISTENER)[:1]
    mesh.service("raw", *ports, drain=LONG, source=source)
    mesh.task("raw", "a2")
    await mesh.allocated("raw")
    asks = [a for a in mesh.from_outside(RAW) if a.protocol is Protocol.TCP]
    asks += [
        a
        for a in mesh.asks(("a1", "b2", "n1", "n2"), mesh.vips("raw"), LISTENER)
        if a.protocol is Protocol.TCP
    ]
    with ExitStack() as room:
        listeners = {}
        for family, everywhere in ((Family.V4, "0.0.0.0"), (Family.V6, "::")):
            one = room.enter_context(born(mesh.netns("a2"), everywhere, Protocol.TCP))
            if family is Family.V6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((everywhere, LISTENER))
            one.listen()
            listeners[family] = one
        pairs = [Pair(asked, listeners, room) for asked in asks]
        for pair in pairs:
            await pair.open()
        mesh.task("raw", "a2", state="draining")
        await until(lambda: left(mesh, "raw") == len(pairs), "the nodes count them")
        mesh.service("raw", *ports, drain="0s", source=source)
        await until(lambda: left(mesh, "raw") == 0, "the nodes end them")
        clients = await asyncio.gather(*(heard(pair.client) for pair in pairs))
        servers = await asyncio.gather(*(heard(pair.server) for pair in pairs))
    mesh.remove("raw")
    await mesh.settled()

    assert set(zip(asks, clients, strict=True)) == {(one, RESET) for one in asks}
    assert set(zip(asks, servers, strict=True)) == {(one, RESET) for one in asks}

"""What an agent asks of its host's firewall, and whom it tells."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from mesh.agent.neighbours import Neighbours
from mesh.agent.state import State
from mesh.dataplane.firewall import Firewall
from mesh.engine.healing import Repair
from mesh.model.address import Family
from mesh.model.report import Problem
from tests.support import records, rules
from tests.support.records import KEYS

if TYPE_CHECKING:
    from mesh.rules.needs import Wanted

CLOSED = Problem(about="firewall", message="drops everything")


class FakeFirewall(Firewall):
    """Remembers what it was asked for, and says what it is told to."""

    def __init__(self) -> None:
        self.asked: list[Wanted] = []
        self.was_asked = asyncio.Event()
        self.told: tuple[Problem, ...] = ()
        self.lost: list[tuple[str, str]] = []

    async def sync(self, wanted: Wanted) -> tuple[Problem, ...]:
        self.asked.append(wanted)
        self.was_asked.set()
        return self.told

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(0)

    def replaced(self) -> list[tuple[str, str]]:
        found, self.lost = self.lost, []
        return found


class World:
    """A state, and what the neighbours made of it."""

    def __init__(self, **nodes: records.Record) -> None:
        self.state = State(KEYS, "n1")
        known = records.cluster(2) | {KEYS.node(name): node for name, node in nodes.items()}
        self.state.apply(records.snapshot(known))
        self.firewall = FakeFirewall()
        self.news = 0
        self.healed: list[tuple[Repair, str, str]] = []
        self.neighbours = Neighbours(
            self.state, self.firewall, self._hear, lambda *each: self.healed.append(each)
        )

    def _hear(self) -> None:
        self.news += 1


def node(number: int, endpoints: list[str], addresses: list[str]) -> records.Record:
    key = "A" * 42 + f"{number}="
    fields = {"name": f"n{number}", "role": "worker", "publicKey": key}
    return {**fields, "endpoints": endpoints, "addresses": addresses}


V4, V6 = "192.0.2.1:51820", "[2001:db8::1]:51820"


@pytest.mark.parametrize(
    ("endpoints", "peer", "families"),
    [
        ([V4, V6], ["192.0.2.2", "2001:db8::2"], {Family.V4}),
        ([V6, V4], ["192.0.2.2", "2001:db8::2"], {Family.V6}),
        ([V4, V6], ["2001:db8::2"], {Family.V6}),
        ([V4], ["2001:db8::2"], set()),
    ],
)
async def test_wireguard_is_asked_for_in_the_family_that_peers_use(
    endpoints: list[str], peer: list[str], families: set[Family]
) -> None:
    world = World(n1=node(1, endpoints, ["192.0.2.1"]), n2=node(2, ["192.0.2.2:51820"], peer))

    await world.neighbours.look(rules.PARAMETERS)

    assert world.firewall.asked[0].endpoints == families


async def test_problems_are_told_once_and_when_they_are_gone() -> None:
    world = World()

    for told in ((), (CLOSED,), (CLOSED,), ()):
        world.firewall.told = told
        await world.neighbours.look(rules.PARAMETERS)

    assert world.news == 2
    assert world.neighbours.problems == ()


async def test_a_line_that_was_put_back_is_a_healing() -> None:
    world = World()
    world.firewall.lost = [("iptables-nft FORWARD", "ufw(7)")]

    await world.neighbours.look(rules.PARAMETERS)

    ((repair, what, by),) = world.healed
    assert repair == Repair(lines=1)
    assert "iptables-nft FORWARD" in what
    assert by == "ufw(7)"


@pytest.mark.parametrize(("address", "asked"), [("192.0.2.1", True), ("10.0.1.2", False)])
async def test_replicas_with_the_nodes_own_addresses_need_more(address: str, asked: bool) -> None:
    world = World()
    task = records.task("web", "a", 1, 2, addresses=[address])
    world.state.apply(records.snapshot(records.cluster(2) | records.service("web") | task))
    running = asyncio.create_task(world.neighbours.run(rules.PARAMETERS))

    async with asyncio.timeout(20):
        await world.firewall.was_asked.wait()
    running.cancel()

    assert world.firewall.asked[0].local_replicas is asked

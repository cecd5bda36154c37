"""A node with a published port beside a firewall of its host, looked after as an agent does."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from mesh.dataplane import netns
from mesh.dataplane.firewall import Firewall, Mode
from mesh.delta import Delta
from mesh.errors import ApplyFailed, CommandFailed, NotFound
from mesh.model.address import FAMILIES, Family
from mesh.model.publish import Protocol
from mesh.rules import marks
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.needs import Wanted
from tests.support import rules
from tests.support.echo import ask
from tests.support.onenode import ADDRESSES, SERVER_PORT, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mesh.model.report import Problem

PORT: Final = 30080
NODE: Final = "/run/netns/node"
WANTED: Final = Wanted(
    overlay=rules.DEVICES.overlay,
    steering=rules.DEVICES.steering,
    bridge=rules.DEVICES.bridge,
    wireguard_port=51820,
    steering_port=4790,
    ours=marks.DEFAULT.ours,
    endpoints=frozenset(FAMILIES),
)
FORWARDINGS: Final = tuple(
    Forwarding(
        f"web/{protocol.value}",
        (Frontend(Scope.INGRESS, None, protocol, PORT),),
        tuple(Backend(a, SERVER_PORT) for a in ADDRESSES["c1"]),
    )
    for protocol in Protocol
)
HEALED_WITHIN: Final = 30.0
"""Seconds on a crowded machine; on a quiet one it takes less than one."""


@contextmanager
def published(backend: str) -> Iterator[OneNode]:
    """A world in which a port of both protocols is published."""
    with one_node(backend) as made:
        made.publish(FORWARDINGS)
        yield made


@contextmanager
def looked_after(world: OneNode, mode: Mode = Mode.FORWARD) -> Iterator[Firewall]:
    """The node's firewall as a driver has it; the caller says when."""
    with netns.entered(NODE):
        flavour = world.driver.name.removeprefix("iptables-")
        made = Firewall(ignored=world.driver.port, own=flavour, mode=mode)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def kept(world: OneNode, firewall: Firewall) -> Iterator[None]:
    """An agent's loops."""

    async def keep() -> None:
        while True:
            await firewall.sync(WANTED)
            await firewall.wait(1)
            await asyncio.sleep(0.05)

    async def heal() -> None:
        while True:
            await _mend(world)
            await world.driver.tampered(0)

    with world.node.running(heal()), world.node.running(keep()):
        yield


async def _mend(world: OneNode) -> None:
    """What an agent does about damage, until it succeeds."""
    while True:
        try:
            await world.driver.prepare()
            wanted = world.lowered(FORWARDINGS)
            await world.driver.apply(Delta.between(await world.driver.read(), wanted))
            await world.driver.attach()
        except (ApplyFailed, CommandFailed, NotFound):  # the other one is still at it
            await asyncio.sleep(0.2)
        else:
            return


def sync(world: OneNode, firewall: Firewall, wanted: Wanted = WANTED) -> tuple[Problem, ...]:
    """What is told once nothing is left to be done."""

    async def settle() -> tuple[Problem, ...]:
        while True:
            told = await firewall.sync(wanted)
            if firewall.is_settled:
                return told
            await asyncio.sleep(0.05)

    return world.node.run(settle())


def ask_port(family: Family, patience: float = 10.0) -> set[str]:
    node = ADDRESSES["node"][FAMILIES.index(family)]
    return {ask("client", protocol, node, PORT, patience=patience) for protocol in Protocol}


def answered(family: Family) -> set[str]:
    return {f"c1 {ADDRESSES['client'][FAMILIES.index(family)]}"}


def answers() -> bool:
    """Whether the port does, sooner or later."""
    end = time.monotonic() + HEALED_WITHIN
    while not all(_connects(p, patience=2) for p in Protocol):
        if time.monotonic() > end:
            return False
    return True


def longest_gap(act: Callable[[], None]) -> float:
    """The longest time, in seconds, in which every new connection failed while something was done;
    one that only took longer did not fail.
    """
    done = threading.Event()

    def run() -> None:
        try:
            act()
        finally:
            done.set()

    actor = threading.Thread(target=run)
    actor.start()
    longest, failing_since = 0.0, None
    while not done.wait(0.02) or failing_since is not None:
        now = time.monotonic()
        if failing_since is not None:
            longest = max(longest, now - failing_since)
        if _connects():
            failing_since = None
        elif failing_since is None:
            failing_since = now
        assert longest < HEALED_WITHIN
    actor.join()
    return longest


def _connects(protocol: Protocol = Protocol.TCP, patience: float = 20) -> bool:
    for family in FAMILIES:
        node = ADDRESSES["node"][FAMILIES.index(family)]
        try:
            if {ask("client", protocol, node, PORT, patience=patience)} != answered(family):
                return False
        except OSError:  # a firewall's "prohibited"
            return False
    return True


def obey(world: OneNode, problem: Problem) -> None:
    """Run the command that a problem names."""
    world.node.sh("sh", "-c", problem.message.split("`")[1])

"""Echoes over a device between two machines: what comes back, and what is never sent."""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Final

import pytest

from mesh.model.address import FAMILIES, Family
from mesh.reach.sockets import Answer, Echoes
from tests.support.namespaces import Namespace, wire

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.netns

OWN: Final = {Family.V4: "10.0.0.1", Family.V6: "fd12::1"}
PEER: Final = {Family.V4: "10.0.0.2", Family.V6: "fd12::2"}
BITS: Final = {Family.V4: 24, Family.V6: 64}
LIMIT: Final = 30.0
BRIEF: Final = 0.5


class Pair:
    """Two machines, and what one of them asks the other with."""

    def __init__(self) -> None:
        self.near, self.far = Namespace("near"), Namespace("far")
        self.lay()
        self.echoes = Echoes("over0", OWN)

    def lay(self) -> None:
        wire(self.near, "over0", self.far, "over0", *(f"{OWN[f]}/{BITS[f]}" for f in FAMILIES))
        for family in FAMILIES:
            words = ["nodad"] if family is Family.V6 else []
            self.far.sh(
                "ip", "addr", "add", f"{PEER[family]}/{BITS[family]}", "dev", "over0", *words
            )

    def open(self) -> str:
        async def work() -> str:
            return self.echoes.open()

        return self.near.run(work())

    def send(self, family: Family, number: int = 7) -> bool:
        return self.echoes.send(family, PEER[family], number)

    def until_readable(self) -> None:
        """Wait until an answer is there, and leave it."""
        assert select.select(list(self.echoes._open.values()), (), (), LIMIT)[0]

    def received(self, count: int, limit: float = LIMIT) -> list[Answer]:
        found: list[Answer] = []
        deadline = time.monotonic() + limit
        while len(found) < count and time.monotonic() < deadline:
            found += self.echoes.receive()
            time.sleep(0.01)
        return found

    def close(self) -> None:
        self.echoes.close()
        self.near.close()
        self.far.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_the_peers_kernel_answers_in_both_families(pair: Pair) -> None:
    assert pair.open() == ""
    assert pair.echoes.families == FAMILIES

    sent = [pair.send(family, 4000 + family.value) for family in FAMILIES]
    found = pair.received(2)

    assert sent == [True, True]
    assert {(a.number, a.family) for a in found} == {(4004, Family.V4), (4006, Family.V6)}
    assert all(0 < answer.trip < LIMIT for answer in found)


def test_how_long_an_answer_took_does_not_depend_on_when_it_is_read(pair: Pair) -> None:
    pair.open()
    sent = time.monotonic()
    pair.send(Family.V4)
    pair.until_readable()
    there = time.monotonic() - sent
    time.sleep(BRIEF)  # as a reader that is late

    (answer,) = pair.received(1)

    assert answer.trip <= there


def test_echoes_of_others_and_of_an_agent_before_are_none_of_ours(pair: Pair) -> None:
    other = Echoes("over0", OWN)
    pair.open()

    async def work() -> str:
        return other.open()

    assert pair.near.run(work()) == ""
    for family in FAMILIES:
        other.send(family, PEER[family], 9)
    pair.send(Family.V4)
    found = pair.received(4, BRIEF)
    other.close()

    assert [answer.number for answer in found] == [7]


def test_what_drops_echoes_is_silent_and_what_cannot_be_sent_is_told(pair: Pair) -> None:
    pair.open()
    pair.far.sh("sysctl", "-qw", "net.ipv4.icmp_echo_ignore_all=1")

    assert pair.send(Family.V4)
    assert pair.received(1, BRIEF) == []

    pair.near.sh("ip", "link", "set", "over0", "down")
    assert not pair.send(Family.V4)


def test_no_probe_leaves_by_another_device(pair: Pair) -> None:
    """Not even where a route says so."""
    wire(pair.near, "under0", pair.far, "under0")
    pair.open()
    before = _transmitted(pair.near, "under0")
    pair.near.sh("ip", "route", "del", "10.0.0.0/24", "dev", "over0")
    pair.near.sh("ip", "route", "add", "10.0.0.0/24", "dev", "under0")

    for _ in range(5):
        pair.send(Family.V4)
    pair.received(1, BRIEF)

    assert _transmitted(pair.near, "under0") == before


def _transmitted(namespace: Namespace, device: str) -> list[str]:
    """Neighbours that were asked for: a packet would ask first."""
    return namespace.sh("ip", "-4", "neigh", "show", "dev", device).splitlines()


def test_a_device_that_is_made_anew_is_probed_again(pair: Pair) -> None:
    pair.open()
    pair.near.sh("ip", "link", "del", "over0")
    assert not pair.send(Family.V4)
    assert not pair.send(Family.V6)
    assert pair.open() != ""

    pair.lay()

    assert pair.open() == ""
    assert pair.send(Family.V4)
    assert pair.send(Family.V6)
    assert len(pair.received(2)) == 2

"""Beside Docker's rules, and the real ufw and firewalld: before, while and after they reload."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest

from mesh.model.address import Family
from tests.support import docker, drivers, firewalls
from tests.support.echo import SILENCE
from tests.support.guarded import (
    NODE,
    WANTED,
    answers,
    ask_port,
    kept,
    longest_gap,
    looked_after,
    published,
    sync,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.onenode import OneNode

pytestmark = pytest.mark.netns

FLAVOURS: Final = ("nft", "legacy")
INPUT_PORTS: Final = ("51820", "4790")


@pytest.fixture
def world() -> Iterator[OneNode]:
    with published("nftables") as made:
        yield made


# ---- Docker's rules


@pytest.mark.parametrize("version", docker.VERSIONS)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("backend", drivers.KERNEL)
def test_ports_answer_beside_docker_while_it_reloads_and_after(
    backend: str, flavour: str, version: str
) -> None:
    with published(backend) as world, looked_after(world) as firewall:
        docker.start(world.node.sh, version, flavour)
        dropped = ask_port(Family.V4, patience=0.7)

        with kept(world, firewall):
            before = answers()
            gap = longest_gap(lambda: docker.reload(world.node.sh, version, flavour))
            after = answers()
        told = sync(world, firewall)

    assert backend == f"iptables-{flavour}" or dropped == {SILENCE}
    assert (before, after) == (True, True)
    assert told == ()
    assert gap == 0 or backend == f"iptables-{flavour}"


# ---- ufw


@firewalls.needed
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("backend", drivers.KERNEL)
def test_ports_answer_beside_ufw_while_it_reloads_and_after(backend: str, flavour: str) -> None:
    with (
        published(backend) as world,
        firewalls.ufw(NODE, flavour) as ufw,
        looked_after(world) as firewall,
        kept(world, firewall),
    ):
        before = answers()
        gap = longest_gap(lambda: _discard(ufw.sh("ufw", "reload")))
        after = answers()

    assert (before, after) == (True, True)
    assert gap == 0 or backend == f"iptables-{flavour}"


def _discard(_said: str) -> None:
    pass


@firewalls.needed
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_lines_that_are_told_open_what_ufw_closes(world: OneNode, flavour: str) -> None:
    with firewalls.ufw(NODE, flavour) as ufw, looked_after(world) as firewall:
        told = sync(world, firewall)
        for problem in told:
            ufw.sh("sh", "-c", problem.message.split("`")[1])
        after = sync(world, firewall)

    assert {f"iptables-{flavour}", f"ip6tables-{flavour}"} == {
        word.rstrip(",") for p in told for word in p.about.split() if "tables" in word
    }
    assert all(any(port in p.message for p in told) for port in INPUT_PORTS)
    assert after == ()


# ---- firewalld


@firewalls.needed
@pytest.mark.parametrize("kind", ["nftables", "iptables"])
@pytest.mark.parametrize("backend", drivers.KERNEL)
def test_ports_answer_beside_firewalld_while_it_reloads_and_after(backend: str, kind: str) -> None:
    with (
        published(backend) as world,
        firewalls.firewalld(NODE, kind) as firewalld,
        looked_after(world) as firewall,
        kept(world, firewall),
    ):
        before = answers()
        gap = longest_gap(lambda: _discard(firewalld.sh("firewall-cmd", "--reload")))
        after = answers()

    assert (before, after) == (True, True)
    # It flushes what others have in tables of iptables-nft; with iptables, it refuses for a moment.
    assert gap == 0 or backend == "iptables-nft" or kind == "iptables"


@firewalls.needed
@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_the_lines_that_are_told_open_what_firewalld_closes(world: OneNode, backend: str) -> None:
    wanted = replace(WANTED, local_replicas=True)
    with firewalls.firewalld(NODE, backend) as firewalld, looked_after(world) as firewall:
        told = sync(world, firewall, wanted)
        for problem in told:
            firewalld.sh("sh", "-c", problem.message.split("`")[1])
        after = sync(world, firewall, wanted)
        firewalld.sh("firewall-cmd", "--reload")
        reloaded = sync(world, firewall, wanted)

    if backend == "nftables":
        assert any("inet firewalld chain filter_FORWARD" in p.about for p in told)
        assert any("inet firewalld chain filter_INPUT" in p.about for p in told)
    assert all(any(port in p.message for p in told) for port in INPUT_PORTS)
    assert (after, reloaded) == ((), ())

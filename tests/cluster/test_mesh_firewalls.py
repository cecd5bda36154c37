"""A replica's node behind a real firewall with its defaults: what is told opens what it closes.

One lab of two nodes; the replica is on n2, where the firewall starts, and clients come by n1.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.support import firewalls
from tests.support.cluster import Cluster, cluster, ingress, until
from tests.support.requests import Answer, ask_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.firewalls import Machine

pytestmark = [pytest.mark.cluster, firewalls.needed]

WEB: Final = 8080


@pytest.fixture
def mesh() -> Iterator[Cluster]:
    with cluster("firewalls", 2, ("b1", "n2")) as made:
        asyncio.run(_furnish(made))
        yield made


async def _furnish(mesh: Cluster) -> None:
    mesh.service("web", *ingress(WEB))
    mesh.task("web", "b1")
    await mesh.allocated("web")
    await until(lambda: _answers(mesh), "the replica answers through n1")


async def _answers(mesh: Cluster) -> bool:
    outcomes = await ask_all(mesh.from_outside(WEB, "n1"), patience=2)
    return all(isinstance(outcome, Answer) for outcome in outcomes)


def _problems(mesh: Cluster) -> list[dict[str, Any]]:
    found = json.loads(mesh.problems("n2"))
    return [each for each in found if each["about"].startswith("firewall")]


async def _obey(mesh: Cluster, machine: Machine) -> None:
    for problem in _problems(mesh):
        machine.sh("sh", "-c", problem["message"].split("`")[1])
    await until(lambda: not _problems(mesh), "nothing is wrong any more")
    await until(lambda: _answers(mesh), "the replica answers through n1 again")


async def test_firewalld(mesh: Cluster) -> None:
    with firewalls.firewalld(mesh.netns("n2")) as machine:
        await until(lambda: bool(_problems(mesh)), "it is told")
        about = " ".join(each["about"] for each in _problems(mesh))
        closed = not await _answers(mesh)

        await _obey(mesh, machine)
        machine.sh("firewall-cmd", "--reload")
        await until(lambda: _answers(mesh), "the replica answers after a reload")
        told = _problems(mesh)

    assert "nft table inet firewalld chain filter_FORWARD" in about
    assert closed
    assert told == []


@pytest.mark.parametrize("flavour", ["nft", "legacy"])
async def test_ufw(mesh: Cluster, flavour: str) -> None:
    with firewalls.ufw(mesh.netns("n2"), flavour) as machine:
        await until(lambda: bool(_problems(mesh)), "it is told")
        about = " ".join(each["about"] for each in _problems(mesh))
        closed = not await _answers(mesh)

        await _obey(mesh, machine)
        machine.sh("ufw", "reload")
        await until(lambda: _answers(mesh), "the replica answers after a reload")
        await until(lambda: not _problems(mesh), "nothing is wrong after a reload")

    assert f"iptables-{flavour} chain INPUT" in about
    assert "FORWARD" not in about
    assert closed

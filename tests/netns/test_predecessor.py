"""Whose rules an agent takes over: those of earlier versions, none of later ones."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from mesh.dataplane import command, nfmessages, xtlegacy
from mesh.dataplane.nfnetlink import Socket
from mesh.engine import predecessor
from mesh.errors import HostNotReady
from mesh.model.address import Family
from mesh.rules import elements, xtables
from mesh.rules import program as programs
from mesh.rules.edition import EDITION, SLOT
from tests.netns.test_iptables import lowered
from tests.support import drivers, rules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.dataplane.protocol import Driver

pytestmark = pytest.mark.netns

GOLDEN: Final = Path(__file__).parent.parent / "golden" / "edition0"
"""Rules of a version from before there were editions."""

BACKENDS: Final = ("nftables", "iptables-legacy", "iptables-nft")


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with rules.namespace():
        yield


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def driver(backend: str) -> Iterator[Driver]:
    made = drivers.make(backend, rules.PARAMETERS)
    yield made
    made.close()


def feed(file: str, *argv: str) -> None:
    text = (GOLDEN / file).read_text()
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def load_the_old(backend: str) -> None:
    if backend == "nftables":
        feed("nftables.nft", "nft", "-f", "-")
        return
    feed("ipset.save", "ipset", "restore")
    for name in ("iptables", "ip6tables"):
        feed(f"{name}.save", f"{name}-{backend.removeprefix('iptables-')}-restore")


async def test_a_host_without_rules_is_taken_and_stays_without() -> None:
    await predecessor.check()

    assert rules.nft("list", "ruleset") == ""
    assert xtlegacy.names(Family.V4) == []


async def test_rules_from_before_editions_are_taken_over(driver: Driver, backend: str) -> None:
    load_the_old(backend)

    await predecessor.check()
    await driver.prepare()

    same = backend != "nftables" or f"{programs.build(rules.PARAMETERS).schema:#x}" == "0x9f780ba6"
    assert await driver.read() == (lowered() if same else {})
    await predecessor.check()


async def test_rules_of_this_edition_are_taken_over(driver: Driver) -> None:
    await driver.prepare()

    await predecessor.check()


async def test_rules_of_a_later_edition_are_refused(driver: Driver, backend: str) -> None:
    await driver.prepare()
    if backend == "nftables":
        _set_edition(EDITION + 1)
    else:
        words = ("-m", "comment", "--comment", f"0123abcd.0123abcd/{EDITION + 1}")
        for name in ("iptables", "ip6tables"):
            program = f"{name}-{backend.removeprefix('iptables-')}"
            await command.run(program, "-t", "raw", "-R", xtables.CANARY, "1", *words)

    with pytest.raises(HostNotReady, match=f"edition {EDITION + 1}"):
        await predecessor.check()


def _set_edition(number: int) -> None:
    key = elements.mark_bytes(SLOT)
    netlink = Socket()
    gone = nfmessages.removals("fingerprint", [key])
    new = nfmessages.additions("fingerprint", [(key, elements.mark_bytes(number))])
    netlink.transact([chunk.message for chunk in (*gone, *new)])
    netlink.close()

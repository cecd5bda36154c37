"""The nftables driver beyond the common contract: adoption, upgrades, damage, other people."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from mesh.dataplane.nftables import NftablesDriver
from mesh.dataplane.nfwatch import Watch
from mesh.delta import Delta
from mesh.errors import ApplyFailed
from mesh.model.publish import Protocol
from mesh.rules import elements, nft
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.ids import Ids
from tests.support import rules

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from mesh.rules.elements import Elements

pytestmark = pytest.mark.netns

_PORT = Frontend(Scope.INGRESS, None, Protocol.TCP, 30000)
SERVICE: Elements = nft.lower(
    Forwarding("web", (_PORT,), tuple(Backend(f"10.0.{i >> 8}.{i & 255}", 80) for i in range(300))),
    Ids(),
)
"""A service of 300 replicas: its size is none of those in the program's text."""


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with rules.namespace():
        yield


@pytest.fixture
async def driver() -> AsyncIterator[NftablesDriver]:
    found = NftablesDriver(rules.PARAMETERS)
    await found.prepare()
    await found.attach()
    await found.apply(Delta(add=SERVICE))
    yield found
    found.close()


def ruleset() -> list[str]:
    """Everything loaded but counters, handles and the driver's own notes, in a stable order."""
    listed = json.loads(rules.nft("-j", "-s", "list", "ruleset"))["nftables"]
    told = (json.dumps(_stable(each), sort_keys=True) for each in listed)
    return sorted(each for each in told if '"name": "fingerprint"' not in each)


def _stable(value: object) -> object:
    if isinstance(value, dict):
        return {k: _stable(v) for k, v in value.items() if k not in ("handle", "metainfo")}
    if isinstance(value, list):
        return sorted((_stable(each) for each in value), key=json.dumps)
    return value


async def test_a_restarted_agent_adopts_the_program_without_a_write(
    driver: NftablesDriver,
) -> None:
    watch = Watch()
    second = NftablesDriver(rules.PARAMETERS)

    await second.prepare()

    assert watch.read() == []
    assert await second.read() == SERVICE
    second.close()
    watch.close()


async def test_another_version_replaces_the_program_and_keeps_the_elements(
    driver: NftablesDriver,
) -> None:
    parameters = replace(rules.PARAMETERS, steering_port=4799, closed=(("192.0.2.0/24",), ()))
    second = NftablesDriver(parameters)

    await second.prepare()

    assert await second.read() == SERVICE
    assert "4799" in rules.nft("list", "chain", "inet", "mesh", "tunnel_in")
    assert "127.0.0.0" not in rules.nft("list", "chain", "inet", "mesh", "here4")
    assert "mod 300 " in rules.nft("list", "chain", "inet", "mesh", "random_300")
    second.close()


async def test_a_program_without_a_fingerprint_is_created_anew(driver: NftablesDriver) -> None:
    rules.nft("delete element inet mesh fingerprint { 0 }")
    second = NftablesDriver(rules.PARAMETERS)

    await second.prepare()

    assert await second.read() == {}
    second.close()


async def test_a_program_with_other_sets_goes_on_until_its_successor_is_whole(
    driver: NftablesDriver,
) -> None:
    whole = ruleset()
    rules.nft("delete element inet mesh fingerprint { 0 }")
    rules.nft("add element inet mesh fingerprint { 0 : 7 }; add set inet mesh old { type mark; }")
    before = ruleset()
    second = NftablesDriver(rules.PARAMETERS)

    await second.prepare()
    await second.apply(Delta(add=SERVICE))
    meanwhile = ruleset(), await second.read(), second.predecessor().items() <= SERVICE.items()
    await second.attach()

    assert meanwhile == (before, SERVICE, True)
    assert await second.read() == SERVICE
    assert ruleset() == whole
    second.close()


async def test_a_table_of_the_same_name_without_a_fingerprint_is_replaced() -> None:
    rules.nft("add table inet mesh; add chain inet mesh theirs")
    driver = NftablesDriver(rules.PARAMETERS)

    await driver.prepare()

    assert await driver.read() == {}
    assert "theirs" not in rules.nft("list", "table", "inet", "mesh")
    driver.close()


@pytest.mark.parametrize(
    "damage",
    [
        "flush table inet mesh",
        "flush chain inet mesh dispatch",
        "flush chain inet mesh random_300",
        "insert rule inet mesh nat_pre drop",
        "delete element inet mesh sizes { 300 }",
        "add element inet mesh own4 { 192.0.2.1 }",
        "add chain inet mesh forward { policy drop; }",
        "add chain inet mesh theirs { type filter hook input priority 0; policy drop; }",
        "add table inet mesh { flags dormant; }",
        "flush table inet mesh; delete set inet mesh own4; delete set inet mesh limited",
        "delete table bridge mesh",
        "flush table bridge mesh",
    ],
)
async def test_damage_is_mended_and_elements_stay(driver: NftablesDriver, damage: str) -> None:
    before = ruleset()
    rules.nft(damage)
    assert ruleset() != before

    await driver.prepare()

    assert ruleset() == before
    assert await driver.read() == SERVICE


async def test_tables_of_others_are_left_alone(driver: NftablesDriver) -> None:
    rules.nft("add table ip mesh; add table inet other { chain input { drop; }; }")
    rules.nft("add table bridge meshes")

    await driver.prepare()
    await driver.remove()

    assert set(rules.nft("list", "tables").splitlines()) == {
        "table ip mesh",
        "table inet other",
        "table bridge meshes",
    }


async def test_changes_are_heard_with_who_made_them(driver: NftablesDriver) -> None:
    watch = Watch()

    await driver.apply(Delta(add=rules.samples(elements.SETS["nodes4"], 1)))
    ours = watch.read() or []
    rules.nft("delete table inet mesh")
    theirs = watch.read() or []

    assert [(event.kind, event.table, event.name) for event in ours[:1]] == [
        ("new element", "mesh", "nodes4")
    ]
    assert ours[-1].kind == "commit"
    assert {event.port for event in ours} == {driver.port}
    assert ("del table", "mesh") in {(event.kind, event.table) for event in theirs}
    assert driver.port not in {event.port for event in theirs}
    watch.close()


def refusing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nft refuse whatever contains a text."""
    fake = tmp_path / "nft"
    fake.write_text(
        "#!/bin/sh\ntext=$(cat)\ncase $text in\n"
        f'*"{text}"*) echo "Error: Operation not supported" >&2; exit 1;;\nesac\n'
        f'printf "%s\\n" "$text" | PATH={os.environ["PATH"]} exec nft "$@"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


async def test_a_successor_too_large_for_one_transaction_is_loaded_in_parts(
    driver: NftablesDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ruleset()
    rules.nft("delete element inet mesh fingerprint { 0 }")
    rules.nft("add element inet mesh fingerprint { 0 : 7 }")
    refusing("element inet mesh targets4", tmp_path, monkeypatch)
    second = NftablesDriver(rules.PARAMETERS)

    await second.prepare()
    await second.apply(Delta(add=SERVICE))
    await second.attach()

    assert await second.read() == SERVICE
    assert ruleset() == whole
    second.close()


async def test_a_kernel_without_bridge_tables_is_still_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing("table bridge", tmp_path, monkeypatch)
    driver = NftablesDriver(rules.PARAMETERS)

    with caplog.at_level(logging.WARNING):
        await driver.prepare()
        await driver.apply(Delta(add=SERVICE))

    assert "Operation not supported" in caplog.text
    assert await driver.read() == SERVICE
    driver.close()


async def test_a_change_beyond_the_send_buffer_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.dataplane.nfnetlink._SEND_BUFFER", 50_000)
    driver = NftablesDriver(rules.PARAMETERS)
    await driver.prepare()
    wanted = rules.samples(elements.SETS["targets6"], 10_000)

    await driver.apply(Delta(add=wanted))
    found = await driver.read()
    missing = rules.samples(elements.SETS["hairpin6"], 3)
    with pytest.raises(ApplyFailed, match="hairpin6"):
        await driver.apply(Delta({**wanted, **missing}))

    assert found == wanted
    driver.close()


IN_USER_NAMESPACE = """
import asyncio
from mesh.dataplane.nftables import NftablesDriver
from mesh.delta import Delta
from mesh.rules import elements
from tests.support import rules

async def main():
    driver = NftablesDriver(rules.PARAMETERS)
    await driver.prepare()
    wanted = rules.samples(elements.SETS["targets6"], 2000)
    await driver.apply(Delta(add=wanted))
    assert await driver.read() == wanted
    await driver.apply(Delta(remove=wanted))
    assert await driver.read() == {}

asyncio.run(main())
"""


def test_a_node_in_a_user_namespace_works_with_the_buffers_it_may_have() -> None:
    words = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c"]

    done = subprocess.run([*words, IN_USER_NAMESPACE], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


WITHOUT_RIGHTS = """
import asyncio
from mesh.dataplane.nftables import NftablesDriver
from mesh.errors import HostNotReady
from tests.support import rules

try:
    asyncio.run(NftablesDriver(rules.PARAMETERS).prepare())
except HostNotReady as error:
    print(error)
"""


def test_without_rights_the_host_is_not_ready_and_says_why() -> None:
    words = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]

    done = subprocess.run(
        [*words, sys.executable, "-c", WITHOUT_RIGHTS], capture_output=True, text=True, check=False
    )

    assert "CAP_NET_ADMIN" in done.stdout, done.stderr

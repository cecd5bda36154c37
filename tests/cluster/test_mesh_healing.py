"""What happens when somebody else flushes, deletes or changes the mesh's rules: it is put right.

One lab of two nodes with a replica on the first; the rules of the second are tampered with.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.support import gateway
from tests.support.cluster import Cluster, cluster, ingress, until
from tests.support.requests import Answer, Ask, ask_all

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cluster

WEB: Final = 8080
KINDS: Final = ("vips", "meshports", "targets", "known", "nodes", "via", "zones")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Cluster]:
    with cluster("healing", 2, ("a1", "n1")) as made:
        asyncio.run(_furnish(made))
        yield made


async def _furnish(mesh: Cluster) -> None:
    mesh.service("web", *ingress(WEB))
    mesh.task("web", "a1")
    await mesh.allocated("web")


@pytest.fixture(scope="module")
def whole(mesh: Cluster) -> dict[str, str]:
    return mesh.elements("n2", *KINDS)


async def _intact(mesh: Cluster, whole: dict[str, str]) -> None:
    await until(lambda: _has_table(mesh) and mesh.elements("n2", *KINDS) == whole, "as before")


def _asks(mesh: Cluster) -> list[Ask]:
    return mesh.from_outside(WEB, "n2")


def _has_table(mesh: Cluster) -> bool:
    return "table inet mesh" in mesh.sh("n2", "nft", "list", "tables")


@pytest.mark.parametrize(
    "tampering",
    [
        "flush ruleset",
        "delete table inet mesh",
        "delete table bridge mesh",
        "flush map inet mesh targets4",
        "flush chain inet mesh dispatch",
        "flush chain inet mesh raw_pre",
        "delete element inet mesh meshports6 { tcp . 8080 }",
        "add element inet mesh meshports4 { tcp . 9999 : 0x10403 }",
        "add rule inet mesh services counter drop",
        "insert rule inet mesh forward drop",
    ],
)
async def test_tampered_rules_are_put_right(
    mesh: Cluster, whole: dict[str, str], tampering: str
) -> None:
    await _intact(mesh, whole)

    mesh.sh("n2", "nft", tampering)
    await _intact(mesh, whole)

    async def all_answer() -> bool:
        outcomes = await ask_all(_asks(mesh), patience=1.5)
        return all(isinstance(outcome, Answer) for outcome in outcomes)

    await until(all_answer, "every way through n2 works again")


async def test_other_peoples_tables_are_left_alone(mesh: Cluster, whole: dict[str, str]) -> None:
    mesh.sh("n2", "nft", "add table inet other; add chain inet other mine; "
            "add rule inet other mine counter")  # fmt: skip
    theirs = mesh.sh("n2", "nft", "list", "table", "inet", "other")

    mesh.sh("n2", "nft", "delete table inet mesh")
    await _intact(mesh, whole)

    assert mesh.sh("n2", "nft", "list", "table", "inet", "other") == theirs


def _healings(mesh: Cluster) -> dict[str, Any]:
    found: dict[str, Any] = mesh.records.get("applied/n2")["healings"]
    return found


async def test_who_did_what_is_counted_and_told(mesh: Cluster, whole: dict[str, str]) -> None:
    """What happens while something else is healed counts as one with it: so try until it is alone,
    and has been reported.
    """
    before = _healings(mesh)["elements"]

    async def told() -> bool:
        await _intact(mesh, whole)
        mesh.sh("n2", "nft", "delete element inet mesh meshports4 { tcp . 8080 }")
        await _intact(mesh, whole)
        for _ in range(120):
            last = _healings(mesh)["last"] or {"what": "", "by": ""}
            if last["what"] == "del element in meshports4" and last["by"].startswith("nft("):
                return True
            await asyncio.sleep(0.1)
        return False

    await until(told, "the healing is reported with who made it necessary")
    assert _healings(mesh)["elements"] > before


async def test_a_looping_tool_is_named_and_floods_nobody(
    mesh: Cluster, whole: dict[str, str]
) -> None:
    await _intact(mesh, whole)
    total, written = _healings(mesh)["total"], _version(mesh)
    began = asyncio.get_running_loop().time()

    for _ in range(12):
        mesh.sh("n2", "nft", "flush chain inet mesh dispatch")
        await _intact_again(mesh)
    await until(lambda: _healings(mesh)["total"] >= total + 12, "all healings are reported")
    await until(lambda: "nft(" in mesh.problems("n2"), "the tool is named")
    elapsed = asyncio.get_running_loop().time() - began
    status = (sys.executable, "-m", "mesh", "status", "--config", "/run/lab/agent.toml")
    shown = await mesh.lab.run("n2", status)

    assert "keeps changing" in mesh.problems("n2")
    assert "flush" not in mesh.problems("n2")  # a flush is told as what it removes
    assert _version(mesh) - written <= 3 + elapsed / 5
    assert "degraded" in shown.stdout
    assert "healed" in shown.stdout


async def _intact_again(mesh: Cluster) -> None:
    def dispatches() -> bool:
        return "vmap @sizes" in mesh.sh("n2", "nft", "list", "chain", "inet", "mesh", "dispatch")

    await until(dispatches, "the chain is as before")


def _version(mesh: Cluster) -> int:
    """How often the node's report was written."""
    found = mesh.records.call("kv/range", {"key": gateway.full("applied/n2")})
    return int(found["kvs"][0]["version"])

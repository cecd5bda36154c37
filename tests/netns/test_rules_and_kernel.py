"""What `mesh rules` prints is what nft takes; what it and `mesh trace` say of a kernel is true."""

from __future__ import annotations

import asyncio
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from mesh.agent import config
from mesh.dataplane.nftables import NftablesDriver
from mesh.delta import Delta
from mesh.model.publish import Protocol
from mesh.model.service import Affinity
from mesh.rules import dump, elements, nft
from mesh.rules.dump import Rules
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.ids import Ids
from mesh.store.memory import MemoryStore
from tests.support import rules
from tests.support.commands import CommandLine, add_web, start_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mesh.rules.elements import Elements
    from mesh.rules.program import Parameters

pytestmark = pytest.mark.netns

CLIENT = "203.0.113.9"


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with rules.namespace():
        yield


def of_kernel(parameters: Parameters, change: Delta[Any, Any] | None = None) -> Elements:
    """What the kernel holds, after a change if there is one."""

    async def work() -> Elements:
        driver = NftablesDriver(parameters)
        try:
            if change is not None:
                await driver.prepare()
                await driver.apply(change)
            return await driver.read()
        finally:
            driver.close()

    return asyncio.run(work())


def _everything() -> Elements:
    """Something of every set, and pools of sizes that are not in the program's text."""
    found: Elements = {}
    for spec in elements.SETS.values():
        if spec.name not in elements.FRONTENDS | elements.TARGETS | {"via", "zones"}:
            found |= rules.samples(spec, 3)
    found |= nft.lower_peer(rules.CLUSTER.network(2))
    ids = Ids()
    pool = tuple(Backend(a, 80, w) for w, a in ((200, "10.0.1.5"), (99, "10.0.2.5"), (1, "fd::5")))
    for scope, address in (
        (Scope.VIP, "10.1.0.1"),
        (Scope.VIP, "fd11:2233:4455:f000::1"),
        (Scope.HOST_IP, "192.0.2.1"),
        (Scope.INGRESS, None),
        (Scope.NODE, None),
    ):
        for affinity, protocol in zip(Affinity, Protocol, strict=True):
            frontend = Frontend(scope, address, protocol, 80)
            key = f"{scope} {address} {affinity}"
            found |= nft.lower(Forwarding(key, (frontend,), pool, affinity=affinity), ids)
    return found


def test_what_is_shown_can_be_loaded_and_is_the_same_in_the_kernel() -> None:
    wanted = _everything()
    shown = Rules("n1", "desired", rules.PARAMETERS, (), {"web": wanted})

    text = "\n".join(dump.text(shown)) + "\n"
    done = subprocess.run(
        ["nft", "-f", "-"], input=text, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert of_kernel(rules.PARAMETERS) == wanted
    assert "mod 299 map @targets4" in rules.nft("list", "chain", "inet", "mesh", "random_299")


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """The command line on n1, whose kernel holds what it should."""
    path = tmp_path / "agent.toml"
    path.write_text(config.dump(config.AgentConfig(node="n1")))
    monkeypatch.setattr(config, "DEFAULT_PATH", path)
    command_line = CommandLine(MemoryStore())
    start_cluster(command_line)
    add_web(command_line)
    loaded = dump.load(command_line.ok("rules", "show", "--json").encode())
    of_kernel(loaded.parameters, Delta(add=loaded.elements))
    return command_line


def test_a_kernel_that_holds_what_it_should_has_no_difference(cli: CommandLine) -> None:
    found = cli.json("rules", "diff")

    assert (found["equal"], found["add"], found["remove"]) == (True, [], [])
    assert (
        cli.ok("rules", "show", "--kernel").splitlines()[1:]
        == (cli.ok("rules", "show").splitlines()[1:])
    )
    assert cli.json("trace", CLIENT, "n1:8080")["agrees"] is True


def test_a_difference_is_told_element_by_element_and_step_by_step(cli: CommandLine) -> None:
    rules.nft("delete", "element", "inet", "mesh", "meshports4", "{ tcp . 8080 }")
    rules.nft("add", "element", "inet", "mesh", "nodes4", "{ 198.51.100.1 }")

    differing = cli.run("rules", "diff")
    traced = cli.run("trace", CLIENT, "n1:8080")
    walked = cli.run("trace", CLIENT, "n1:8080", "--json")

    lines = differing.stdout.splitlines()
    assert (differing.exit_code, traced.exit_code, walked.exit_code) == (1, 1, 1)
    assert lines == ["+ meshports4 { tcp . 8080 : 0x10401 }", "- nodes4 { 198.51.100.1 }"]
    assert any(
        x.startswith("+") and "ingress port tcp . 8080" in x for x in traced.stdout.splitlines()
    )
    assert '"agrees": false' in walked.stdout
    assert "wanted by nobody" in cli.ok("rules", "show", "--kernel")


def test_frontend_ids_are_those_of_the_kernel(cli: CommandLine) -> None:
    cli.put("/mesh/services/a-first", {"name": "a-first", "ports": [], "vip": "none"})
    cli.allocate("a-first", 2, ("tcp", 8081, 80))
    port = {"target": 80, "published": 8081, "mode": "ingress"}
    cli.put("/mesh/services/a-first", {"name": "a-first", "ports": [port]})

    shown = cli.ok("rules", "show", "--service", "web")
    changes = cli.run("rules", "diff", "--json").stdout

    assert "meshports4 { tcp . 8080 : 0x10401 }" in shown
    assert "8080" not in changes


def test_another_program_is_a_difference(cli: CommandLine) -> None:
    rules.nft("flush", "map", "inet", "mesh", "fingerprint")

    result = cli.run("rules", "diff")

    assert result.exit_code == 1
    assert "the program in the kernel" in result.stdout


def test_a_kernel_without_our_table_is_said_to_have_none(cli: CommandLine) -> None:
    rules.nft("delete", "table", "inet", "mesh")

    result = cli.run("rules", "diff")
    traced = cli.json("trace", CLIENT, "n1:8080")

    assert result.exit_code == 1
    assert "table inet mesh" in result.stderr
    assert (traced["kernel"], traced["agrees"]) == (None, None)

"""What `mesh rules` prints is what the backend takes; what is said of a kernel is true."""

from __future__ import annotations

import asyncio
import json
import subprocess
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from mesh.agent import config
from mesh.delta import Delta
from mesh.model.publish import Protocol
from mesh.model.service import Affinity
from mesh.rules import dump, elements, marks, nft, xtables_text
from mesh.rules.dump import Rules
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.ids import Ids
from mesh.store.memory import MemoryStore
from tests.support import drivers, rules
from tests.support.commands import CommandLine, add_web, start_cluster
from tests.support.layouts import ALL, marks_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mesh.rules.elements import Elements
    from mesh.rules.marks import Layout
    from mesh.rules.program import Parameters

pytestmark = pytest.mark.netns

CLIENT = "203.0.113.9"


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with rules.namespace():
        yield


def of_kernel(
    backend: str, parameters: Parameters, change: Delta[Any, Any] | None = None
) -> Elements:
    """What the kernel holds, after a change if there is one; damaged or not."""

    async def work() -> Elements:
        driver = drivers.make(backend, parameters)
        try:
            if change is not None:
                await driver.prepare()
                await driver.apply(change)
                await driver.attach()
            return (await driver.examine()).elements
        finally:
            driver.close()

    return asyncio.run(work())


def _everything(layout: Layout) -> Elements:
    """Something of every set, and pools of sizes that are not in the program's text."""
    found: Elements = {}
    for spec in elements.SETS.values():
        if spec.name not in elements.FRONTENDS | elements.TARGETS | {"via", "zones"}:
            found |= rules.samples(spec, 3, layout)
    found |= nft.lower_peer(rules.CLUSTER.network(2), layout)
    ids = Ids(layout)
    pool = tuple(Backend(a, 80, w) for w, a in ((200, "10.0.1.5"), (99, "10.0.2.5"), (1, "fd::5")))
    for scope, address in (
        (Scope.VIP, "10.1.0.1"),
        (Scope.VIP, "fd11:2233:4455:f000::1"),
        (Scope.HOST_IP, "192.0.2.1"),
        (Scope.INGRESS, None),
        (Scope.NODE, None),
    ):
        for affinity, protocol in zip(cycle(Affinity), Protocol, strict=False):
            frontend = Frontend(scope, address, protocol, 80)
            key = f"{scope} {address} {protocol}"
            found |= nft.lower(Forwarding(key, (frontend,), pool, affinity=affinity), ids)
    return found


def load(text: str) -> None:
    """Give every part of what was shown to the program that it is for."""
    parts: dict[str, str] = {}
    program = "nft -f -"
    for line in text.splitlines():
        if line.startswith("# for: "):
            program = line.removeprefix("# for: ")
        parts[program] = parts.get(program, "") + f"{line}\n"
    for command, part in parts.items():
        done = subprocess.run(
            command.split(), input=part, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), command


@pytest.mark.parametrize("layout", ALL.values(), ids=ALL)
@pytest.mark.parametrize("backend", drivers.KERNEL)
def test_what_is_shown_can_be_loaded_and_is_the_same_in_the_kernel(
    backend: Any, layout: Layout
) -> None:
    wanted = _everything(layout)
    parameters = replace(rules.PARAMETERS, layout=layout)
    shown = Rules("n1", "desired", parameters, (), {"web": wanted}, backend)
    render = dump.text if backend == "nftables" else xtables_text.text

    load("\n".join(render(shown)))

    assert of_kernel(backend, parameters) == wanted
    again = dump.load(msgspec.json.encode(dump.dump(shown)))
    assert (again.parameters, again.elements) == (parameters, wanted)
    if backend == "nftables":
        assert "mod 299 map @targets4" in rules.nft("list", "chain", "inet", "mesh", "random_299")


@pytest.fixture(params=drivers.KERNEL)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def layout() -> Layout:
    return marks.DEFAULT


@pytest.fixture
def cli(
    backend: str, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    """The command line on n1, whose agent drives a backend and whose kernel is as it should be."""
    path = tmp_path / "agent.toml"
    path.write_text(config.dump(config.AgentConfig(node="n1", marks=marks_of(layout))))
    monkeypatch.setattr(config, "DEFAULT_PATH", path)
    command_line = CommandLine(MemoryStore())
    start_cluster(command_line)
    add_web(command_line)
    command_line.apply("n1", backend=backend)
    loaded = dump.load(command_line.ok("rules", "show", "--json").encode())
    of_kernel(backend, loaded.parameters, Delta(add=loaded.elements))
    return command_line


def sh(line: str) -> None:
    done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layout", ALL.values(), ids=ALL)
def test_a_kernel_that_holds_what_it_should_has_no_difference(
    cli: CommandLine, backend: str, layout: Layout
) -> None:
    found = cli.json("rules", "diff")
    wanted = cli.ok("rules", "show")

    assert (found["equal"], found["add"], found["remove"]) == (True, [], [])
    assert (found["backend"], found["differences"]) == (backend, [])
    assert found["program"]["loaded"] == found["program"]["wanted"]
    assert wanted.startswith(f"# {backend} of node n1")
    assert f"0x{layout.frontend(1, 1):x}" in wanted
    assert cli.ok("rules", "show", "--kernel").splitlines()[1:] == wanted.splitlines()[1:]
    traced = cli.json("trace", CLIENT, "n1:8080")
    assert (traced["agrees"], traced["backend"]) == (True, backend)
    assert traced["desired"]["verdict"] == "forwarded"


@pytest.mark.parametrize("reported", [None, "nftables", "iptables-legacy", "iptables-nft", "\x1bx"])
def test_the_kernel_is_read_by_who_holds_it_whatever_was_reported(
    cli: CommandLine, backend: str, reported: str | None
) -> None:
    if reported is None:
        asyncio.run(cli.store.delete("/mesh/applied/n1"))
    else:
        cli.apply("n1", backend=reported)

    found = cli.json("rules", "diff") if reported in (None, backend, "\x1bx") else None
    differing = cli.run("rules", "diff")

    assert found is None or (found["equal"], found["backend"]) == (True, backend)
    assert differing.exit_code == (0 if found is not None else 1)
    if found is None:
        assert differing.stdout.splitlines()[0].startswith(f"! backend {backend}: ")
        assert str(reported) in differing.stdout
        assert len(differing.stdout.splitlines()) == 1


CHANGES = {
    "nftables": (
        "nft delete element inet mesh meshports4 {tcp.8080}",
        "nft add element inet mesh nodes4 {198.51.100.1}",
    ),
    "iptables": (
        "ipset del mesh-meshports4 0.0.0.0/1,tcp:8080",
        "ipset del mesh-meshports4 128.0.0.0/1,tcp:8080",
        "ipset add mesh-nodes4 198.51.100.1",
    ),
}


def test_a_difference_is_told_element_by_element_and_step_by_step(
    cli: CommandLine, backend: str
) -> None:
    for change in CHANGES[backend.partition("-")[0]]:
        sh(change.replace("tcp.8080", "tcp . 8080"))

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


DAMAGES = [
    # fingerprint, foreign rules, foreign and missing chains
    ("nftables", "nft flush map inet mesh fingerprint", "table inet mesh"),
    ("nftables", "nft insert rule inet mesh forward drop", "table inet mesh"),
    ("nftables", "nft insert rule inet mesh forward drop", "table inet mesh, chain forward"),
    ("nftables", "nft flush chain inet mesh steer_back", "table inet mesh, chain steer_back"),
    ("nftables", "nft add chain inet mesh mine", "table inet mesh, chain mine"),
    ("nftables", "nft delete table bridge mesh", "table inet mesh"),
    # jumps, canaries, static chains, pools' chains, sets, and the bridge's table
    ("iptables", "iptables-{} -t raw -D PREROUTING -j MESH-RAW", "iptables-{} -t raw PREROUTING"),
    ("iptables", "iptables-{} -I FORWARD -j ACCEPT", "iptables-{} -t filter FORWARD"),
    ("iptables", "ip6tables-{} -t mangle -F MESH-CANARY", "ip6tables-{} -t mangle"),
    ("iptables", "iptables-{} -I MESH-FORWARD -j DROP", "iptables-{} -t filter"),
    ("iptables", "iptables-{} -I MESH-FORWARD -j DROP", "iptables-{} -t filter MESH-FORWARD"),
    ("iptables", "iptables-{} -t nat -I MESH-P-00001 -j RETURN", "iptables-{} -t nat MESH-P-00001"),
    ("iptables", "iptables-{} -t nat -N MESH-T-4-f", "iptables-{} -t nat MESH-T-4-f"),
    ("iptables", "ipset flush mesh-canary", "ipset mesh-canary"),
    ("iptables", "nft delete table bridge mesh", "table bridge mesh"),
]


CASES = [
    pytest.param(backend, *(text.format(backend.partition("-")[2]) for text in texts))
    for backend in drivers.KERNEL
    for whose, *texts in DAMAGES
    if backend.startswith(whose)
]


@pytest.mark.parametrize(("backend", "damage", "about"), CASES, indirect=["backend"])
def test_a_changed_program_is_told_although_no_element_differs(
    cli: CommandLine, damage: str, about: str
) -> None:
    sh(damage)

    result = cli.run("rules", "diff")
    found = json.loads(cli.run("rules", "diff", "--json").stdout)
    traced = cli.run("trace", CLIENT, "n1:8080")

    assert (result.exit_code, found["equal"]) == (1, False)
    assert (found["add"], found["remove"]) == ([], [])
    assert about in [each["about"] for each in found["differences"]]
    assert all(line.startswith("! ") for line in result.stdout.splitlines())
    assert "mesh rules diff" in traced.stderr
    assert "mesh rules diff" in cli.run("rules", "show", "--kernel").stderr


@pytest.mark.parametrize("backend", ["iptables-legacy", "iptables-nft"], indirect=True)
def test_a_pool_that_was_flushed_is_told_with_what_it_lacks(cli: CommandLine, backend: str) -> None:
    sh(f"{backend} -t nat -F MESH-P-00001")

    found = json.loads(cli.run("rules", "diff", "--json").stdout)

    assert found["add"] == ["targets4 { 0x10401 . 0 : 10.0.1.5 . 80 }"]
    assert f"{backend} -t nat MESH-P-00001" in [each["about"] for each in found["differences"]]


def test_another_versions_program_is_a_difference(cli: CommandLine, backend: str) -> None:
    before = cli.json("cluster", "show")
    cli.put("/mesh/cluster", {**before, "steeringPort": 4791})

    result = cli.run("rules", "diff")
    found = json.loads(cli.run("rules", "diff", "--json").stdout)

    assert result.exit_code == 1
    assert "version" in result.stdout
    assert found["program"]["loaded"] != found["program"]["wanted"]


def test_what_another_backend_left_is_told(cli: CommandLine, backend: str) -> None:
    other = next(name for name in reversed(drivers.KERNEL) if name != backend)
    of_kernel(other, dump.load(cli.ok("rules", "show", "--json").encode()).parameters, Delta())

    found = json.loads(cli.run("rules", "diff", "--json").stdout)
    left = cli.ok("rules", "show", "--kernel", "--backend", other)

    assert [each["about"] for each in found["differences"]] == [f"backend {other}"]
    assert left.startswith(f"# {other} of node n1, as its kernel holds them")


def test_frontend_ids_are_those_of_the_kernel(cli: CommandLine) -> None:
    cli.put("/mesh/services/a-first", {"name": "a-first", "ports": [], "vip": "none"})
    cli.allocate("a-first", 2, ("tcp", 8081, 80))
    port = {"target": 80, "published": 8081, "mode": "ingress"}
    cli.put("/mesh/services/a-first", {"name": "a-first", "ports": [port]})

    shown = cli.ok("rules", "show", "--service", "web", "--backend", "nftables")
    changes = cli.run("rules", "diff", "--json").stdout

    assert "meshports4 { tcp . 8080 : 0x10401 }" in shown
    assert "8080" not in changes


def test_looking_changes_nothing(cli: CommandLine) -> None:
    def everything() -> str:
        # Not how full ipsets' hash tables are, nor when it was saved.
        words = ("nft list ruleset", "iptables-legacy-save", "ip6tables-legacy-save", "ipset list")
        texts = [subprocess.check_output(each.split(), text=True) for each in words]
        lines = "".join(texts).splitlines()
        return "\n".join(x for x in lines if x[:1] != "#" and not x.startswith("References"))

    before = everything()

    for verb in (("rules", "diff"), ("rules", "show", "--kernel"), ("trace", CLIENT, "n1:8080")):
        cli.ok(*verb)

    assert everything() == before


def test_a_kernel_without_our_rules_is_said_to_have_none(cli: CommandLine, backend: str) -> None:
    driver = drivers.make(backend, rules.PARAMETERS)
    asyncio.run(driver.remove())
    driver.close()

    result = cli.run("rules", "diff")
    traced = cli.json("trace", CLIENT, "n1:8080")

    assert result.exit_code == 1
    assert "table inet mesh" in result.stderr or "no chains of the mesh" in result.stderr
    assert (traced["kernel"], traced["agrees"]) == (None, None)

"""`mesh rules` and `mesh trace`: what a node's rules should be, from etcd or from a dump."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from mesh.agent import config
from mesh.rules import dump
from mesh.store.memory import MemoryStore
from tests.support.commands import KEYS, CommandLine, add_web, start_cluster

if TYPE_CHECKING:
    from pathlib import Path

CLIENT = "203.0.113.9"


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "agent.toml")
    command_line = CommandLine(MemoryStore())
    start_cluster(command_line)
    add_web(command_line)
    return command_line


@pytest.fixture
def dumped(cli: CommandLine, tmp_path: Path) -> Path:
    path = tmp_path / "dump.json"
    path.write_text(cli.ok("rules", "show", "--node", "n1", "--json"))
    return path


def backends(found: dict[str, Any]) -> dict[str, str]:
    return {b["address"]: b["probability"] for b in found["desired"]["backends"]}


def test_rules_are_shown_as_nft_takes_them(cli: CommandLine) -> None:
    shown = cli.ok("rules", "show", "--node", "n1").splitlines()

    assert "table inet mesh {" in shown
    assert "# service web" in shown
    assert "# nodes of the mesh" in shown
    assert "add element inet mesh meshports4 { tcp . 8080 : 0x10401 }" in shown
    assert "add element inet mesh targets4 { 0x10401 . 0 : 10.0.1.5 . 80 }" in shown


def test_the_rules_of_one_service_are_its_elements_alone(cli: CommandLine) -> None:
    shown = cli.ok("rules", "show", "--node", "n1", "--service", "web").splitlines()

    assert {line.split()[0] for line in shown} == {"#", "add"}
    assert any("vips4 { 10.1.0.1 . tcp . 80 : " in line for line in shown)
    assert not any("nodes4" in line for line in shown)


def test_a_dump_shows_the_same_rules_without_etcd(cli: CommandLine, dumped: Path) -> None:
    from_etcd = cli.ok("rules", "show", "--node", "n1")

    assert cli.ok("rules", "show", "--offline", str(dumped)) == from_etcd
    assert cli.ok("rules", "show", "--offline", str(dumped), "--json") == dumped.read_text()


@pytest.mark.parametrize(
    ("source", "target", "enters"),
    [
        (CLIENT, "192.0.2.1:8080", "outside"),
        (CLIENT, "n1:8080", "outside"),
        ("10.0.1.7", "web:80", "container"),
        ("web-1", "10.1.0.1:80/TCP", "container"),
        ("web/web-1", "web:80", "container"),
        ("10.0.0.2", "web:80", "overlay"),
        ("n1", "web:80", "node"),
    ],
)
def test_a_packet_is_traced_from_where_its_source_is(
    cli: CommandLine, source: str, target: str, enters: str
) -> None:
    found = cli.json("trace", source, target, "--node", "n1")

    assert found["desired"]["packet"]["enters"] == enters
    assert backends(found) == {"10.0.1.5": "1"}
    assert found["kernel"] is None
    assert "n1" in found["unread"]


def test_a_trace_says_every_step_to_people(cli: CommandLine) -> None:
    shown = cli.ok("trace", CLIENT, "192.0.2.1:8080", "--node", "n1")

    for words in ("at n1, from outside", "ingress port tcp . 8080", "service web", "10.0.1.5:80"):
        assert words in shown


def test_the_second_half_of_a_steered_way_is_traced_at_the_replicas_node(cli: CommandLine) -> None:
    cli.put(KEYS.node("n1"), cli.get(KEYS.node("n1")) | {"publicKey": "B" * 43 + "="})

    found = cli.json("trace", CLIENT, "10.0.2.5:80", "--node", "n2", "--via", "n1")

    assert found["desired"]["packet"]["enters"] == "steering"
    assert (found["desired"]["verdict"], found["desired"]["path"]) == ("passed", "local")


def test_a_trace_without_etcd_gives_the_same_answer(cli: CommandLine, dumped: Path) -> None:
    online = cli.json("trace", CLIENT, "192.0.2.1:8080", "--node", "n1")

    offline = cli.json("trace", CLIENT, "192.0.2.1:8080", "--offline", str(dumped))

    assert offline["desired"] == online["desired"]


def test_a_hostile_dump_cannot_write_to_the_terminal(cli: CommandLine, dumped: Path) -> None:
    document = json.loads(dumped.read_text())
    document["elements"]["x\nflush ruleset\x1b[2J"] = document["elements"].pop("web")
    dumped.write_text(json.dumps(document))

    shown = cli.ok("rules", "show", "--offline", str(dumped))
    traced = cli.ok("trace", CLIENT, "192.0.2.1:8080", "--offline", str(dumped))

    assert not any(line.startswith("flush ruleset") for line in shown.splitlines())
    assert "\x1b" not in shown + traced


def _broken(name: str) -> Any:
    return {
        "format": lambda d: d | {"format": 99},
        "set": lambda d: d | {"elements": {"web": [["nosuch", "00", ""]]}},
        "size": lambda d: d | {"elements": {"web": [["vips4", "00", ""]]}},
        "hex": lambda d: d | {"elements": {"web": [["vips4", "zz", ""]]}},
        "device": lambda d: d | {"program": d["program"] | {"bridge": 'a" }'}},
        "prefix": lambda d: d | {"program": d["program"] | {"overlay": ["x", "y"]}},
        "address": lambda d: d | {"addresses": ["1.2.3.4; flush ruleset"]},
        "field": lambda d: d | {"more": 1},
        "port": lambda d: d | {"program": d["program"] | {"steeringPort": "0 drop"}},
        "list": lambda d: [d],
    }[name]


@pytest.mark.parametrize(
    "name",
    ["format", "set", "size", "hex", "device", "prefix", "address", "field", "port", "list"],
)
def test_a_file_that_is_no_dump_is_bad_usage(cli: CommandLine, dumped: Path, name: str) -> None:
    dumped.write_text(json.dumps(_broken(name)(json.loads(dumped.read_text()))))

    for verb in (("rules", "show"), ("trace", CLIENT, "192.0.2.1:8080")):
        result = cli.run(*verb, "--offline", str(dumped))

        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("mesh: --offline ")
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("trace", CLIENT, "192.0.2.1:8080"), 2, "--node"),
        (("trace", CLIENT, "192.0.2.1:8080", "--node", "n9"), 3, "mesh node ls"),
        (("trace", CLIENT, "192.0.2.1", "--node", "n1"), 2, "DST:PORT"),
        (("trace", CLIENT, "2001:db8::1:80", "--node", "n1"), 2, "[ADDR]:PORT"),
        (("trace", CLIENT, "[2001:db8::1]:80", "--node", "n1"), 2, "two families"),
        (("trace", CLIENT, "192.0.2.1:80/sctp", "--node", "n1"), 2, "tcp or udp"),
        (("trace", CLIENT, "192.0.2.1:99999", "--node", "n1"), 2, "DST:PORT"),
        (("trace", "nobody", "web:80", "--node", "n1"), 3, "'nobody'"),
        (("trace", CLIENT, "nobody:80", "--node", "n1"), 3, "'nobody'"),
        (("trace", CLIENT, "n1:80", "--node", "n1", "--via", "n9"), 3, "mesh node ls"),
        (("trace", CLIENT, "n1:80", "--node", "n1", "--enters", "steering"), 2, "--via"),
        (("rules", "show", "--node", "n9"), 3, "mesh node ls"),
        (("rules", "show", "--node", "n1", "--service", "api"), 3, "mesh service inspect api"),
        (("rules", "show", "--node", "n1", "--kernel"), 1, "n1 only, as root"),
        (("rules", "diff", "--node", "n1"), 1, "n1 only, as root"),
        (("rules", "show", "--offline", "/nonexistent"), 2, "/nonexistent"),
        (("rules", "show", "--offline", "/dev/null", "--node", "n1"), 2, "--node"),
        (("trace", CLIENT, "1.2.3.4:5", "--offline", "/dev/null", "--node", "n1"), 2, "--node"),
    ],
)
def test_what_cannot_be_done_is_one_line_with_a_remedy(
    cli: CommandLine, args: tuple[str, ...], code: int, words: str
) -> None:
    result = cli.run(*args)

    assert (result.exit_code, result.stdout) == (code, "")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_elements_nobody_wants_are_shown_as_such() -> None:
    web = {("vips4", b"a" * 12): b"\x01\x04\x01\0"}
    stray = {("known4", b"abcd"): b""}
    old = {("targets4", b"\x01\x04\x01\0" + b"\0" * 4): b"b" * 8}

    found = dump.by_owner(web | stray | old, {"web": web})

    assert found == {"web": web | old, dump.UNKNOWN: stray}


def test_a_service_whose_record_is_broken_disturbs_no_other(cli: CommandLine) -> None:
    cli.put(KEYS.service("odd"), b"{")

    assert backends(cli.json("trace", CLIENT, "n1:8080", "--node", "n1")) == {"10.0.1.5": "1"}

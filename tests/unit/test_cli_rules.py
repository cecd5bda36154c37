"""`mesh rules` and `mesh trace`: what a node's rules should be, from etcd or from a dump."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from mesh.agent import config
from mesh.model.address import packed, unpacked
from mesh.rules import dump, elements, jhash, marks, xtables_pools
from mesh.store.memory import MemoryStore
from tests.support.commands import KEYS, CommandLine, add_web, judge, start_cluster

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


@pytest.mark.parametrize("backend", ["iptables", "iptables-legacy", "iptables-nft"])
def test_rules_are_shown_as_ipset_and_iptables_take_them(cli: CommandLine, backend: str) -> None:
    shown = cli.ok("rules", "show", "--node", "n1", "--backend", backend).splitlines()

    assert shown[0].startswith(f"# {backend} of node n1, ")
    parts = [line.removeprefix("# for: ") for line in shown if line.startswith("# for: ")]
    restore = [f"{program}{backend[8:]}-restore --noflush" for program in ("iptables", "ip6tables")]
    assert parts == ["ipset restore -exist", *restore, "nft -f -"]
    assert "add mesh-vips4 10.1.0.1,tcp:80 skbmark 0x10401" in shown
    assert "-I PREROUTING 1 -j MESH-RAW" in shown
    assert shown.count(":MESH-CANARY - [0:0]") == 8


def test_of_iptables_a_service_has_its_entries_and_its_pools_chains(cli: CommandLine) -> None:
    words = ("rules", "show", "--node", "n1", "--service", "web", "--backend", "iptables")
    shown = cli.ok(*words).splitlines()

    assert {line.split()[0] for line in shown} <= {
        "#",
        "add",
        "*nat",
        ":MESH-P-00001",
        "-A",
        "COMMIT",
    }
    assert not any("nodes4" in line for line in shown)
    (rule,) = (line for line in shown if line.startswith("-A MESH-P-00001"))
    assert rule.endswith("-j DNAT --to-destination 10.0.1.5:80")


@pytest.mark.parametrize(
    ("reported", "language"),
    [
        ("nftables", "nftables"),
        ("iptables-legacy", "iptables-legacy"),
        ("iptables-nft", "iptables-nft"),
        ("\x1b[2J", "nftables"),
    ],
)
def test_the_language_is_that_of_what_the_nodes_agent_drives(
    cli: CommandLine, reported: str, language: str
) -> None:
    cli.apply("n1", backend=reported)

    shown = cli.ok("rules", "show", "--node", "n1")
    dumped = cli.json("rules", "show", "--node", "n1")

    assert shown.startswith(f"# {language} of node n1, ")
    assert dumped["backend"] == language
    assert cli.json("trace", CLIENT, "n1:8080", "--node", "n1")["backend"] == language


def test_a_report_that_cannot_be_read_disturbs_nothing(cli: CommandLine) -> None:
    cli.put(KEYS.applied("n1"), b"{")

    assert cli.json("rules", "show", "--node", "n1")["backend"] == "nftables"


def test_a_dump_is_translated_if_asked(cli: CommandLine, dumped: Path) -> None:
    words = ("rules", "show", "--backend", "iptables-nft")

    from_etcd = cli.ok(*words, "--node", "n1")
    from_dump = cli.ok(*words, "--offline", str(dumped))

    assert from_dump == from_etcd
    assert cli.json(*words, "--offline", str(dumped))["backend"] == "iptables-nft"


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


def test_a_trace_of_iptables_names_its_chains(cli: CommandLine) -> None:
    cli.apply("n1", backend="iptables-nft")

    found = cli.json("trace", CLIENT, "192.0.2.1:8080", "--node", "n1")

    (backend,) = found["desired"]["backends"]
    where = {step["where"] for step in [*found["desired"]["steps"], *backend["steps"]]}
    assert where >= {"MESH-SERVICES", "MESH-HERE", "MESH-FRONTEND", "MESH-P-00001"}
    assert all(name.startswith("MESH-") for name in where)


@pytest.mark.parametrize("backend", ["nftables", "iptables-legacy"])
def test_an_affine_client_is_traced_offline_as_its_backend_hashes(
    cli: CommandLine, tmp_path: Path, backend: str
) -> None:
    judge(cli, 2, healthy=True)
    cli.ok("service", "update", "web", "--affinity", "client-ip")
    path = tmp_path / "affine.json"
    dumped = cli.ok("rules", "show", "--node", "n1", "--backend", backend, "--json")
    path.write_text(dumped)
    loaded = dump.load(dumped.encode())
    key = ("meshports4", elements.proto_bytes(6) + elements.port_bytes(8080))
    mark = loaded.elements[key]
    told, expected = {}, {}

    for client in (f"203.0.113.{n}" for n in range(1, 30)):
        found = cli.json("trace", client, "192.0.2.1:8080", "--offline", str(path))["desired"]
        told[client] = [b["address"] for b in found["backends"]]
        slot = jhash.slot(packed(client), 0x6D657368, 251)
        if backend != "nftables":
            slot = xtables_pools.slot_of(client, elements.mark_of(mark), marks.DEFAULT)
        target = loaded.elements["targets4", mark + elements.mark_bytes(slot)]
        expected[client] = [unpacked(target[:4])]

    assert told == expected
    assert len({each[0] for each in told.values()}) == 2


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
        "backend": lambda d: d | {"backend": "ipchains"},
        "field": lambda d: d | {"more": 1},
        "port": lambda d: d | {"program": d["program"] | {"steeringPort": "0 drop"}},
        "list": lambda d: [d],
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "format",
        "set",
        "size",
        "hex",
        "device",
        "prefix",
        "address",
        "backend",
        "field",
        "port",
        "list",
    ],
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
        (("trace", CLIENT, "192.0.2.1:80/dccp", "--node", "n1"), 2, "tcp, udp or sctp"),
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

    found = dump.by_owner(web | stray | old, {"web": web}, marks.DEFAULT)

    assert found == {"web": web | old, dump.UNKNOWN: stray}


def test_a_service_whose_record_is_broken_disturbs_no_other(cli: CommandLine) -> None:
    cli.put(KEYS.service("odd"), b"{")

    assert backends(cli.json("trace", CLIENT, "n1:8080", "--node", "n1")) == {"10.0.1.5": "1"}

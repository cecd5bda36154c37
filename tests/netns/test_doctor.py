"""What `mesh doctor` finds on a host, and that looking for it changes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from mesh.agent import config
from mesh.dataplane import witness
from mesh.delta import Delta
from mesh.errors import StoreUnavailable
from mesh.rules import dump
from mesh.store.memory import MemoryStore
from tests.support import drivers, rules
from tests.support.commands import CommandLine, add_web, start_cluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from mesh.agent.config import EtcdConfig
    from mesh.store.protocol import Store

pytestmark = pytest.mark.netns

DEVICES: Final = (
    "ip link add warren-br0 type bridge",
    "ip link add warren-x0 type vxlan id 7777 local 10.0.0.1 dstport 4790",
)
SETTINGS: Final = {
    "ipv4/ip_forward": "1",
    "ipv6/conf/all/forwarding": "1",
    "ipv4/conf/all/send_redirects": "0",
    "ipv4/conf/warren-br0/send_redirects": "0",
    "ipv4/conf/warren-x0/send_redirects": "0",
    "ipv4/conf/warren-x0/src_valid_mark": "1",
    "bridge/bridge-nf-call-iptables": "0",
    "bridge/bridge-nf-call-ip6tables": "0",
    "ipv4/ip_local_reserved_ports": "32768-32999",
}


def sh(line: str) -> str:
    done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout


def write_setting(name: str, value: str) -> None:
    """Below /proc/sys/net, where this kernel has it."""
    path = Path("/proc/sys/net", name)
    if path.exists():
        path.write_text(value)


@pytest.fixture(params=drivers.KERNEL)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cli(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CommandLine]:
    """The command line on n1, on which an agent has set up everything."""
    path = tmp_path / "agent.toml"
    path.write_text(config.dump(config.AgentConfig(node="n1")))
    monkeypatch.setattr(config, "DEFAULT_PATH", path)
    with rules.namespace():
        sh("ip link set lo up")
        command_line = CommandLine(MemoryStore())
        start_cluster(command_line)
        add_web(command_line)
        command_line.apply("n1", backend=backend)
        loaded = dump.load(command_line.ok("rules", "show", "--node", "n1", "--json").encode())
        driver = drivers.make(backend, loaded.parameters)
        asyncio.run(_set_up(driver, Delta(add=loaded.elements)))
        for line in DEVICES:
            sh(line)
        for name, value in SETTINGS.items():
            write_setting(name, value)
        yield command_line


async def _set_up(driver: Any, change: Delta[Any, Any]) -> None:
    await driver.prepare()
    await driver.apply(change)
    await driver.attach()
    driver.close()


def checks(cli: CommandLine, *args: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and the worst check of each name."""
    result = cli.run("doctor", "--json", *args)
    found: dict[str, dict[str, Any]] = {}
    order = ("ok", "warn", "fail")
    document = json.loads(result.stdout)
    for each in document["checks"]:
        before = found.get(each["name"])
        if before is None or order.index(before["status"]) < order.index(each["status"]):
            found[each["name"]] = each
    assert document["ok"] is all(each["status"] != "fail" for each in document["checks"])
    assert result.exit_code == (0 if document["ok"] else 1)
    assert all((each["fix"] is None) is (each["status"] == "ok") for each in document["checks"])
    assert not any("\n" in f"{each['evidence']}{each['fix']}" for each in document["checks"])
    return result.exit_code, found


def test_a_host_on_which_all_is_well_has_no_problem(cli: CommandLine, backend: str) -> None:
    code, found = checks(cli)

    assert code == 0, found
    assert {n: c["evidence"] for n, c in found.items() if c["status"] == "fail"} == {}
    assert found["backend"]["evidence"].startswith(f"{backend}, as the agent reports")
    assert "whole" in found["rules"]["evidence"]
    for name in ("program", "leftovers", "forwarding", "firewall", "marks", "routing", "udp"):
        assert found[name]["status"] == "ok", found[name]
    asked = backend == "iptables-legacy" and witness.is_installed()
    assert ("sees the same" in found["witness"]["evidence"]) is asked


def test_the_table_has_every_check_and_what_to_do(cli: CommandLine) -> None:
    sh("iptables-nft -P INPUT DROP")

    result = cli.run("doctor")

    lines = result.stdout.splitlines()
    assert lines[0].split() == ["CHECK", "STATUS", "EVIDENCE"]
    assert any(line.split()[:2] == ["firewall", "problem"] for line in lines)
    advice = [line for line in lines if line.startswith("! firewall: ")]
    assert any("--dport 51820" in line for line in advice)


def _state() -> dict[str, str]:
    """Everything of the network namespace that a check could have touched."""
    texts = {
        line: sh(line)
        for line in (
            "nft list ruleset", "iptables-legacy-save", "ip6tables-legacy-save", "ipset save",
            "ip link show", "ip rule show", "ip -6 rule show", "ip route show table all",
        )
    }  # fmt: skip
    for name in ("ip_tables_names", "ip6_tables_names"):
        texts[name] = Path("/proc/thread-self/net", name).read_text()
    settings = (Path("/proc/sys/net", name) for name in SETTINGS)
    texts |= {f"{path}": path.read_text() for path in settings if path.exists()}
    return {
        name: "\n".join(_COUNTED.sub("", x) for x in text.splitlines() if x[:1] != "#")
        for name, text in texts.items()
    }


_COUNTED: Final = re.compile(r"packets \d+ bytes \d+|\[\d+:\d+\]")
"""Somebody who looks for etcd sends packets."""


def test_looking_changes_nothing(cli: CommandLine) -> None:
    before = _state()

    cli.run("doctor")

    assert _state() == before


def test_a_host_without_a_rule_is_left_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "none.toml")
    with rules.namespace():
        before = _state()

        _, found = checks(CommandLine(MemoryStore()))

        assert _state() == before
    assert before["nft list ruleset"] == before["ip_tables_names"] == ""
    assert found["rules"]["evidence"].startswith("none yet")
    assert (found["etcd"]["status"], found["cluster"]["status"]) == ("ok", "warn")


TROUBLES: Final = [
    # who, what somebody does there, the check that tells, how bad it is, and a word of it
    ("nftables", "nft insert rule inet mesh forward drop", "rules", "fail", "changed by somebody"),
    ("nftables", "nft delete table inet mesh", "rules", "fail", "no rules"),
    ("iptables-nft", "iptables-nft -t nat -D PREROUTING -j MESH-NAT", "rules", "fail", "MESH-NAT"),
    ("iptables-legacy", "ipset flush mesh-canary", "rules", "fail", "mesh-canary"),
    ("nftables", "iptables-nft -P FORWARD DROP", "firewall", "fail", "FORWARD"),
    ("nftables", "iptables-legacy -P FORWARD DROP", "firewall", "fail", "legacy chain FORWARD"),
    ("iptables-nft", "ip6tables-legacy -P FORWARD DROP", "firewall", "fail", "ip6tables-legacy"),
    ("iptables-nft", "iptables-nft -P FORWARD DROP", "firewall", "ok", "no chain"),
    ("nftables", "iptables-nft -A FORWARD -j DROP", "firewall", "fail", "FORWARD"),
    ("iptables-legacy", "iptables-legacy -P INPUT DROP", "firewall", "fail", "INPUT"),
    ("nftables", "sysctl -qw net.ipv4.ip_forward=0", "forwarding", "fail", "ip_forward=0"),
    ("nftables", "sysctl -qw net.ipv4.conf.all.rp_filter=1", "rp_filter", "ok", "=1"),
    ("iptables-nft", "sysctl -qw net.ipv4.conf.all.rp_filter=1", "rp_filter", "warn", "strict"),
    ("nftables", "sysctl -qw net.ipv4.conf.all.route_localnet=1", "loopback", "warn", "127.0.0.1"),
    ("nftables", "ip route add 10.1.7.0/24 dev lo", "addresses", "fail", "10.1.7.0/24"),
    ("nftables", "ip link add warren0 type bridge", "addresses", "fail", "warren0"),
    ("nftables", "ip rule add pref 7002 lookup 9", "routing", "warn", "7002"),
    ("nftables", "ip -6 rule add fwmark 0x10000/0xff000 lookup 9", "routing", "ok", ""),
    ("nftables", "ip -6 rule add fwmark 0x100000/0xffff0000 lookup 9", "routing", "fail", "IPv6"),
    ("nftables", "iptables-nft -t mangle -A INPUT -j MARK --set-xmark 1/0xff00", "marks", "ok", ""),
    ("nftables", "iptables-nft -t mangle -A INPUT -j MARK --set-mark 1", "marks", "warn", "MARK"),
    ("iptables-nft", "iptables-nft -t mangle -A INPUT -j CONNMARK --set-mark 1", "marks", "warn",
     "CONNMARK"),
    ("nftables", "sysctl -qw net.ipv4.ip_local_reserved_ports=1-2", "local-ports", "warn",
     "32768-32999"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "trouble", "name", "status", "words"), TROUBLES, indirect=["backend"]
)
def test_trouble_is_told(
    cli: CommandLine, trouble: str, name: str, status: str, words: str
) -> None:
    sh(trouble)

    _, found = checks(cli)

    assert found[name]["status"] == status, found[name]
    assert words in found[name]["evidence"]


@pytest.mark.parametrize("backend", ["nftables"], indirect=True)
def test_a_firewall_of_nftables_own_kind_is_told(cli: CommandLine) -> None:
    sh("nft add table inet fw")
    for hook, policy in (("input", "drop"), ("forward", "accept")):
        rules.nft("add", "chain", "inet", "fw", hook,
                  f"{{ type filter hook {hook} priority 9; policy {policy}; }}")  # fmt: skip
    rules.nft("add", "rule", "inet", "fw", "forward", "meta", "mark", "set", "7")

    _, found = checks(cli)

    assert found["firewall"]["status"] == "fail"
    assert "nft table inet fw chain input" in found["firewall"]["evidence"]
    assert "nft insert rule inet fw input " in found["firewall"]["fix"]
    assert "nft table inet fw: meta mark set" in found["marks"]["evidence"]


@pytest.mark.parametrize("backend", ["nftables"], indirect=True)
def test_an_input_chain_that_names_what_the_mesh_needs_is_well(cli: CommandLine) -> None:
    before = sh("iptables-nft -P INPUT DROP") + cli.run("doctor").stdout
    advice = [line for line in before.splitlines() if line.startswith("! firewall")]

    for line in advice:
        sh(line.partition("`")[2].partition("`")[0])
    _, found = checks(cli)

    assert len(advice) == 2
    assert found["firewall"]["status"] == "ok", found["firewall"]


@pytest.mark.parametrize("backend", ["nftables"], indirect=True)
def test_ports_that_others_use_are_told(cli: CommandLine) -> None:
    with ExitStack() as stack:
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("0.0.0.0", 51820))
        tcp = stack.enter_context(socket.socket())
        tcp.bind(("0.0.0.0", 8080))
        tcp.listen()

        _, found = checks(cli)

    assert (found["udp"]["status"], found["listeners"]["status"]) == ("fail", "warn")
    assert "51820" in found["udp"]["evidence"]
    assert f"(pid {os.getpid()})" in found["listeners"]["evidence"].partition("8080/tcp (")[2]


def test_what_another_backend_left_is_told(cli: CommandLine, backend: str) -> None:
    other = next(name for name in reversed(drivers.KERNEL) if name != backend)
    asyncio.run(_set_up(drivers.make(other, rules.PARAMETERS), Delta()))

    code, found = checks(cli)

    assert code == 0
    assert found["leftovers"]["status"] == "warn"
    assert other in found["leftovers"]["evidence"]


# ---- what is missing


def shim(directory: Path, program: str, words: str) -> None:
    """A program that fails when it is asked for some words, and else is the real one."""
    real = sh(f"which {program}").strip()
    path = directory / program
    path.write_text(
        f'#!/bin/sh\ninput=$(cat)\ncase "$* $input" in *{words}*) echo no such thing >&2; exit 2;; '
        f'esac\nprintf "%s\\n" "$input" | exec {real} "$@"\n'
    )
    path.chmod(0o755)


@pytest.fixture
def shims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


@pytest.mark.parametrize("backend", ["iptables-nft"], indirect=True)
def test_a_missing_extension_is_named(cli: CommandLine, shims: Path) -> None:
    for program in ("iptables-nft", "iptables-nft-restore"):
        shim(shims, program, "HMARK")

    code, found = checks(cli)

    assert (code, found["program"]["status"]) == (1, "fail")
    assert "modules of HMARK (" in found["program"]["fix"]


@pytest.mark.parametrize("backend", ["nftables"], indirect=True)
def test_a_program_that_does_not_load_is_told(cli: CommandLine, shims: Path) -> None:
    shim(shims, "nft", "jhash")

    code, found = checks(cli)

    assert (code, found["program"]["status"]) == (1, "fail")
    assert "no such thing" in found["program"]["evidence"]


@pytest.mark.parametrize("backend", ["iptables-legacy"], indirect=True)
def test_programs_that_are_missing_are_told_with_their_packages(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "bin"
    directory.mkdir()
    for program in ("iptables-legacy", "iptables-legacy-save", "ip6tables-legacy-save"):
        (directory / program).symlink_to(sh(f"which {program}").strip())
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setattr("mesh.cli.doctor._SYSTEM_PATH", str(directory))

    code, found = checks(cli)

    assert code == 1
    for name, package in (("ipset", "ipset"), ("wg", "wireguard-tools")):
        assert (found[name]["status"], found[name]["fix"]) == ("fail", f"apt install {package}")


class _Gone(CommandLine):
    """The command line of a host from which etcd cannot be reached."""

    @asynccontextmanager
    async def connect(self, etcd: EtcdConfig) -> AsyncIterator[Store]:
        raise StoreUnavailable("no etcd answers at http://x:1")
        yield self.store


def test_without_etcd_the_hosts_part_is_told_all_the_same(cli: CommandLine, backend: str) -> None:
    code, found = checks(_Gone(cli.store))

    assert (code, found["etcd"]["status"]) == (1, "fail")
    assert {n for n, c in found.items() if c["status"] == "fail"} == {"etcd"}
    assert found["backend"]["evidence"].startswith(f"{backend}, which holds the rules")
    assert "for want of etcd" in found["rules"]["evidence"]


# ---- the second reader


@pytest.mark.parametrize("backend", ["iptables-legacy"], indirect=True)
@pytest.mark.parametrize(
    ("what", "status", "words"),
    [("agrees", "ok", "sees the same"), ("absent", "warn", "not installed"),
     ("crashes", "warn", "could not look"), ("differs", "fail", "MESH-RAW")],
)  # fmt: skip
def test_a_witness_is_asked_about_legacy_tables(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, what: str, status: str, words: str
) -> None:
    if not witness.is_installed():
        pytest.skip("python-iptables is not installed")
    if what == "absent":
        monkeypatch.setattr(witness, "is_installed", lambda: False)
    elif what == "crashes":
        monkeypatch.setattr(witness, "_CHILD", "mesh.no_such_module")
    elif what == "differs":
        _blind(monkeypatch)

    witnessed = checks(cli)[1]["witness"]

    assert (witnessed["status"], words in witnessed["evidence"]) == (status, True)


def _blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the witness overlook a rule."""
    real = witness.tell

    async def tell(*args: Any) -> Any:
        told = await real(*args)
        del told["raw"]["MESH-RAW"][1]
        return told

    monkeypatch.setattr(witness, "tell", tell)

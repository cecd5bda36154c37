"""What the command line says, and with which exit code, when something is wrong."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from mesh.agent import config
from mesh.cli import output
from mesh.store.memory import MemoryStore
from tests.support.commands import KEYS, CommandLine

if TYPE_CHECKING:
    from pathlib import Path

    from mesh.store.protocol import KeyValue

CREATE = ("service", "create", "new", "--no-wait")
ADD = ("task", "add", "web", "web-2", "--node", "n1", "--address", "10.0.1.9")
ROOTLESS = "/proc/no/agent.toml"


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "agent.toml")
    command_line = CommandLine(MemoryStore())
    command_line.put(KEYS.cluster, {"id": "test", "prefix6": "fd12:3456:789a::/48"})
    command_line.add_node("n1", 1)
    ports = [{"target": 80, "published": 8080, "mode": "ingress"}]
    command_line.put(KEYS.service("web"), {"name": "web", "ports": ports})
    task = {"service": "web", "id": "web-1", "node": "n1", "addresses": ["10.0.1.5"]}
    command_line.put(KEYS.task("web", "web-1"), task)
    command_line.allocate("web", 1, ("tcp", 8080, 80))
    return command_line


BAD_USAGE = [
    ([], "Usage: mesh"),
    (["nonsense"], "No such command 'nonsense'", "mesh --help"),
    (["--nonsense", "status"], "No such option '--nonsense'", "mesh --help"),
    (["service"], "Usage: mesh service"),
    (["service", "creat", "x"], "No such command 'creat'", "mesh service --help"),
    (["service", "create"], "Missing argument 'NAME'", "mesh service create --help"),
    (["status", "--nonsense"], "No such option '--nonsense'", "mesh status --help"),
    (["status", "--etcd", "127.0.0.1:2379"], "etcd options", "write http://HOST:PORT"),
    (["status", "--prefix", "mesh"], "etcd options", "must start with '/'"),
    (["status", "--cert", "x.pem"], "etcd options", "cert and key go together"),
    (["status", "--user", "root"], "--user", "MESH_ETCD_USER", "NAME:PASSWORD"),
    (["status", "--config", "/no/such.toml"], "/no/such.toml", "mesh node join"),
    (["agent", "--config", "/no/such.toml"], "/no/such.toml", "mesh node join"),
    (["task", "run", "web", "--", "true"], "agent.toml", "mesh node join"),
    (["task", "run", "web"], "Missing argument", "CMD"),
    (["cluster", "init", "--vips4", "10.0.4.0/24"], "--containers4", "overlaps --vips4"),
    (["cluster", "init", "--overlay4", "10.0.0.0/8"], "--overlay4", "choose a /24"),
    (["cluster", "init", "--node-bits4", "12"], "--node-bits4 12 does not cut"),
    (["cluster", "init", "--overlay4", "10.0.0.1/24"], "--overlay4", "host bits"),
    (["cluster", "init", "--prefix6", "fd00::/64"], "--prefix6", "/48"),
    (["cluster", "init", "--ingress-ports", "30000"], "--ingress-ports", "30000-31999"),
    (["cluster", "init", "--ingress-ports", "32000-32010"], "--ingress-ports and --host-ports"),
    (["cluster", "init", "--host-ports", "5-1"], "--host-ports 5-1"),
    (["cluster", "init", "--wireguard-port", "0"], "--wireguard-port", "1<=x<=65535"),
    (["cluster", "init", "--liveness-ttl", "0"], "--liveness-ttl", "x>=1"),
    (["cluster", "init", "--steering-vni", "0"], "--steering-vni", "1<=x<="),
    (["node", "join", "-bad-"], "No such option", "mesh node join --help"),
    (["node", "join", "bad name"], "NAME", "letters, digits"),
    (["node", "join", "n2", "--role", "boss"], "--role", "'manager', 'worker'"),
    (["node", "join", "n2", "--endpoint", "2001:db8::1:x"], "--endpoint", "does not end in a port"),
    (["node", "join", "n2", "--label", "rack"], "--label 'rack'", "KEY=VALUE"),
    ([*CREATE, "-p", ""], "--publish", "no target port", "[hostIP:][published[-end]:]target"),
    ([*CREATE, "-p", "0:80"], "--publish", "invalid published port '0'", "1-65535"),
    ([*CREATE, "-p", "80:80abc"], "--publish", "invalid target port '80abc'", "1-65535"),
    ([*CREATE, "-p", "80:80/dccp"], "--publish", "invalid protocol 'dccp'", "tcp, udp or sctp"),
    ([*CREATE, "-p", "target=80,mode=all"], "--publish", "invalid mode 'all'", "host or ingress"),
    ([*CREATE, "-p", "1-10241:1-10241"], "service new", "10241 published ports", "10240"),
    (["service", "update", "web", "-p", "1", "--publish-rm", "2"], "--publish", "--publish-add"),
    (["service", "update", "web", "--publish-add", "x"], "--publish-add", "invalid target port"),
    (["service", "update", "web", "--publish-rm", "x"], "--publish-rm", "invalid target port"),
    (["service", "update", "web"], "service web", "nothing to change"),
    ([*CREATE, "-p", "80:1", "-p", "80:2"], "service new", "published twice"),
    ([*CREATE, "-p", "80:1", "--publish-mode", "all"], "--publish-mode", "'host', 'ingress'"),
    ([*CREATE, "--publish-mode", "ingress"], "--publish-mode", "--publish [HOST:]CTR"),
    ([*CREATE, "--vip", "10.1.0.999"], "--vip", "not an IP address"),
    ([*CREATE, "--affinity", "yes"], "--affinity", "'client-ip'"),
    ([*CREATE, "--affinity", "none/24"], "--affinity", "client-ip/24"),
    ([*CREATE, "--affinity", "client-ip/33"], "--affinity", "is not in /1-/32"),
    ([*CREATE, "--affinity", "client-ip/24,/63"], "--affinity", "is not a multiple of 4"),
    ([*CREATE, "--source", "x"], "--source", "'masquerade'"),
    ([*CREATE, "--prefer", "x"], "--prefer", "'local-only'"),
    ([*CREATE, "--allow", "192.0.2.1/24"], "--allow", "host bits"),
    ([*CREATE, "--label", "=x"], "--label '=x'", "KEY=VALUE"),
    (["service", "create", "a/b", "--no-wait"], "service 'a/b'", "letters, digits"),
    (["service", "update", "web", "--publish-mode", "host"], "--publish-mode", "--publish"),
    (["service", "rm"], "Missing argument", "NAME"),
    (["task", "add", "web", "x", "--address", "10.0.1.9"], "--node"),
    (["task", "add", "web", "x", "--node", "n1"], "--address"),
    ([*ADD[:-1], "ten"], "--address", "'ten' is not an IP address"),
    ([*ADD[:-1], "127.0.0.1"], "address 127.0.0.1"),
    ([*ADD, "--weight", "256"], "--weight", "0<=x<=255"),
    (["agent", "--log-level", "loud"], "--log-level", "'debug'"),
]
NOT_FOUND = [
    (["cluster", "show", "--prefix", "/other"], "/other", "mesh cluster init", "--prefix"),
    (["status", "--prefix", "/other"], "/other", "mesh cluster init"),
    ([*CREATE, "--prefix", "/other"], "/other", "mesh cluster init"),
    (["node", "join", "n2", "--prefix", "/other"], "/other", "mesh cluster init"),
    (["node", "inspect", "n9"], "'n9'", "mesh node ls"),
    (["node", "rm", "n9"], "'n9'", "mesh node ls"),
    (["service", "inspect", "nope"], "'nope'", "mesh service ls"),
    (["service", "ps", "nope"], "'nope'", "mesh service ls"),
    (["service", "update", "nope", "--vip", "none"], "'nope'", "mesh service create"),
    (["service", "update", "web", "--publish-rm", "81"], "--publish-rm", "'81'", "*:8080->80/tcp"),
    (["service", "rm", "web", "nope"], "'nope'", "nothing was removed", "mesh service ls"),
    (["task", "add", "nope", *ADD[3:]], "'nope'", "mesh service ls"),
    ([*ADD[:5], "n9", *ADD[6:]], "--node", "'n9'", "mesh node ls"),
    (["task", "ls", "nope"], "'nope'", "mesh service ls"),
    (["task", "rm", "web", "web-9"], "web/web-9", "mesh task ls web"),
    (["schema", "nope"], "'nope'", "service, task"),
]
CONFLICT = [
    (["cluster", "init"], "/mesh/cluster", "mesh cluster show", "--prefix"),
    (["node", "join", "n1"], "'n1' is alive", "NAME"),
    (["node", "rm", "n1"], "'n1' is alive", "--force"),
    (["service", "create", "web"], "'web' exists", "mesh service update", "mesh service rm"),
    ([*CREATE, "-p", "8080:1", "--publish-mode", "ingress"], "--publish", "8080/tcp", "'web'"),
    ([*CREATE, "-p", "22:22"], "--publish", "port 22/tcp is protected", "22/tcp", "--force"),
    ([*CREATE, "-p", "2380:1", "--publish-mode", "ingress"], "2380/tcp", "2379-2380/tcp"),
    ([*CREATE, "-p", "4790:1/udp", "--force"], "--publish", "4790/udp", "the overlay itself"),
    (["service", "update", "web", "--publish-add", "22:22"], "--publish", "22/tcp", "--force"),
    (["task", "add", "web", "web-1", *ADD[4:]], "web/web-1", "mesh task rm web web-1"),
]
FAILED = [(["node", "join", "n2", "--config", ROOTLESS], "--config", ROOTLESS, "root")]
CASES = [
    pytest.param(code, args, words, id=" ".join(args) or "nothing")
    for code, table in ((1, FAILED), (2, BAD_USAGE), (3, NOT_FOUND), (4, CONFLICT))
    for args, *words in table
]


@pytest.mark.parametrize(("code", "args", "words"), CASES)
def test_an_error_is_one_line_that_says_what_is_wrong_where_and_what_to_do(
    cli: CommandLine, code: int, args: list[str], words: list[str]
) -> None:
    result = cli.run(*args)

    assert result.exit_code == code, result.output
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr
    if not result.stderr.startswith("Usage:"):
        assert result.stderr.startswith("mesh: ")
        assert result.stderr.count("\n") == 1


def test_an_error_writes_nothing(cli: CommandLine) -> None:
    before = cli.json("status")["etcd"]["revision"]

    for case in CASES:
        cli.run(*case.values[1])  # type: ignore[misc]

    assert cli.json("status")["etcd"]["revision"] == before


def test_an_etcd_that_does_not_answer_is_one_line_and_exit_code_1(cli: CommandLine) -> None:
    cli.store.stop()

    result = cli.run("service", "ls")

    assert result.exit_code == 1
    assert result.stderr.startswith("mesh: ")
    assert result.stderr.count("\n") == 1


class _Interrupted(MemoryStore):
    async def get(self, key: str, revision: int = 0) -> KeyValue | None:
        raise KeyboardInterrupt


def test_an_interrupt_ends_with_130_and_without_a_word() -> None:
    result = CommandLine(_Interrupted()).run("service", "ls")

    assert result.exit_code == 130
    assert result.output == ""


class _Slow(MemoryStore):
    async def get(self, key: str, revision: int = 0) -> KeyValue | None:
        await asyncio.sleep(0.1)
        return await super().get(key)


def test_a_long_wait_is_explained_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "PATIENCE", 0.01)

    result = CommandLine(_Slow()).run("task", "ls", "--etcd", "http://192.0.2.7:2379")

    assert result.exit_code == 0
    assert "waiting for etcd at http://192.0.2.7:2379" in result.stderr


async def test_a_wait_that_is_over_is_not_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "PATIENCE", 0.0)

    with output.patience("nothing"):
        pass
    await asyncio.sleep(0.01)

    assert capsys.readouterr().err == ""


def test_every_verb_has_help_that_lists_the_common_options(cli: CommandLine) -> None:
    from mesh.cli import main, options

    for name in main.COMMANDS:
        if name in ("lab", "bench", "publish", "unpublish", "published"):  # without etcd
            continue
        noun = main.mesh.get_command(None, name)  # type: ignore[arg-type]
        verbs = list(getattr(noun, "commands", {})) or [""]
        for verb in verbs:
            text = cli.ok(name, *filter(None, [verb]), "--help")
            assert "Options of every command:" in text
            assert "--etcd URL" in text
        assert isinstance(noun, options.Verb | options.Noun)

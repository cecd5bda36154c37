"""What `mesh status` finds, and how text from etcd reaches a terminal."""

from __future__ import annotations

import json
import os
import pty
from typing import TYPE_CHECKING, Any

import pytest

from mesh.agent import config
from mesh.cli import output, status
from mesh.store.memory import MemoryStore
from tests.support.commands import KEYS, CommandLine, judge

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HOSTILE = "\x1b[2J\x9bm\u202eevil\nmesh: all is well\r"


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "agent.toml")
    monkeypatch.setattr(status, "PATIENCE", 0.01)
    command_line = CommandLine(MemoryStore())
    command_line.ok("cluster", "init", "--prefix6", "fd12:3456:789a::/48")
    command_line.put(KEYS.leader, b"n1")
    command_line.add_node("n1", 1)
    command_line.allocate("web", 1, ("tcp", 8080, 80))
    web = ("web", "-p", "8080:80", "--publish-mode", "ingress", "--health", "tcp")
    command_line.ok("service", "create", *web)
    command_line.ok("task", "add", "web", "web-1", "--node", "n1", "-a", "10.0.1.5")
    judge(command_line, 1, healthy=True)
    command_line.apply("n1")
    return command_line


def test_a_mesh_without_a_problem_is_ok(cli: CommandLine) -> None:
    found = cli.json("status", "--check")

    assert found["ok"] is True
    assert found["problems"] == []
    assert found["leader"] == "n1"
    assert [node["name"] for node in found["nodes"]] == ["n1"]
    assert (found["services"], found["ports"]) == (1, 1)
    assert (found["tasks"], found["eligibleTasks"]) == (1, 1)
    assert "no known problem" in cli.ok("status")


def test_unhealthy_tasks_are_counted(cli: CommandLine) -> None:
    judge(cli, 1, healthy=False, starting=True)
    starting = cli.json("status")["unhealthyTasks"]
    judge(cli, 1, healthy=False)

    assert starting == 0
    assert cli.json("status")["unhealthyTasks"] == 1
    assert "0 of 1 tasks take connections, 1 unhealthy" in cli.ok("status")


def _forget_leader(cli: CommandLine) -> None:
    import asyncio

    asyncio.run(cli.store.delete(KEYS.leader))


def _kill(cli: CommandLine) -> None:
    cli.add_node("n2", 2, alive=False)


def _unnumbered(cli: CommandLine) -> None:
    cli.add_node("n2", 2)
    cli.put(KEYS.node_allocation(2), {"node": "n3"})


def _behind(cli: CommandLine) -> None:
    cli.put(KEYS.service("late"), {"name": "late", "vip": "none"})


def _degraded(cli: CommandLine) -> None:
    cli.apply("n1", problems=[{"about": "firewall", "message": "ufw drops forwarded packets"}])


def _unreadable(cli: CommandLine) -> None:
    cli.put(KEYS.service("odd"), b"{")
    cli.apply("n1")


def _without_vip(cli: CommandLine) -> None:
    cli.put(KEYS.service("late"), {"name": "late"})
    cli.apply("n1")


def _without_port(cli: CommandLine) -> None:
    ports = [{"target": 1, "published": 81, "mode": "ingress"}]
    cli.put(KEYS.service("late"), {"name": "late", "vip": "none", "ports": ports})
    cli.apply("n1")


def _refused(cli: CommandLine) -> None:
    problem = {"about": "port", "message": "8080/tcp belongs to api: choose another"}
    cli.put(KEYS.status("services", "web"), {"problems": [problem]})


def _without_replica(cli: CommandLine) -> None:
    judge(cli, 1, healthy=False)
    cli.apply("n1")


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (_forget_leader, ("controller", "role manager")),
        (_kill, ("node n2", "down", "mesh agent", "mesh node rm n2")),
        (_unnumbered, ("node n2", "number")),
        (_behind, ("node n1", "has applied revision", "log")),
        (_degraded, ("node n1", "firewall", "ufw drops forwarded packets")),
        (_unreadable, ("/mesh/services/odd", "")),
        (_without_vip, ("service late", "VIP")),
        (_without_port, ("service late", "81:1/tcp (ingress")),
        (_refused, ("service web", "belongs to api: choose another")),
        (_without_replica, ("service web", "mesh service ps")),
    ],
)
def test_a_problem_is_named_with_what_to_do(
    cli: CommandLine, cause: Callable[[CommandLine], None], words: tuple[str, ...]
) -> None:
    cause(cli)

    shown = cli.ok("status")
    checked = cli.run("status", "--json", "--check")

    lines = [line for line in shown.splitlines() if line.startswith("! ")]
    assert any(all(word in line for word in words) for line in lines), shown
    assert checked.exit_code == 1
    assert json.loads(checked.stdout)["ok"] is False


FIREWALL = {"about": "firewall nft table inet filter chain forward", "message": "drops: run `x`"}


@pytest.mark.parametrize(
    ("problem", "state"),
    [
        (FIREWALL, "degraded"),
        ({"about": "healing", "message": "nft(1) keeps changing it"}, "degraded"),
        ({"about": "/mesh/services/odd", "message": "is malformed"}, "alive"),
        ({"about": "task a of service web", "message": "port 80/tcp is taken"}, "alive"),
    ],
)
def test_a_node_that_cannot_do_its_work_is_degraded(
    cli: CommandLine, problem: dict[str, str], state: str
) -> None:
    cli.apply("n1", problems=[problem])

    found = cli.json("status")["nodes"][0]

    assert found["state"] == state
    assert found["applied"]["problems"] == [problem]
    assert any("n1" in line and state in line for line in cli.ok("status").splitlines())


def test_the_backend_in_force_is_told_with_the_reason(cli: CommandLine) -> None:
    cli.add_node("n2", 2)
    cli.apply("n1", reason="this kernel has nftables")
    cli.apply("n2", backend="iptables-nft", reason="nftables cannot be used: no numgen")

    shown = cli.ok("status").splitlines()

    assert "backend   nftables: this kernel has nftables (n1)" in shown
    assert "          iptables-nft: nftables cannot be used: no numgen (n2)" in shown


def test_healings_are_counted_with_the_last_one(cli: CommandLine) -> None:
    last = {"at": "2026-01-02T03:04:05Z", "what": "del table mesh", "by": "nft(4711)"}
    counts = {"total": 37, "elements": 2, "program": 36, "firewall": 1, "last": last}
    cli.apply("n1", healings=counts)

    found = cli.json("status")["nodes"][0]["applied"]["healings"]
    shown = cli.ok("status")

    assert found == counts
    assert "n1 37 times" in shown
    assert "nft(4711)" in shown


@pytest.mark.parametrize(
    ("args", "security", "is_open"),
    [
        (["--etcd", "http://h:1"], "open: no TLS, no authentication", True),
        (["--etcd", "http://h:1", "--user", "a:b"], "open: no TLS, user a", True),
        (["--etcd", "https://h:1"], "TLS, open: no authentication", True),
        (["--etcd", "https://h:1", "--user", "a:b"], "TLS, user a", False),
        (
            ["--etcd", "https://h:1", "--cert", "c", "--key", "k"],
            "TLS, client certificate",
            False,
        ),
    ],
)
def test_an_open_etcd_is_called_open(
    cli: CommandLine, args: list[str], security: str, is_open: bool
) -> None:
    found = cli.json("status", *args)["etcd"]

    assert (found["security"], found["open"]) == (security, is_open)
    assert security in cli.ok("status", *args)


def _hostile(cli: CommandLine) -> None:
    cli.put(KEYS.service("web"), {"name": "web", "labels": {HOSTILE: HOSTILE}})
    cli.put(f"/mesh/services/{HOSTILE}", b"{")
    cli.put(KEYS.leader, HOSTILE.encode())
    judge(cli, 1, healthy=False, reason=HOSTILE, since=HOSTILE)
    cli.apply("n1", problems=[{"about": HOSTILE, "message": HOSTILE}], backend=HOSTILE)


VERBS = [
    ("status",),
    ("node", "ls"),
    ("node", "inspect", "n1"),
    ("service", "ls"),
    ("service", "ps", "web"),
    ("service", "inspect", "web"),
    ("service", "inspect", HOSTILE),
    ("task", "ls"),
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb[:2]))
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["table", "json"])
def test_no_record_can_send_a_control_character_to_the_terminal(
    cli: CommandLine, verb: tuple[str, ...], form: tuple[str, ...]
) -> None:
    _hostile(cli)

    printed = cli.run(*verb, *form).output.replace("\n", "")

    assert printed
    assert all(character.isprintable() for character in printed)


def test_no_record_can_forge_a_line(cli: CommandLine) -> None:
    _hostile(cli)

    for verb in VERBS:
        lines = cli.run(*verb).output.splitlines()
        assert not any(line.startswith("mesh: all") for line in lines)


def _on_a_terminal(action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """What `action` prints on a terminal of 80 columns that knows colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        action()
    printed = os.read(leader, 65536).decode()
    os.close(leader)
    return printed


def test_a_terminal_gets_colour_and_a_pipe_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def show() -> None:
        output.table(("NAME", "STATE"), [("[bold]n1", output.Styled("down\x1b[0m", "red"))])

    show()
    piped = capsys.readouterr().out
    seen = _on_a_terminal(show, monkeypatch)

    assert piped == "NAME      STATE\n[bold]n1  down\\x1b[0m\n"
    assert "\x1b[31mdown\\x1b[0m" in seen
    assert "[bold]n1" in seen


def test_columns_line_up_and_nothing_trails(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("A", "LONG HEADER", "C"), [("longer cell", "x", ""), ("y", "", "z")])

    assert capsys.readouterr().out.splitlines() == [
        "A            LONG HEADER  C",
        "longer cell  x",
        "y                         z",
    ]

"""What `mesh status` finds, and how text from etcd reaches a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from mesh.agent import config
from mesh.cli import output, status
from mesh.store.memory import MemoryStore
from tests.support.commands import KEYS, CommandLine, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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


# ---- how this host reaches the others

PEERS = {
    "node": "n1",
    "peers": [
        {
            "name": "n2", "reach": "reachable", "since": 7200.0, "rtt": 0.00234, "heard": 0.2,
            "endpoint": "192.0.2.2:51820", "handshake": 50.0, "received": 5 << 20, "sent": 900,
        },
        {"name": "n3", "reach": "unreachable", "since": 12.0, "leftOut": True, "heard": 13.0,
         "handshake": 150.0},
        {"name": "n4", "reach": "unknown", "since": 3.0},
    ],
}  # fmt: skip


@contextmanager
def agent(directory: Path, body: bytes) -> Iterator[None]:
    """This host is n1, and somebody answers at its agent's end point."""
    path = directory / "admin.sock"
    (directory / "agent.toml").write_text(f'node = "n1"\n[admin]\nlisten = "unix:{path}"\n')
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        listening.settimeout(30)

        def serve() -> None:
            client, _ = listening.accept()
            with client:
                client.recv(4096)
                client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)

        answering = threading.Thread(target=serve)
        answering.start()
        yield
        answering.join()


@pytest.mark.parametrize("verb", [("status",), ("node", "ls")])
def test_on_a_node_it_is_shown_how_that_reaches_the_others(
    cli: CommandLine, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    with agent(tmp_path, json.dumps(PEERS).encode()):
        shown = cli.ok(*verb)

    lines = shown.partition("\n\nas n1 reaches them\n")[2].splitlines()
    assert [" ".join(line.split()) for line in lines[:4]] == [
        "PEER ENDPOINT HANDSHAKE RECEIVED SENT RTT HEARD REACH",
        "n2 192.0.2.2:51820 50s ago 5.0 MiB 900 B 2.3 ms 0s ago reachable 2h",
        "n3 - 2m ago 0 B 0 B - 13s ago unreachable 12s, left out",
        "n4 - never 0 B 0 B - never unknown 3s",
    ]


def test_programs_read_of_each_node_how_it_is_reached(cli: CommandLine, tmp_path: Path) -> None:
    cli.add_node("n2", 2)
    with agent(tmp_path, json.dumps(PEERS).encode()):
        own, other = cli.json("status")["nodes"]

    assert own["peer"] is None
    assert other["peer"]["rtt"] == 0.00234
    assert other["peer"]["reach"] == "reachable"
    assert other["unreachedBy"] == []


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"hello", json.dumps({**PEERS, "node": "n9"}).encode()]
)
def test_somebody_else_at_the_end_point_is_not_believed(
    cli: CommandLine, tmp_path: Path, body: bytes
) -> None:
    with agent(tmp_path, body):
        shown = cli.ok("status")

    assert "reaches" not in shown
    assert cli.json("status")["nodes"][0]["peer"] is None


def test_a_node_that_others_cannot_reach_is_a_problem_until_they_are_gone(cli: CommandLine) -> None:
    cli.add_node("n2", 2)
    cli.add_node("n3", 3)
    cli.apply("n2")
    for name in ("n1", "n3"):
        cli.apply(name, unreachable=["n2"])

    (problem,) = cli.json("status")["problems"]
    unreached = {node["name"]: node["unreachedBy"] for node in cli.json("node", "ls")}
    cli.apply("n1")
    asyncio.run(cli.store.delete(KEYS.alive("n3")))

    assert problem["about"] == "node n2"
    assert "cannot be reached over the overlay by n1, n3" in problem["message"]
    assert unreached == {"n1": [], "n2": ["n1", "n3"], "n3": []}
    assert "over the overlay" not in cli.ok("status")

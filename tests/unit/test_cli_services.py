"""`mesh service` and `mesh task` on an in-memory store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mesh.agent import config
from mesh.store.memory import MemoryStore
from tests.support.commands import KEYS, CommandLine, add_web, start_cluster, words

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "agent.toml")
    command_line = CommandLine(MemoryStore())
    start_cluster(command_line)
    return command_line


# ---- service


def test_create_writes_the_spec_that_the_options_say(cli: CommandLine) -> None:
    ports = ["-p", "8080:80", "-p", "53:5353/UDP"]
    policy = ["--affinity", "client-ip", "--source", "masquerade", "--prefer", "local-only"]
    access = ["--allow", "192.0.2.0/24", "--allow", "2001:DB8::/32", "--label", "a=b=c"]

    cli.ok("service", "create", "web", *ports, *policy, *access, "--vip", "none", "--no-wait")

    assert cli.get(KEYS.service("web")) == {
        "name": "web",
        "ports": [
            {"target": 80, "published": 8080, "protocol": "tcp", "mode": "host", "hostIP": None},
            {"target": 5353, "published": 53, "protocol": "udp", "mode": "host", "hostIP": None},
        ],
        "vip": "none",
        "affinity": "client-ip",
        "source": "masquerade",
        "prefer": "local-only",
        "health": None,
        "allow": ["192.0.2.0/24", "2001:db8::/32"],
        "drain": "10s",
        "labels": {"a": "b=c"},
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("client-ip", None),
        ("client-ip/24", {"ipv4": 24, "ipv6": 128}),
        ("client-ip/24,/64", {"ipv4": 24, "ipv6": 64}),
        ("client-ip,/56", {"ipv4": 32, "ipv6": 56}),
        ("client-ip/32,/128", None),
    ],
)
def test_affinity_may_go_by_a_prefix(
    cli: CommandLine, given: str, expected: dict[str, int] | None
) -> None:
    cli.ok("service", "create", "web", "--affinity", given, "--no-wait")

    stored = cli.get(KEYS.service("web"))
    assert stored["affinity"] == "client-ip"
    assert stored.get("affinityPrefix") == expected
    cli.ok("service", "update", "web", "--affinity", "none", "--no-wait")
    assert "affinityPrefix" not in cli.get(KEYS.service("web"))


def test_a_port_is_refused_where_nodes_are_selected_that_another_service_selects(
    cli: CommandLine,
) -> None:
    create = ("service", "create", "east", "-p", "8080:80", "--publish-mode", "ingress")
    cli.put(KEYS.labels("n1"), {"labels": {"zone": "a", "disk": "ssd"}})
    cli.put(KEYS.labels("n2"), {"labels": {"zone": "b"}})
    cli.ok("service", "create", "west", *create[3:], "--publish-on", "zone=a", "--no-wait")
    cli.put(KEYS.port_share("tcp", 8080, "west"), {"service": "west", "target": 80})

    everywhere = cli.run(*create, "--no-wait")
    common = cli.run(*create, "--publish-on", "disk", "--no-wait")
    wrong = cli.run(*create, "--publish-on", "zone=")
    cli.ok(*create, "--publish-on", "zone=b", "--no-wait")
    shown = cli.json("service", "inspect", "east")
    widened = cli.run("service", "update", "east", "--publish-on", "", "--no-wait")

    assert (everywhere.exit_code, common.exit_code, wrong.exit_code) == (4, 4, 2)
    assert "port 8080/tcp belongs to service 'west' on n1" in everywhere.stderr
    assert "port 8080/tcp belongs to service 'west' on n1" in common.stderr
    assert "--publish-on: selector 'zone='" in wrong.stderr
    assert shown["spec"]["publishOn"] == "zone=b"
    assert shown["publishedOn"] == ["n2"]
    assert widened.exit_code == 4


def test_a_local_health_port_is_asked_for_and_given_up(cli: CommandLine) -> None:
    create = ("service", "create", "web", "--local-health-port", "9000")
    cli.allocate("other", 2, ("tcp", 9000, 80))
    taken = cli.run(*create, "--no-wait")
    protected = cli.run(*create[:-1], "22", "--no-wait")
    wrong = cli.run(*create[:-1], "0")
    both = cli.run(*create[:-1], "9001", "-p", "9001:80")

    cli.ok(*create[:-1], "9001", "--no-wait")
    asked = cli.get(KEYS.service("web"))["localHealthPort"]
    cli.ok("service", "update", "web", "--local-health-port", "none", "--no-wait")

    assert (taken.exit_code, protected.exit_code, wrong.exit_code, both.exit_code) == (4, 4, 2, 2)
    assert "port 9000/tcp belongs to service 'other'" in taken.stderr
    assert "port 22/tcp is protected" in protected.stderr
    assert "is published, too" in both.stderr
    assert asked == 9001
    assert "localHealthPort" not in cli.get(KEYS.service("web"))


def test_a_limit_of_connections_is_written_and_taken_back(cli: CommandLine) -> None:
    cli.ok("service", "create", "web", "-p", "80:80", "--limit-connections", "100", "--no-wait")
    assert cli.get(KEYS.service("web"))["limitConnections"] == 100
    assert cli.json("service", "inspect", "web")["spec"]["limitConnections"] == 100

    cli.ok("service", "update", "web", "--drain", "1s", "--no-wait")
    assert cli.get(KEYS.service("web"))["limitConnections"] == 100
    cli.ok("service", "update", "web", "--limit-connections", "0", "--no-wait")

    assert "limitConnections" not in cli.get(KEYS.service("web"))
    assert cli.run("service", "update", "web", "--limit-connections", "65536").exit_code == 2


def test_create_shows_the_vip_and_every_port_with_its_mode(cli: CommandLine) -> None:
    cli.allocate("web", 1, ("tcp", 8080, 80))

    shown = cli.ok("service", "create", "web", "-p", "8080:80", "--publish-mode", "ingress")

    assert shown.splitlines() == [
        "✓ Service created: web",
        "  VIP: 10.1.0.1, fd12:3456:789a:f000::1",
        "  Published Ports:",
        "    8080:80/tcp (ingress)",
    ]


def test_create_goes_on_without_a_manager_and_says_so(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.cli.service.ALLOCATION_WAIT", 0.05)

    result = cli.run("service", "create", "web", "-p", "8080:80", "--publish-mode", "ingress")

    assert result.exit_code == 0
    assert "8080:80/tcp (ingress, not allocated yet)" in result.stdout
    assert "mesh service inspect web" in result.stderr


def test_create_ends_with_4_when_the_controller_refuses(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.cli.service.ALLOCATION_WAIT", 0.05)
    problem = {"about": "service web", "message": "port 8080/tcp belongs to api: choose another"}
    cli.put(KEYS.status("services", "web"), {"problems": [problem]})

    result = cli.run("service", "create", "web", "-p", "8080:80", "--publish-mode", "ingress")

    assert result.exit_code == 4
    assert "belongs to api: choose another" in result.stderr


def test_update_replaces_what_is_given_and_keeps_the_rest(cli: CommandLine) -> None:
    add_web(cli)

    cli.ok("service", "update", "web", "--affinity", "client-ip")
    cli.ok("service", "update", "web", "-p", "9090:90", "--no-wait")

    stored = cli.get(KEYS.service("web"))
    assert stored["affinity"] == "client-ip"
    assert [(p["published"], p["mode"]) for p in stored["ports"]] == [(9090, "host")]


def test_services_are_listed_in_natural_order_with_swarms_notation(cli: CommandLine) -> None:
    add_web(cli)
    for name in ("web-10", "web-2"):
        cli.ok("service", "create", name, "-p", "9090:90", "--no-wait")

    header, *rows = cli.ok("service", "ls").splitlines()

    assert header.split() == ["NAME", "REPLICAS", "VIP", "PORTS"]
    assert [row.split()[0] for row in rows] == ["web", "web-2", "web-10"]
    assert rows[0].split()[1] == "1/2"
    assert rows[0].endswith("  *:8080->80/tcp")
    assert rows[1].endswith("  *:9090->90/tcp (host)")


def test_the_tasks_of_a_service_show_health_and_the_state_of_their_node(cli: CommandLine) -> None:
    add_web(cli)
    cli.add_node("n3", 3, alive=False)
    cli.ok("task", "add", "web", "web-3", "--node", "n3", "-a", "10.0.3.5", "--weight", "0")

    header, *rows = cli.ok("service", "ps", "web").splitlines()

    assert header.split() == ["TASK", "NODE", "ADDRESSES", "STATE", "HEALTH", "PORTS"]
    assert "running" in rows[0]
    assert "  healthy  " in rows[0]
    assert "unhealthy: HTTP 500" in rows[1]
    assert "starting" in rows[2]
    assert "node down" in rows[2]
    assert [task["eligible"] for task in cli.json("service", "ps", "web")] == [True, False, False]


def test_a_service_is_inspected_with_endpoint_tasks_and_problems(cli: CommandLine) -> None:
    add_web(cli)
    problem = {"about": "port", "message": "something"}
    cli.put(KEYS.status("services", "web"), {"problems": [problem]})

    found = cli.json("service", "inspect", "web")

    assert found["spec"] == cli.get(KEYS.service("web"))
    assert found["vip"] == ["10.1.0.1", "fd12:3456:789a:f000::1"]
    assert found["endpoint"]["Ports"][0]["PublishedPort"] == 8080
    assert [task["id"] for task in found["tasks"]] == ["web-1", "web-2"]
    assert found["problems"] == [problem]
    assert "PublishedPort: 8080" in cli.ok("service", "inspect", "web")


def test_a_service_that_nobody_can_read_says_why(cli: CommandLine) -> None:
    cli.put(KEYS.service("odd"), {"name": "odd", "vip": 7})

    result = cli.run("service", "inspect", "odd")

    assert result.exit_code == 1
    assert "/mesh/services/odd" in result.stderr
    assert "$.vip" in result.stderr
    cli.ok("service", "rm", "odd")


def test_removing_a_service_keeps_its_tasks_and_names_them(cli: CommandLine) -> None:
    add_web(cli)

    result = cli.run("service", "rm", "web")

    assert result.exit_code == 0
    assert "web/web-1, web/web-2" in result.stderr
    assert cli.get(KEYS.service("web")) is None
    assert [task["id"] for task in cli.json("task", "ls")] == ["web-1", "web-2"]


def test_removing_a_service_with_its_tasks_leaves_nothing(cli: CommandLine) -> None:
    add_web(cli)
    cli.ok("service", "create", "other", "--no-wait")
    for number in range(3, 150):
        record = {"service": "web", "id": f"web-{number}", "node": "n1", "addresses": ["10.0.1.9"]}
        cli.put(KEYS.task("web", f"web-{number}"), record)

    cli.ok("service", "rm", "web", "other", "--tasks")

    assert cli.json("service", "ls") == []
    assert cli.json("task", "ls") == []


# ---- task


def test_a_task_is_written_as_automation_would_write_it(cli: CommandLine) -> None:
    add_web(cli)
    places = ["--node", "n1", "-a", "10.0.1.7", "-a", "FD12:3456:789A:1::7"]

    cli.ok("task", "add", "web", "web-7", *places, "--weight", "3")

    assert cli.get(KEYS.task("web", "web-7")) == {
        "service": "web",
        "id": "web-7",
        "node": "n1",
        "addresses": ["10.0.1.7", "fd12:3456:789a:1::7"],
        "weight": 3,
        "state": "running",
        "labels": {},
    }


def test_an_address_that_is_not_its_nodes_is_written_with_a_warning(cli: CommandLine) -> None:
    add_web(cli)

    result = cli.run("task", "add", "web", "web-7", "--node", "n1", "-a", "10.0.2.7")

    assert result.exit_code == 0
    assert "10.0.2.7" in result.stderr
    assert cli.get(KEYS.task("web", "web-7")) is not None


def test_tasks_are_listed_of_one_service_or_of_all_and_removed(cli: CommandLine) -> None:
    add_web(cli)
    cli.ok("service", "create", "api", "--vip", "none")
    cli.ok("task", "add", "api", "api-1", "--node", "n1", "-a", "10.0.1.6")

    assert [row[:2] for row in words(cli.ok("task", "ls"))[1:]] == [
        ["api", "api-1"], ["web", "web-1"], ["web", "web-2"],
    ]  # fmt: skip
    assert [task["id"] for task in cli.json("task", "ls", "web")] == ["web-1", "web-2"]
    cli.ok("task", "rm", "web", "web-1")
    assert [task["id"] for task in cli.json("task", "ls", "web")] == ["web-2"]

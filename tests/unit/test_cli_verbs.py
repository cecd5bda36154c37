"""What the verbs write to the store, and what they show of it."""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING

import pytest

from mesh.agent import config
from mesh.model.node import Role
from mesh.store.memory import MemoryStore
from tests.support.commands import KEYS, CommandLine

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """An etcd without a cluster, and a host that has not joined one."""
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "etc" / "agent.toml")
    return CommandLine(MemoryStore())


@pytest.fixture
def cli(empty: CommandLine) -> CommandLine:
    """A cluster of two nodes and a manager that leads."""
    empty.ok("cluster", "init", "--prefix6", "fd12:3456:789a::/48")
    empty.add_node("n1", 1)
    empty.add_node("n2", 2)
    empty.put(KEYS.leader, b"n1")
    return empty


def _web(cli: CommandLine) -> None:
    """A service with two replicas; the second is not healthy."""
    cli.allocate("web", 1, ("tcp", 8080, 80))
    cli.ok("service", "create", "web", "-p", "8080:80", "--publish-mode", "ingress")
    for number in (1, 2):
        address = f"10.0.{number}.5"
        cli.ok("task", "add", "web", f"web-{number}", "--node", f"n{number}", "-a", address)
    unwell = {"service": "web", "healthy": False, "reason": "HTTP 500"}
    cli.put(KEYS.health("n2", "web-2"), unwell)


def _columns(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


# ---- cluster


def test_init_writes_every_setting_once(empty: CommandLine) -> None:
    given = ["--overlay4", "10.9.0.0/24", "--containers4", "10.8.0.0/16", "--vips4", "10.7.0.0/16"]
    given += ["--ingress-ports", "20000-20999", "--wireguard-port", "4500", "--domain", "x.test"]

    shown = empty.ok("cluster", "init", *given)

    stored = empty.get(KEYS.cluster)
    assert stored["overlay4"] == "10.9.0.0/24"
    assert stored["ingressPorts"] == [20000, 20999]
    assert stored["wireguardPort"] == 4500
    assert stored["domain"] == "x.test"
    assert ["ingress-ports", "20000-20999"] in _columns(shown)
    assert "mesh node join NAME" in shown
    assert empty.json("cluster", "show") == stored


def test_each_cluster_gets_its_own_ipv6_prefix_and_id() -> None:
    def random_part(number: int) -> tuple[str, str]:
        found = CommandLine(MemoryStore()).json("cluster", "init", "--prefix", f"/mesh{number}")
        return found["prefix6"], found["id"]

    drawn = [random_part(number) for number in range(3)]

    assert len({prefix for prefix, _ in drawn}) == 3
    assert len({name for _, name in drawn}) == 3
    assert all(prefix.startswith("fd") and prefix.endswith("::/48") for prefix, _ in drawn)


# ---- node


def test_join_writes_a_private_file_that_the_agent_reads(cli: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "n3.toml"
    ca = tmp_path / "ca.pem"
    options = ["--role", "manager", "--endpoint", "192.0.2.3", "--endpoint", "[2001:db8::3]:51820"]
    options += ["--label", "rack=a", "--state-dir", str(tmp_path / "state"), "--cacert", str(ca)]
    options += ["--etcd", "https://192.0.2.9:2379", "--user", "n3:pass:word"]

    shown = cli.ok("node", "join", "n3", "--config", str(path), *options)

    assert f"mesh agent --config {path}" in shown
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [child.name for child in path.parent.iterdir()] == ["n3.toml"]
    assert config.load(path) == config.AgentConfig(
        node="n3",
        role=Role.MANAGER,
        etcd=config.EtcdConfig(
            endpoints=("https://192.0.2.9:2379",), user="n3", password="pass:word", ca=str(ca)
        ),
        endpoints=("192.0.2.3", "[2001:db8::3]:51820"),
        labels={"rack": "a"},
        state_dir=str(tmp_path / "state"),
    )


def test_a_host_joins_twice_only_by_force(cli: CommandLine) -> None:
    cli.ok("node", "join", "n3")

    refused = cli.run("node", "join", "n4")
    cli.ok("node", "join", "n4", "--force")

    assert refused.exit_code == 4
    assert "--force" in refused.stderr
    assert str(config.DEFAULT_PATH) in refused.stderr
    assert config.load(config.DEFAULT_PATH).node == "n4"


def test_nodes_are_listed_with_what_they_have_and_what_they_lack(cli: CommandLine) -> None:
    cli.add_node("n10", 10, alive=False)
    cli.put(KEYS.maintenance("n2"), b'"draining"')
    cli.put(KEYS.service("late"), {"name": "late"})
    cli.apply("n1")

    header, *rows = _columns(cli.ok("node", "ls"))

    assert header == [
        "NAME", "ROLE", "NUMBER", "OVERLAY", "SUBNET", "ENDPOINT", "STATE", "APPLIED", "BACKEND",
    ]  # fmt: skip
    assert [row[0] for row in rows] == ["n1", "n2", "n10"]
    assert rows[0][:7] == [
        "n1", "manager", "1", "10.0.0.1", "10.0.1.0/24", "192.0.2.1:51820", "alive",
    ]  # fmt: skip
    assert [row[6] for row in rows[1:]] == ["draining", "down"]
    assert "(of" not in " ".join(rows[0])
    assert "(of" in " ".join(rows[1])
    assert [node["behind"] for node in cli.json("node", "ls")] == [False, True, True]


def test_a_node_is_inspected_with_its_tasks(cli: CommandLine) -> None:
    _web(cli)

    found = cli.json("node", "inspect", "n1")

    assert found["number"] == 1
    assert found["overlay"] == ["10.0.0.1", "fd12:3456:789a::1"]
    assert [task["id"] for task in found["tasks"]] == ["web-1"]
    assert "publicKey: " in cli.ok("node", "inspect", "n1")


def test_a_removed_node_leaves_no_record_of_its_own_and_its_tasks_are_named(
    cli: CommandLine,
) -> None:
    _web(cli)
    cli.put(KEYS.maintenance("n2"), b'"draining"')

    result = cli.run("node", "rm", "n2", "--force")

    assert result.exit_code == 0
    assert "web/web-2" in result.stderr
    assert [cli.get(key("n2")) for key in (KEYS.node, KEYS.maintenance, KEYS.applied)] == [None] * 3
    assert [node["name"] for node in cli.json("node", "ls")] == ["n1"]


def test_a_node_whose_record_nobody_can_read_can_still_be_removed(cli: CommandLine) -> None:
    cli.put(KEYS.node("odd"), b"{")

    cli.ok("node", "rm", "odd")

    assert cli.get(KEYS.node("odd")) is None


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
    _web(cli)

    cli.ok("service", "update", "web", "--affinity", "client-ip")
    cli.ok("service", "update", "web", "-p", "9090:90", "--no-wait")

    stored = cli.get(KEYS.service("web"))
    assert stored["affinity"] == "client-ip"
    assert [(p["published"], p["mode"]) for p in stored["ports"]] == [(9090, "host")]


def test_services_are_listed_in_natural_order_with_swarms_notation(cli: CommandLine) -> None:
    _web(cli)
    for name in ("web-10", "web-2"):
        cli.ok("service", "create", name, "-p", "9090:90", "--no-wait")

    header, *rows = cli.ok("service", "ls").splitlines()

    assert header.split() == ["NAME", "REPLICAS", "VIP", "PORTS"]
    assert [row.split()[0] for row in rows] == ["web", "web-2", "web-10"]
    assert rows[0].split()[1] == "1/2"
    assert rows[0].endswith("  *:8080->80/tcp")
    assert rows[1].endswith("  *:9090->90/tcp (host)")


def test_the_tasks_of_a_service_show_health_and_the_state_of_their_node(cli: CommandLine) -> None:
    _web(cli)
    cli.add_node("n3", 3, alive=False)
    cli.ok("task", "add", "web", "web-3", "--node", "n3", "-a", "10.0.3.5", "--weight", "0")

    header, *rows = cli.ok("service", "ps", "web").splitlines()

    assert header.split() == ["TASK", "NODE", "ADDRESSES", "STATE", "HEALTH", "PORTS"]
    assert "running" in rows[0]
    assert "unhealthy: HTTP 500" in rows[1]
    assert "node down" in rows[2]
    assert [task["eligible"] for task in cli.json("service", "ps", "web")] == [True, False, False]


def test_a_service_is_inspected_with_endpoint_tasks_and_problems(cli: CommandLine) -> None:
    _web(cli)
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
    _web(cli)

    result = cli.run("service", "rm", "web")

    assert result.exit_code == 0
    assert "web/web-1, web/web-2" in result.stderr
    assert cli.get(KEYS.service("web")) is None
    assert [task["id"] for task in cli.json("task", "ls")] == ["web-1", "web-2"]


def test_removing_a_service_with_its_tasks_leaves_nothing(cli: CommandLine) -> None:
    _web(cli)
    cli.ok("service", "create", "other", "--no-wait")
    for number in range(3, 150):
        record = {"service": "web", "id": f"web-{number}", "node": "n1", "addresses": ["10.0.1.9"]}
        cli.put(KEYS.task("web", f"web-{number}"), record)

    cli.ok("service", "rm", "web", "other", "--tasks")

    assert cli.json("service", "ls") == []
    assert cli.json("task", "ls") == []


# ---- task


def test_a_task_is_written_as_automation_would_write_it(cli: CommandLine) -> None:
    _web(cli)
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
    _web(cli)

    result = cli.run("task", "add", "web", "web-7", "--node", "n1", "-a", "10.0.2.7")

    assert result.exit_code == 0
    assert "10.0.2.7" in result.stderr
    assert cli.get(KEYS.task("web", "web-7")) is not None


def test_tasks_are_listed_of_one_service_or_of_all_and_removed(cli: CommandLine) -> None:
    _web(cli)
    cli.ok("service", "create", "api", "--vip", "none")
    cli.ok("task", "add", "api", "api-1", "--node", "n1", "-a", "10.0.1.6")

    assert [row[:2] for row in _columns(cli.ok("task", "ls"))[1:]] == [
        ["api", "api-1"], ["web", "web-1"], ["web", "web-2"],
    ]  # fmt: skip
    assert [task["id"] for task in cli.json("task", "ls", "web")] == ["web-1", "web-2"]
    cli.ok("task", "rm", "web", "web-1")
    assert [task["id"] for task in cli.json("task", "ls", "web")] == ["web-2"]


# ---- options


def test_common_options_stand_before_the_noun_or_after_the_verb(cli: CommandLine) -> None:
    before = cli.ok("--json", "--etcd", "http://a:1", "--etcd", "http://b:1", "node", "ls")
    assert cli.asked is not None
    first = cli.asked.endpoints
    after = cli.ok("node", "ls", "--json", "--etcd", "http://a:1", "--etcd", "http://b:1")

    assert first == cli.asked.endpoints == ("http://a:1", "http://b:1")
    assert json.loads(before) == json.loads(after)


def test_options_win_over_the_environment_and_that_over_the_file(
    cli: CommandLine, tmp_path: Path
) -> None:
    path = tmp_path / "x.toml"
    text = 'node = "n1"\n[etcd]\nendpoints = ["http://file:1"]\nuser = "f"\npassword = "p"\n'
    path.write_text(text)
    environment = {"MESH_ETCD": "http://env:1,http://env:2", "MESH_ETCD_USER": "e:q"}

    def asked(*args: str, **env: str) -> tuple[tuple[str, ...], str | None]:
        assert cli.run("node", "ls", *args, env={"MESH_CONFIG": str(path), **env}).exit_code == 0
        assert cli.asked is not None
        return cli.asked.endpoints, cli.asked.user

    assert asked() == (("http://file:1",), "f")
    assert asked(**environment) == (("http://env:1", "http://env:2"), "e")
    assert asked("--etcd", "http://opt:1", **environment) == (("http://opt:1",), "e")


def test_the_schema_of_one_kind_accepts_what_the_verbs_write(cli: CommandLine) -> None:
    whole = json.loads(cli.ok("schema"))
    one = json.loads(cli.ok("schema", "service"))

    assert set(whole["properties"]) >= {"cluster", "service", "task", "node"}
    assert one["$ref"] == "#/$defs/ServiceSpec"
    cli.ok("service", "create", "web", "--no-wait")
    fields = set(one["$defs"]["ServiceSpec"]["properties"])
    assert set(cli.get(KEYS.service("web"))) == fields

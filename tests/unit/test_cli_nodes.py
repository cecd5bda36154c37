"""`mesh cluster`, `mesh node`, `mesh schema` and the common options on an in-memory store."""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING

import pytest

from mesh.agent import config
from mesh.model.node import Role
from mesh.store.memory import MemoryStore
from tests.support.commands import KEYS, CommandLine, add_web, start_cluster, words

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """An etcd without a cluster, and a host that has not joined one."""
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "etc" / "agent.toml")
    return CommandLine(MemoryStore())


@pytest.fixture
def cli(empty: CommandLine) -> CommandLine:
    start_cluster(empty)
    return empty


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
    assert ["ingress-ports", "20000-20999"] in words(shown)
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

    assert shown.splitlines()[-1] == f"  Next, as root: mesh agent --config {path}"
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


def test_labels_of_operators_win_over_those_of_the_configuration(cli: CommandLine) -> None:
    cli.put(KEYS.node("n1"), {**cli.get(KEYS.node("n1")), "labels": {"zone": "a", "rack": "1"}})

    first = cli.json("node", "update", "n1", "--label", "zone=b", "--label", "hall=x")
    then = cli.json("node", "update", "n1", "--label-rm", "rack", "--label-rm", "hall")

    assert first == {"node": "n1", "labels": {"zone": "b", "rack": "1", "hall": "x"}}
    assert then == {"node": "n1", "labels": {"zone": "b"}}
    assert cli.get(KEYS.labels("n1")) == {"labels": {"zone": "b", "rack": ""}}
    assert cli.json("node", "inspect", "n1")["labels"] == {"zone": "b"}


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (("n1",), 2, "nothing to change"),
        (("n7", "--label", "a=b"), 3, "no node 'n7'"),
        (("n1", "--label-rm", "zone"), 3, "no label 'zone'"),
        (("n1", "--label", "/=b"), 2, "'/' is not a key"),
    ],
)
def test_labels_that_cannot_be_changed_are_told(
    cli: CommandLine, given: tuple[str, ...], code: int, said: str
) -> None:
    refused = cli.run("node", "update", *given)

    assert refused.exit_code == code
    assert said in refused.stderr


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

    header, *rows = words(cli.ok("node", "ls"))

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
    add_web(cli)

    found = cli.json("node", "inspect", "n1")

    assert found["number"] == 1
    assert found["overlay"] == ["10.0.0.1", "fd12:3456:789a::1"]
    assert [task["id"] for task in found["tasks"]] == ["web-1"]
    assert "publicKey: " in cli.ok("node", "inspect", "n1")


def test_a_removed_node_leaves_no_record_of_its_own_and_its_tasks_are_named(
    cli: CommandLine,
) -> None:
    add_web(cli)
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


def test_a_configuration_that_only_the_environment_names_may_be_missing(
    cli: CommandLine, tmp_path: Path
) -> None:
    environment = {"MESH_CONFIG": str(tmp_path / "later.toml")}

    assert cli.run("node", "ls", env=environment).exit_code == 0
    assert cli.run("node", "join", "n3", env=environment).exit_code == 0
    assert cli.run("agent", env={"MESH_CONFIG": str(tmp_path / "none")}).exit_code == 2
    assert config.load(tmp_path / "later.toml").node == "n3"


def test_the_schema_of_one_kind_accepts_what_the_verbs_write(cli: CommandLine) -> None:
    whole = json.loads(cli.ok("schema"))
    one = json.loads(cli.ok("schema", "service"))

    assert set(whole["properties"]) >= {"cluster", "service", "task", "node"}
    assert one["$ref"] == "#/$defs/ServiceSpec"
    cli.ok("service", "create", "web", "--limit-connections", "9", "--no-wait")
    fields = set(one["$defs"]["ServiceSpec"]["properties"])
    assert set(cli.get(KEYS.service("web"))) <= fields

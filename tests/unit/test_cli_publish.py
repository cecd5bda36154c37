"""Publishing on the command line: ports written, changed, refused and shown."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import pytest

from mesh.agent import config
from mesh.cli import ports
from mesh.model.mapping import PortMapping
from mesh.model.publish import Protocol, PublishedPort, PublishMode
from mesh.model.service import ServiceSpec
from mesh.model.view import IngressPort, ServiceView
from mesh.store.memory import MemoryStore
from tests.support.commands import KEYS, CommandLine, start_cluster

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CREATE: Final = ("service", "create", "web", "--vip", "none", "--no-wait")
UPDATE: Final = ("service", "update", "web", "--no-wait")


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "agent.toml")
    command_line = CommandLine(MemoryStore())
    start_cluster(command_line)
    return command_line


def stored(cli: CommandLine) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cli.get(KEYS.service("web"))["ports"]
    return found


def published(cli: CommandLine) -> list[str]:
    """The stored ports as "published->target/protocol mode"."""
    return [
        f"{p['published'] or '*'}->{p['target']}/{p['protocol']} {p['mode']}" for p in stored(cli)
    ]


# ---- what is written


def test_both_syntaxes_and_ranges_become_one_record_per_port(cli: CommandLine) -> None:
    cli.ok(*CREATE, "-p", "8000-8002:9000-9002/udp", "--publish", "target=80,mode=ingress,name=www")

    assert published(cli) == [
        "8000->9000/udp host",
        "8001->9001/udp host",
        "8002->9002/udp host",
        "*->80/tcp ingress",
    ]
    assert stored(cli)[3] == {
        "target": 80,
        "published": None,
        "protocol": "tcp",
        "mode": "ingress",
        "hostIP": None,
        "name": "www",
    }


def test_create_shows_ranges_as_they_were_written(cli: CommandLine) -> None:
    shown = cli.ok(
        *CREATE, "-p", "8000-8999:8000-8999", "-p", "53:53/udp", "-p", "target=1-3,published=random"
    )

    assert shown.splitlines()[2:] == [
        "    8000-8999:8000-8999/tcp (host)",
        "    53:53/udp (host)",
        "    random:1-3/tcp (host)",
    ]


def test_a_random_port_and_a_host_address_are_written_down(cli: CommandLine) -> None:
    cli.ok(*CREATE, "-p", "target=80,published=random", "-p", "[2001:DB8::1]:53:53/sctp")

    first, second = stored(cli)
    assert first["random"] is True
    assert (second["hostIP"], second["protocol"]) == ("2001:db8::1", "sctp")


def test_ports_are_added_and_removed_one_by_one(cli: CommandLine) -> None:
    cli.ok(*CREATE, "-p", "8080:80", "-p", "53:53/udp", "-p", "8000-8002:9000-9002")

    cli.ok(*UPDATE, "--publish-rm", "53/udp", "--publish-rm", "9000-9001", "--publish-add", "81:81")

    assert published(cli) == ["8080->80/tcp host", "8002->9002/tcp host", "81->81/tcp host"]


def test_a_port_that_is_added_again_takes_its_own_place(cli: CommandLine) -> None:
    cli.ok(*CREATE, "-p", "8080:80")

    cli.ok(*UPDATE, "--publish-add", "8080:80", "--publish-mode", "ingress")

    assert published(cli) == ["8080->80/tcp ingress"]


def test_a_port_that_does_not_go_with_the_others_changes_nothing(cli: CommandLine) -> None:
    cli.ok(*CREATE, "-p", "8080:80")

    result = cli.run(*UPDATE, "--publish-add", "8080:81")

    assert result.exit_code == 2
    assert "published twice" in result.stderr
    assert published(cli) == ["8080->80/tcp host"]


def test_of_many_ingress_ports_the_one_that_is_taken_is_named(cli: CommandLine) -> None:
    cli.put(KEYS.port_allocation("tcp", 8500), {"service": "api", "target": 80})

    result = cli.run(*CREATE, "-p", "8000-8999:8000-8999", "--publish-mode", "ingress")

    assert result.exit_code == 4
    assert "8500/tcp belongs to service 'api'" in result.stderr
    assert cli.get(KEYS.service("web")) is None


# ---- the default mode


def test_the_mode_is_the_options_the_environments_the_configurations_or_host(
    cli: CommandLine, tmp_path: Path
) -> None:
    file = tmp_path / "agent.toml"
    modes = []
    for number, (args, env, line) in enumerate(
        [
            ((), {}, ""),
            ((), {}, 'publish_mode = "ingress"'),
            ((), {"MESH_PUBLISH_MODE": "host"}, 'publish_mode = "ingress"'),
            (("--publish-mode", "ingress"), {"MESH_PUBLISH_MODE": "host"}, ""),
        ]
    ):
        file.write_text(f'node = "n1"\n{line}\n')
        name = f"web{number}"
        result = cli.run(
            "service", "create", name, "--vip", "none", "--no-wait", "-p", "80", *args, env=env
        )
        assert result.exit_code == 0, result.output
        modes.append(cli.get(KEYS.service(name))["ports"][0]["mode"])

    assert modes == ["host", "ingress", "host", "ingress"]


def test_help_names_the_mode_that_is_in_force(cli: CommandLine, tmp_path: Path) -> None:
    args = ("service", "create", "--help")

    assert "[default: host]" in cli.run(*args).stdout
    assert "[default: ingress]" in cli.run(*args, env={"MESH_PUBLISH_MODE": "ingress"}).stdout
    (tmp_path / "agent.toml").write_text('node = "n1"\npublish_mode = "ingress"\n')
    assert "[default: ingress]" in cli.run(*args).stdout


def test_a_mode_in_the_environment_that_means_nothing_is_refused(cli: CommandLine) -> None:
    result = cli.run(*CREATE, "-p", "80", env={"MESH_PUBLISH_MODE": "all"})

    assert result.exit_code == 2
    assert "MESH_PUBLISH_MODE 'all': choose host or ingress" in result.stderr
    assert cli.run("service", "create", "--help", env={"MESH_PUBLISH_MODE": "all"}).exit_code == 0


# ---- protected ports


def test_a_protected_port_is_published_by_force_only_and_says_so(cli: CommandLine) -> None:
    refused = cli.run(*CREATE, "-p", "8080:80", "-p", "22:22")
    cli.ok(*CREATE, "-p", "8080:80", "-p", "22:22", "--force")

    assert refused.exit_code == 4
    assert [port.get("force", False) for port in stored(cli)] == [False, True]


def test_what_others_wrote_may_be_changed_beside_a_protected_port(cli: CommandLine) -> None:
    port = {"target": 22, "published": 22}
    cli.put(KEYS.service("web"), {"name": "web", "vip": "none", "ports": [port]})

    cli.ok(*UPDATE, "--publish-add", "8080:80")
    cli.ok(*UPDATE, "--publish-rm", "22")

    assert published(cli) == ["8080->80/tcp host"]


def test_the_list_of_protected_ports_is_set_at_init(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "agent.toml")
    cli = CommandLine(MemoryStore())
    shown = cli.ok("cluster", "init", "--protected-ports", "8080, 6000-6063/udp")

    result = cli.run(*CREATE, "-p", "8080:80")

    assert "8080, 6000-6063/udp" in shown
    assert result.exit_code == 4
    assert cli.json("cluster", "show")["protectedPorts"] == ["8080", "6000-6063/udp"]
    wrong = CommandLine(MemoryStore()).run("cluster", "init", "--protected-ports", "ssh")
    assert wrong.exit_code == 2
    assert "protected port 'ssh'" in wrong.stderr


# ---- what is shown


def _task(cli: CommandLine, node: str, *mappings: Mapping[str, object]) -> None:
    name = f"web-{node}"
    cli.ok("task", "add", "web", name, "--node", node, "-a", f"10.0.{node[1:]}.5")
    common = {"podName": name, "podIP": "10.0.1.5", "service": "web"}
    cli.put(KEYS.published(node, name), [{**mapping, **common} for mapping in mappings])


def test_ps_shows_where_each_task_is_really_published(cli: CommandLine) -> None:
    cli.ok(*CREATE, "-p", "80", "-p", "target=90,published=random", "-p", "8000-8001:8000-8001/udp")
    udp = [{"hostPort": p, "containerPort": p, "protocol": "UDP"} for p in (8000, 8001)]
    _task(cli, "n1", {"hostPort": 32000, "containerPort": 80, "protocol": "tcp"}, *udp)
    _task(cli, "n2", {"hostPort": 32000, "containerPort": 80, "protocol": "tcp", "hostIP": "::1"})

    rows = cli.ok("service", "ps", "web").splitlines()[1:]

    assert rows[0].endswith("*:32000->80/tcp (host), *:8000-8001->8000-8001/udp (host)")
    assert rows[1].endswith("  [::1]:32000->80/tcp (host)")
    assert cli.json("service", "ps", "web")[1]["ports"] == [
        {
            "Protocol": "tcp",
            "TargetPort": 80,
            "PublishedPort": 32000,
            "PublishMode": "host",
            "HostIP": "::1",
        }
    ]


def test_a_task_of_the_same_name_is_not_mistaken(cli: CommandLine) -> None:
    cli.ok(*CREATE, "-p", "80")
    _task(cli, "n1")
    other = {"hostPort": 32007, "containerPort": 80, "protocol": "tcp", "podIP": "10.0.1.6"}
    cli.put(KEYS.published("n1", "web-n1"), [{**other, "podName": "web-n1", "service": "api"}])

    assert cli.ok("service", "ps", "web").splitlines()[1].endswith("  -")


def test_inspect_shows_the_endpoint_and_what_nodes_could_not_do(cli: CommandLine) -> None:
    cli.ok(*CREATE, "-p", "target=80,name=www", "-p", "8080:90", "--publish-mode", "ingress")
    cli.put(KEYS.port_allocation("tcp", 30000), {"service": "web", "target": 80})
    mine = {"about": "task web-1 of service web", "message": "port 22/tcp is protected"}
    cli.apply("n1", problems=[mine, {"about": "task x of service web2", "message": "other"}])

    found = cli.json("service", "inspect", "web")

    assert found["endpoint"]["Ports"] == [
        {
            "Name": "www",
            "Protocol": "tcp",
            "TargetPort": 80,
            "PublishedPort": 30000,
            "PublishMode": "ingress",
        },
        {"Protocol": "tcp", "TargetPort": 90, "PublishMode": "ingress"},
    ]
    assert [problem["about"] for problem in found["problems"]] == ["node n1"]
    assert "port 22/tcp is protected" in found["problems"][0]["message"]


def test_ls_compacts_ranges(cli: CommandLine) -> None:
    cli.ok(*CREATE, "-p", "8000-8010:8000-8010", "-p", "9000-9002", "-p", "7000-7002:70")

    (row,) = cli.ok("service", "ls").splitlines()[1:]

    assert row.endswith(
        "*:?->9000-9002/tcp (host), *:7000-7002->70/tcp (host), *:8000-8010->8000-8010/tcp (host)"
    )


def test_a_removed_node_leaves_no_record(cli: CommandLine) -> None:
    cli.ok(*CREATE, "-p", "80")
    _task(cli, "n2", {"hostPort": 32000, "containerPort": 80, "protocol": "tcp"})
    _task(cli, "n1", {"hostPort": 32000, "containerPort": 80, "protocol": "tcp"})
    cli.put(KEYS.cursors("n2"), {"tcp": 32001})

    cli.ok("node", "rm", "n2", "--force")

    assert cli.get(KEYS.cursors("n2")) is None
    assert cli.get(KEYS.published("n2", "web-n2")) is None
    assert cli.get(KEYS.published("n1", "web-n1")) is not None


def test_ports_on_different_addresses_are_never_one_range() -> None:
    mappings = [
        PortMapping(
            host_port=number,
            container_port=number,
            protocol=Protocol.TCP,
            host_ip=host,
            pod_name="x",
            pod_ip="10.0.1.5",
        )
        for host in ("", "192.0.2.1")
        for number in (80, 81)
    ]

    assert ports.notation(ports.of_task(mappings)) == (
        "*:80-81->80-81/tcp (host), 192.0.2.1:80-81->80-81/tcp (host)"
    )


def test_a_thousand_ports_are_shown_as_fast_as_one() -> None:
    span = range(10000, 11000)
    asked = tuple(PublishedPort(target=n, published=n, mode=PublishMode.INGRESS) for n in span)
    given = tuple(IngressPort(Protocol.TCP, n, n) for n in span)
    view = ServiceView(ServiceSpec(name="web", ports=asked), ingress=given)

    assert ports.notation(ports.assign(view)) == "*:10000-10999->10000-10999/tcp"


# ---- ports that processes of nodes have


def _listen(cli: CommandLine, node: str, number: int) -> None:
    one = {"protocol": "tcp", "port": number, "process": "nginx", "pid": 812}
    cli.put(KEYS.listeners(node), {"listeners": [one]})


def test_an_ingress_port_that_a_node_uses_is_refused_with_who_has_it(cli: CommandLine) -> None:
    _listen(cli, "n1", 8080)

    refused = cli.run(*CREATE, "-p", "8080:80", "--publish-mode", "ingress")
    elsewhere = cli.run(*CREATE, "-p", "8081:80", "--publish-mode", "ingress")

    assert refused.exit_code == 4
    assert "port 8080/tcp on node n1 is used by nginx (pid 812): stop it" in refused.stderr
    assert elsewhere.exit_code == 0


def test_ports_that_nodes_use_are_published_by_force(cli: CommandLine) -> None:
    _listen(cli, "n1", 8080)
    cli.ok(*CREATE, "-p", "8080:80", "-p", "8081:80")
    before = [port.get("force", False) for port in stored(cli)]

    cli.ok(*UPDATE, "--force")

    assert before == [False, False]  # in host mode nobody knows where the tasks will be
    assert [port.get("force", False) for port in stored(cli)] == [True, False]


def test_what_a_dead_node_listened_on_keeps_nobody_from_a_port(cli: CommandLine) -> None:
    _listen(cli, "n2", 8080)
    asyncio.run(cli.store.delete(KEYS.alive("n2")))

    cli.ok(*CREATE, "-p", "8080:80", "--publish-mode", "ingress")

    assert published(cli) == ["8080->80/tcp ingress"]


def test_a_removed_node_leaves_no_listeners(cli: CommandLine) -> None:
    _listen(cli, "n2", 8080)
    shown = cli.ok("node", "inspect", "n2")

    cli.ok("node", "rm", "n2", "--force")

    assert "nginx" in shown
    assert cli.get(KEYS.listeners("n2")) is None

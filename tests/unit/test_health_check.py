"""What a health check may say, its short form, and what it comes to for a task."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import pytest

from mesh.errors import InvalidRecord
from mesh.health import target
from mesh.health.target import Exec, Http, Tcp
from mesh.model import health_syntax
from mesh.model.health import CheckType, Fallback, HealthCheck, Scheme, statuses
from mesh.model.publish import Protocol, PublishedPort
from mesh.model.service import ServiceSpec
from mesh.model.task import Task
from mesh.model.view import ServiceView
from mesh.store import schema
from tests.support import records
from tests.support.commands import KEYS, CommandLine, add_web, judge
from tests.unit.test_cli_services import cli

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ("cli",)

PORTS: Final = (
    PublishedPort(target=53, protocol=Protocol.UDP),
    PublishedPort(target=8080, published=80),
)
TASK: Final = Task(
    service="web", id="web-1", node="n1", addresses=("fd00::5", "10.0.1.5"), netns="/run/netns/w"
)


def probed(**check: Any) -> object:
    return target.of(ServiceSpec(name="web", ports=PORTS, health=HealthCheck(**check)), TASK)


@pytest.mark.parametrize(
    ("check", "words"),
    [
        ({"type": "ping"}, "ping"),
        ({"type": "tcp", "interval": "99ms"}, "interval"),
        ({"type": "tcp", "interval": "2h"}, "interval"),
        ({"type": "tcp", "timeout": "0s"}, "timeout"),
        ({"type": "tcp", "startPeriod": "2h"}, "startPeriod"),
        ({"type": "tcp", "rise": 0}, "rise"),
        ({"type": "tcp", "fall": 101}, "fall"),
        ({"type": "tcp", "port": 65536}, "port"),
        ({"type": "http", "path": "healthz"}, "path"),
        ({"type": "http", "path": "/a b"}, "path"),
        ({"type": "http", "path": "/a\r\nX: y"}, "path"),
        ({"type": "http", "host": "a\r\nX: y"}, "host"),
        ({"type": "http", "status": "2xx"}, "status"),
        ({"type": "http", "status": "300-200"}, "status"),
        ({"type": "exec"}, "command"),
        ({"type": "tcp", "command": ["true"]}, "command"),
        ({"type": "exec", "command": ["a\0b"]}, "command"),
        ({"type": "tcp", "fallback": "panic"}, "fallback"),
        ({"type": "tcp", "typo": 1}, "typo"),
    ],
)
def test_a_check_that_cannot_be_is_refused_with_the_field(
    check: Mapping[str, object], words: str
) -> None:
    ((key, record),) = records.service("web", {"target": 80}, health=check).items()

    with pytest.raises(InvalidRecord, match=words):
        schema.parse_service(key, records.item(key, record).value)


def test_a_check_by_connections_needs_a_port() -> None:
    udp = PublishedPort(target=53, protocol=Protocol.UDP)

    with pytest.raises(ValueError, match="needs a port"):
        ServiceSpec(name="dns", ports=(udp,), health=HealthCheck(type=CheckType.TCP))
    ServiceSpec(name="dns", ports=(udp,), health=HealthCheck(type=CheckType.TCP, port=8080))


@pytest.mark.parametrize("path", ["/etc/shadow", "/run/netns/../x", "/proc/self/ns/net", "netns"])
def test_only_network_namespaces_are_taken_for_such(path: str) -> None:
    with pytest.raises(ValueError, match="netns"):
        Task(service="web", id="a", node="n1", addresses=("10.0.1.5",), netns=path)


def test_statuses_are_ranges_and_numbers() -> None:
    assert statuses("200,204,300-302") == (range(200, 201), range(204, 205), range(300, 303))


def test_the_first_address_is_probed_on_the_first_target_over_tcp() -> None:
    assert probed(type=CheckType.TCP) == Tcp("fd00::5", 8080)
    assert probed(type=CheckType.TCP, port=9000) == Tcp("fd00::5", 9000)
    assert probed() is None


def test_a_request_names_its_host_and_port() -> None:
    http = CheckType.HTTP
    passing = (range(200, 400),)
    plain = Http("fd00::5", 8080, "/", "[fd00::5]:8080", passing, tls=False, verify=True)

    assert probed(type=http) == plain
    assert probed(type=http, port=80) == plain._replace(port=80, host="[fd00::5]")
    secure = probed(type=http, scheme=Scheme.HTTPS, host="web.example:8443", verify=False)
    assert isinstance(secure, Http)
    assert (secure.host, secure.name) == ("web.example:8443", "web.example")
    assert (secure.tls, secure.verify) == (True, False)
    assert plain.name == "fd00::5"


def test_a_command_learns_whom_it_checks() -> None:
    found = probed(type=CheckType.EXEC, command=("true",))

    assert isinstance(found, Exec)
    assert found.netns == "/run/netns/w"
    assert dict(found.environment) == {
        "MESH_TASK": "web-1",
        "MESH_SERVICE": "web",
        "MESH_NODE": "n1",
        "MESH_ADDRESS": "fd00::5",
    }


# ---- who gets new connections


@pytest.mark.parametrize(
    ("fallback", "healthy", "eligible"),
    [
        (Fallback.REFUSE, {"a"}, {"a"}),
        (Fallback.REFUSE, (), ()),
        (Fallback.ANY, {"a"}, {"a"}),
        (Fallback.ANY, (), {"a", "b"}),
        (Fallback.ANY, {"gone", "off"}, {"a", "b"}),
    ],
)
def test_only_healthy_tasks_are_eligible_unless_none_is_and_any_may_be(
    fallback: Fallback, healthy: set[str], eligible: set[str]
) -> None:
    check = HealthCheck(type=CheckType.TCP, port=80, fallback=fallback)
    nodes = {"a": "n1", "b": "n1", "off": "n9"}
    tasks = tuple(
        Task(service="web", id=id, node=node, addresses=("10.0.1.5",)) for id, node in nodes.items()
    )
    view = ServiceView(
        ServiceSpec(name="web", health=check), tasks=tasks, healthy=frozenset(healthy)
    )

    assert {task.id for task in view.eligible({"n1"})} == set(eligible)


def test_without_a_check_every_running_task_is_eligible() -> None:
    spec = ServiceSpec(name="web", health=HealthCheck())

    assert ServiceView(spec, tasks=(TASK,)).eligible({"n1"}) == (TASK,)


# ---- the command line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("none", {"type": CheckType.NONE}),
        ("tcp", {"type": CheckType.TCP}),
        ("tcp:90", {"type": CheckType.TCP, "port": 90}),
        ("http", {"type": CheckType.HTTP}),
        ("http:/healthz", {"type": CheckType.HTTP, "path": "/healthz"}),
        ("http:81/a?b:c", {"type": CheckType.HTTP, "port": 81, "path": "/a?b:c"}),
        ("https:443", {"type": CheckType.HTTP, "port": 443, "scheme": Scheme.HTTPS}),
        ("exec:psql -h '::1'", {"type": CheckType.EXEC, "command": ("psql", "-h", "::1")}),
    ],
)  # fmt: skip
def test_a_short_form_says_it_all(text: str, told: Mapping[str, object]) -> None:
    usual = {"port": None, "path": "/", "scheme": Scheme.HTTP, "command": ()}

    assert health_syntax.parse(text) == {**usual, **told}


@pytest.mark.parametrize("text", ["", "tcp:", "tcp:/a", "none:80", "exec:", "http:x", "exec:'a"])
def test_a_short_form_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"health check|path|port|empty|quotation"):
        health_syntax.parse(text)


def test_options_make_a_check(cli: CommandLine) -> None:
    timing = ["--health-interval", "1s", "--health-timeout", "500ms", "--health-start-period", "1m"]
    counts = ["--health-rise", "1", "--health-fall", "5", "--health-fallback", "any"]
    http = ["--health-status", "200", "--health-host", "a.example", "--health-no-verify"]
    cli.ok(
        *("service", "create", "web", "-p", "80", "--no-wait", "--health", "https:8443/up"),
        *timing, *counts, *http,
    )  # fmt: skip

    assert cli.get(KEYS.service("web"))["health"] == {
        "type": "http", "port": 8443, "path": "/up", "scheme": "https", "host": "a.example",
        "status": "200", "verify": False, "command": [], "interval": "1s", "timeout": "500ms",
        "rise": 1, "fall": 5, "startPeriod": "1m", "fallback": "any",
    }  # fmt: skip


def test_an_update_changes_what_is_given_and_keeps_the_rest(cli: CommandLine) -> None:
    update = ("service", "update", "web", "--no-wait")
    cli.ok("service", "create", "web", "-p", "80", "--no-wait", "--health", "http:/up")

    cli.ok(*update, "--health-fall", "7", "--health-path", "/healthz")
    changed = cli.get(KEYS.service("web"))["health"]
    cli.ok(*update, "--health", "tcp")
    shorter = cli.get(KEYS.service("web"))["health"]
    cli.ok(*update, "--health-cmd", "true 'a b'")
    command = cli.get(KEYS.service("web"))["health"]
    cli.ok(*update, "--health-type", "tcp")
    again = cli.get(KEYS.service("web"))["health"]
    cli.ok(*update, "--health", "none")

    assert (changed["type"], changed["path"], changed["fall"]) == ("http", "/healthz", 7)
    assert (shorter["type"], shorter["path"], shorter["fall"]) == ("tcp", "/", 7)
    assert (command["type"], command["command"]) == ("exec", ["true", "a b"])
    assert (again["type"], again["command"]) == ("tcp", [])
    assert cli.get(KEYS.service("web"))["health"] is None


@pytest.mark.parametrize(
    "words",
    [
        ("--health-fall", "3"),
        ("--health", "exec"),
        ("--health", "tcp", "--health-interval", "often"),
        ("--health", "http", "--health-path", "x"),
    ],
)
def test_a_check_that_cannot_be_is_bad_usage(cli: CommandLine, words: tuple[str, ...]) -> None:
    result = cli.run("service", "create", "web", "-p", "80", "--no-wait", *words)

    assert result.exit_code == 2
    assert "health" in result.output


def test_the_namespace_of_a_task_is_part_of_its_record(cli: CommandLine) -> None:
    add_web(cli)
    task = ("task", "add", "web", "web-3", "--node", "n1", "-a", "10.0.1.9")

    refused = cli.run(*task, "--netns", "/etc/passwd")
    cli.ok(*task, "--netns", "/run/netns/web-3")

    assert refused.exit_code == 2
    assert cli.get(KEYS.task("web", "web-3"))["netns"] == "/run/netns/web-3"
    assert "netns" not in cli.get(KEYS.task("web", "web-1"))


@pytest.mark.parametrize(
    ("passed", "shown"), [(5, "5s"), (125, "2m"), (7300, "2h"), (200_000, "2d"), (-9, "0s")]
)
def test_a_list_says_since_when_a_task_is_what_it_is(
    cli: CommandLine, passed: int, shown: str
) -> None:
    add_web(cli)
    since = (datetime.now(UTC) - timedelta(seconds=passed)).isoformat()

    judge(cli, 1, healthy=False, since=since, reason="HTTP 503")

    assert f"unhealthy {shown}: HTTP 503" in cli.ok("task", "ls")
    assert cli.json("task", "ls")[0]["health"]["since"] == since

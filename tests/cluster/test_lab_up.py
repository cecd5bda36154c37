"""`mesh lab` as its users meet it: a whole cluster, from the command line."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from mesh.lab import control, environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.cluster

LIMIT = 60.0

MESH = (sys.executable, "-m", "mesh")
PROBE = (sys.executable, "-m", "mesh.lab.probe", "--json")
REPLICA = (sys.executable, "-m", "mesh.lab.replica", "--udp")


def mesh(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*MESH, *arguments), capture_output=True, text=True, check=False, timeout=LIMIT,
        env=environment.with_this_package(os.environ),
    )  # fmt: skip


def printed(*arguments: str) -> Any:
    done = mesh(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def begin(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        (*MESH, *arguments), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment.with_this_package(os.environ),
    )  # fmt: skip


def caller(script: str) -> subprocess.Popen[bytes]:
    """A shell with a process group of its own."""
    return subprocess.Popen(
        ("sh", "-c", script), env=environment.with_this_package(os.environ), start_new_session=True
    )


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.fixture
def two() -> Iterator[dict[str, Any]]:
    """What `mesh lab up` printed of a lab with two nodes."""
    yield printed("lab", "up", "--nodes", "2", "--json")
    mesh("lab", "down")


def test_a_lab_tells_what_it_is(two: dict[str, Any]) -> None:
    assert printed("lab", "status", "--json") == two
    assert {"name", "etcd", "nodes", "clients"} <= two.keys()
    keys = {
        "name", "netns", "underlay4", "underlay6", "overlay4", "overlay6", "subnet4", "subnet6",
        "agentPid", "config",
    }  # fmt: skip
    for node in two["nodes"]:
        assert keys <= node.keys()
        assert None not in node.values()
    for one in two["clients"]:
        assert {"name", "netns", "address4", "address6"} <= one.keys()


def test_a_published_port_answers_on_every_node_and_shows_the_client(two: dict[str, Any]) -> None:
    created = mesh(
        "service", "create", "web", "--etcd", two["etcd"], "--publish-mode", "ingress",
        "-p", "8080:80", "-p", "8080:80/udp",
    )  # fmt: skip
    assert created.returncode == 0, created.stderr
    assert mesh("lab", "task", "web", "n1", "--id", "one", "--", *REPLICA).returncode == 0
    assert mesh("lab", "task", "web", "n2", "--id", "two", "--", *REPLICA).returncode == 0

    for client in two["clients"]:
        for node in two["nodes"]:
            for host, address in (
                (node["underlay4"], client["address4"]),
                (f"[{node['underlay6']}]", client["address6"]),
            ):
                for protocol in ((), ("--udp",)):
                    target = (f"http://{host}:8080", "--count", "30", *protocol)
                    told = printed("lab", "exec", client["name"], "--", *PROBE, *target)
                    assert told["answered"] == 30
                    assert told["replicas"].keys() == {"one", "two"}
                    assert told["clients"] == {address: 30}


def test_a_node_comes_back_from_power_off(two: dict[str, Any]) -> None:
    assert mesh("lab", "kill", "n2").returncode == 0
    off = printed("lab", "status", "--json")["nodes"][1]
    assert (off["netns"], off["agentPid"]) == (None, None)

    assert mesh("lab", "start", "n2").returncode == 0

    on = printed("lab", "status", "--json")["nodes"][1]
    assert on["overlay4"] == two["nodes"][1]["overlay4"]
    started = mesh("lab", "task", "web", "n2", "--", *REPLICA)
    assert started.returncode == 0, started.stderr


def test_an_agent_comes_back_from_a_kill(two: dict[str, Any]) -> None:
    assert mesh("lab", "kill", "n1", "--agent").returncode == 0
    assert printed("lab", "status", "--json")["nodes"][0]["agentPid"] is None

    assert mesh("lab", "start", "n1").returncode == 0

    assert printed("lab", "status", "--json")["nodes"][0]["agentPid"] is not None


def test_errors_have_their_exit_codes(two: dict[str, Any]) -> None:
    for code, *arguments in (
        (4, "up"),
        (3, "status", "--name", "none"),
        (3, "down", "--name", "none"),
        (3, "kill", "n9"),
        (3, "task", "web", "n9", "--", "true"),
        (3, "logs", "n9"),
        (3, "exec", "n9", "--", "true"),
        (7, "exec", "n1", "--", "sh", "-c", "exit 7"),
        (127, "exec", "n1", "--", "no-such-program"),
        (2, "task", "web", "n1", "--id", "n2", "--", "true"),
        (2, "up", "--name", "a/b"),
    ):
        done = mesh("lab", *map(str, arguments))
        assert (done.returncode, len(done.stderr.splitlines())) in {(code, 1), (7, 0)}, done


def test_a_task_that_ends_at_once_is_an_error_with_its_reason(two: dict[str, Any]) -> None:
    done = mesh("lab", "task", "web", "n1", "--", "no-such-program")

    assert done.returncode == 1
    assert "no-such-program" in done.stderr


async def test_a_lab_ends_with_the_killed_caller_of_the_command(tmp_path: Path) -> None:
    up = tmp_path / "up"
    shell = caller(f"{' '.join(MESH)} lab up --nodes 1 && touch {up}; while :; do sleep 1000; done")
    try:
        await until(up.exists)

        shell.kill()

        await until(lambda: not control.names())
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()


def test_a_caller_that_stopped_something_is_not_hung_up_on(two: dict[str, Any]) -> None:
    run = f"{' '.join(MESH)} lab exec {two['nodes'][0]['name']} -- true"

    shell = caller(f"sleep 1000 & kill -STOP $!; {run}; code=$?; kill -KILL $!; exit $code")

    assert shell.wait(LIMIT) == 0


@pytest.mark.parametrize("pause", [0.0, 0.2, 0.5])
async def test_nothing_is_left_when_start_is_interrupted(pause: float) -> None:
    starting = begin("lab", "up", "--nodes", "1")
    await until(lambda: bool(control.names()))
    await asyncio.sleep(pause)  # any moment of the start will do

    starting.send_signal(signal.SIGINT)
    starting.communicate(timeout=LIMIT)

    if starting.returncode == 0:  # it was up before it was interrupted
        mesh("lab", "down")
    else:
        assert starting.returncode == 130
    assert control.names() == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGKILL, -9)]
)
async def test_a_lab_in_the_foreground_ends_with_its_command(number: int, code: int) -> None:
    foreground = begin("lab", "up", "--nodes", "1", "--foreground", "--json")
    assert foreground.stdout is not None
    assert foreground.stdout.readline() == "{\n"

    foreground.send_signal(number)
    foreground.communicate(timeout=LIMIT)

    assert foreground.returncode == code
    await until(lambda: not control.names())


async def test_a_lab_in_the_foreground_ends_when_its_caller_exits() -> None:
    shell = caller(f"{' '.join(MESH)} lab up --nodes 1 --foreground & sleep 1")

    assert shell.wait(LIMIT) == 0

    await until(lambda: not control.names())


def test_a_missing_tool_is_named_with_its_package() -> None:
    hidden = 'mount --bind /dev/null $(command -v wg) && exec "$@"'

    done = subprocess.run(
        ("unshare", "--mount", "sh", "-c", hidden, "sh", *MESH, "lab", "up"),
        capture_output=True, text=True, check=False, timeout=LIMIT,
        env=environment.with_this_package(os.environ),
    )  # fmt: skip

    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "wireguard-tools" in done.stderr

"""A lab lives and dies with the processes it belongs to, and leaves nothing behind.

Most labs here are built without agents: what ends them does not depend on what runs in them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mesh import errors
from mesh.lab import client, control, environment, wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

pytestmark = pytest.mark.netns

LIMIT = 60.0

BUILD = """
import asyncio, sys
from mesh.lab import ancestry, client
async def up(name, watched):
    own = client.launch(name, 1, watched)
    await own.built()
    own.release()
watched = [] if "keep" in sys.argv else ancestry.above(any_end_of_caller=False)
asyncio.run(up(sys.argv[1], watched))
"""
"""What `mesh lab up` does, without the agents."""


def living() -> set[int]:
    """Every process that is not just waiting to be buried."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state = path.read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found.add(int(path.parent.name))
    return found


@pytest.fixture
def before() -> Iterator[set[int]]:
    """The processes before the test, which are all there may be after it."""
    found = living()
    yield found
    for left in living() - found:
        os.kill(left, signal.SIGKILL)


@pytest.fixture
def up(tmp_path: Path) -> Path:
    """A file by which a caller's shell says that its lab is up."""
    return tmp_path / "up"


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def status(name: str) -> wire.LabStatus:
    """The lab's status, once it is released by the program that builds it."""
    async with asyncio.timeout(LIMIT):
        while True:
            try:
                return await control.status(name)
            except errors.NotFound:
                await asyncio.sleep(0.02)


def caller(script: str) -> subprocess.Popen[bytes]:
    """A shell that runs `build NAME`, and whatever else."""
    build = f"build() {{ {sys.executable} -c '{BUILD}' \"$@\"; }}; "
    return subprocess.Popen(
        ["sh", "-c", build + script], env=environment.with_this_package(os.environ)
    )


def python(*arguments: str) -> subprocess.Popen[bytes]:
    """A program of this package."""
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, env=environment.with_this_package(os.environ))


@pytest.fixture
async def bare(before: set[int]) -> AsyncIterator[client.OwnLab]:
    """A lab of this very process: two nodes without agents."""
    own = client.launch("bare", 2, ())
    try:
        await own.built()
        yield own
    finally:
        await own.end()


async def test_nothing_is_left_of_a_lab_that_was_ended(before: set[int]) -> None:
    assert caller("build one").wait(LIMIT) == 0
    assert control.names() == ["one"]

    await control.down("one")

    assert living() <= before
    assert control.names() == []


async def test_nothing_is_left_when_the_guard_is_killed(before: set[int]) -> None:
    caller("build one").wait(LIMIT)

    os.kill((await status("one")).guard, signal.SIGKILL)

    await until(lambda: living() <= before)
    assert control.names() == []


async def test_nothing_is_left_when_the_first_process_is_killed(bare: client.OwnLab) -> None:
    first = int((await bare.status()).nodes[0].config.split("/")[2])

    os.kill(first, signal.SIGKILL)

    await asyncio.wait_for(bare.ended(), LIMIT)
    await until(lambda: control.names() == [])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
async def test_a_lab_ends_when_its_caller_is_killed(
    before: set[int], up: Path, number: int
) -> None:
    shell = caller(f"build one; : >{up}; while :; do sleep 1000; done")
    await until(up.exists)

    shell.send_signal(number)
    shell.wait(LIMIT)

    await until(lambda: control.names() == [])


async def test_a_lab_ends_when_its_caller_was_killed_but_is_not_buried(
    before: set[int], up: Path
) -> None:
    shell = caller(f"build one; : >{up}; while :; do sleep 1000; done")
    await until(up.exists)

    shell.kill()

    await until(lambda: control.names() == [])
    shell.wait(LIMIT)


async def test_a_lab_ends_when_the_caller_of_its_caller_is_killed(
    before: set[int], up: Path
) -> None:
    outer = caller(f"(build one); : >{up}; (sleep 1000); true")
    await until(up.exists)

    outer.kill()
    outer.wait(LIMIT)

    await until(lambda: control.names() == [])


async def test_a_lab_outlives_a_caller_that_exits(before: set[int]) -> None:
    assert caller("build one; exit 3").wait(LIMIT) == 3

    await asyncio.sleep(0.2)  # nothing tells that nothing will happen

    assert (await control.status("one")).name == "one"
    await control.down("one")


async def test_a_kept_lab_outlives_a_killed_caller(before: set[int], up: Path) -> None:
    shell = caller(f"build one keep; : >{up}; while :; do sleep 1000; done")
    await until(up.exists)

    shell.kill()
    shell.wait(LIMIT)
    await asyncio.sleep(0.2)  # nothing tells that nothing will happen

    assert (await control.status("one")).name == "one"
    await control.down("one")


async def test_nothing_is_left_of_a_lab_whose_builder_is_killed(before: set[int]) -> None:
    builder = python("-c", BUILD, "one")
    await until(lambda: control.names() == ["one"])

    builder.kill()
    builder.wait(LIMIT)

    await until(lambda: living() <= before)
    assert control.names() == []


async def test_labs_run_side_by_side(bare: client.OwnLab) -> None:
    other = client.launch("other", 2, ())
    try:
        await other.built()
        here, there = await bare.status(), await other.status()

        assert control.names() == ["bare", "other"]
        assert here.etcd != there.etcd
        assert {n.netns for n in here.nodes}.isdisjoint(n.netns for n in there.nodes)
    finally:
        await other.end()

    assert (await bare.run("n1", ["true"])).code == 0


async def test_a_name_is_given_once(bare: client.OwnLab) -> None:
    with pytest.raises(errors.Conflict):
        client.launch("bare", 1, ())

    assert (await bare.status()).name == "bare"


async def test_a_lab_touches_nothing_of_its_host(before: set[int]) -> None:
    links, rules, mounts = _printed("ip", "-o", "addr"), _rules(), _mounts()

    own = client.launch("one", 2, ())
    try:
        await own.built()
        during = (_printed("ip", "-o", "addr"), _rules(), _mounts())
    finally:
        await own.end()

    assert (links, rules, mounts) == during
    assert (links, rules, mounts) == (_printed("ip", "-o", "addr"), _rules(), _mounts())


@pytest.mark.parametrize("source", ["c1", "c2", "n1"])
@pytest.mark.parametrize("target", ["192.168.50.12", "fd50::12", "192.168.50.5", "fd50::5"])
async def test_every_machine_reaches_the_nodes_and_etcd(
    bare: client.OwnLab, source: str, target: str
) -> None:
    connect = f"import socket; socket.create_connection(({target!r}, 1), 5)"

    done = await bare.run(source, [sys.executable, "-c", connect])

    assert "ConnectionRefusedError" in done.stderr or target.endswith("5"), done.stderr


async def test_namespaces_and_files_are_reached_from_the_host(bare: client.OwnLab) -> None:
    node = (await bare.status()).node("n2")

    inside = _printed("nsenter", f"--net={node.netns}", "ip", "-o", "addr", "show", "eth0")

    assert node.underlay4 in inside
    assert node.underlay6 in inside
    assert 'node = "n2"' in _printed("cat", node.config)


async def test_a_node_powered_off_is_gone_and_comes_back(bare: client.OwnLab) -> None:
    first = (await bare.status()).node("n1")

    await client.kill("bare", "n1", agent_only=False)

    gone = (await bare.status()).node("n1")
    assert (gone.netns, gone.pid, gone.agent_pid) == (None, None, None)
    assert first.pid not in living()
    with pytest.raises(errors.Conflict):
        await bare.run("n1", ["true"])

    await control.call("bare", wire.Start(target="n1"))

    back = (await bare.status()).node("n1")
    assert back.netns not in {None, first.netns}
    assert back.underlay4 in (await bare.run("n1", ["ip", "-o", "addr"])).stdout
    assert (await bare.run("n2", ["true"])).code == 0


async def test_etcd_can_be_killed_and_keeps_what_it_stored(bare: client.OwnLab) -> None:
    url = (await bare.status()).etcd
    async with client.open_store(url) as store:
        await store.put("/kept", b"1")

        await client.kill("bare", "etcd", agent_only=False)
        await control.call("bare", wire.Start(target="etcd"))

        async with asyncio.timeout(LIMIT):
            found = await store.get("/kept")
    assert found is not None
    assert found.value == b"1"


async def test_a_command_dies_with_the_program_that_runs_it(bare: client.OwnLab) -> None:
    known = living()
    pid = await control.call("bare", wire.Where(machine="c1"))
    runner = python("-m", "mesh.lab.inside", str(pid), "sleep", "1000")
    await until(lambda: len(living() - known) == 3)

    runner.kill()
    runner.wait(LIMIT)

    await until(lambda: living() <= known)


async def test_an_unknown_lab_is_not_found() -> None:
    with pytest.raises(errors.NotFound):
        await control.status("none")


def _printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _rules() -> str:
    return _printed("nft", "list", "ruleset")


def _mounts() -> str:
    return Path("/proc/self/mountinfo").read_text()

"""`mesh lab demo`, as `scripts/demo` runs it: shows a mesh that works, or says what does not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mesh import errors
from mesh.lab import client, control, environment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.cluster

NAME = "test-demo"

LIMIT = 120.0
"""It takes 20 s; a crowded machine may take long to start three nodes."""

GROUPS = {"lab", "ingress", "source", "vip", "host", "closed", "agent", "replica", "node"}


@pytest.fixture
def before() -> Iterator[set[int]]:
    """The processes before the test, which are all there may be after it."""
    found = living()
    yield found
    assert control.names() == []
    assert living() <= found


@pytest.fixture
async def demo(before: set[int]) -> AsyncIterator[asyncio.subprocess.Process]:
    """The demo as a program, which prints JSON."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mesh", "lab", "demo", "--json", "--name", NAME),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment.with_this_package(os.environ),
    )
    yield child
    if child.returncode is None:
        child.kill()
        await child.wait()


async def test_the_demo_shows_a_mesh_that_works(demo: asyncio.subprocess.Process) -> None:
    result = await printed(demo)

    wrong = [check for check in result["checks"] if not check["ok"]]
    assert wrong == [], result.get("logs")
    assert result.keys() == {"ok", "seconds", "checks"}
    assert result["ok"]
    assert {check["name"].partition(":")[0] for check in result["checks"]} == GROUPS
    assert all(check.keys() == {"name", "ok", "detail"} for check in result["checks"])
    assert demo.returncode == 0


async def test_the_demo_fails_and_says_why_when_a_node_dies_under_it(
    demo: asyncio.subprocess.Process,
) -> None:
    await agent_runs("n3")
    await client.kill(NAME, "n3", agent_only=False)

    result = await printed(demo)

    assert demo.returncode == 1
    assert not result["ok"]
    wrong = [check for check in result["checks"] if not check["ok"]]
    assert wrong != []
    assert all(check["detail"] for check in wrong)
    assert "n3" in json.dumps(wrong)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_nothing_is_left_of_a_demo_that_is_interrupted(
    demo: asyncio.subprocess.Process, number: int
) -> None:
    await agent_runs("n3")

    demo.send_signal(number)
    stdout, _ = await asyncio.wait_for(demo.communicate(), LIMIT)

    assert demo.returncode == 128 + number
    assert stdout == b""


async def printed(demo: asyncio.subprocess.Process) -> Any:
    stdout, stderr = await asyncio.wait_for(demo.communicate(), LIMIT)
    assert stdout, stderr.decode()
    return json.loads(stdout)


async def agent_runs(node: str) -> None:
    """Wait until the lab has started the agent of a node."""
    async with asyncio.timeout(LIMIT):
        while True:
            try:
                if (await control.status(NAME)).node(node).agent_pid is not None:
                    return
            except errors.MeshError:
                pass  # not built yet
            await asyncio.sleep(0.02)


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

"""The replica and the probe that demonstrations and tests rely on, over loopback."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from mesh.lab import environment, kernel, probe
from mesh.lab.kernel import Ending

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.netns

PORT = 8000
LIMIT = 20.0


@pytest.fixture
def replica() -> Iterator[None]:
    own = {"MESH_TASK": "web-1", "MESH_NODE": "n1"}
    with subprocess.Popen(
        [sys.executable, "-m", "mesh.lab.replica", "--port", str(PORT), "--udp"],
        env=environment.with_this_package(os.environ | own),
    ) as started:
        deadline = time.monotonic() + LIMIT
        while not _listens():
            assert time.monotonic() < deadline
        yield
        started.kill()


@pytest.mark.parametrize("udp", [False, True])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_replica_says_who_it_is_and_who_asked(
    replica: None, host: str, *, udp: bool
) -> None:
    target = probe.Target(host, PORT, udp, timeout=LIMIT)

    tally = await probe.run(target, count=20, interval=0, parallel=4)

    assert tally.replicas == {"web-1": 20}
    assert tally.clients == {host: 20}


@pytest.mark.parametrize("udp", [False, True])
async def test_a_closed_port_is_refused(*, udp: bool) -> None:
    target = probe.Target("127.0.0.1", PORT, udp, timeout=LIMIT)

    tally = await probe.run(target, count=3, interval=0, parallel=1)

    assert tally.failures == {"refused": 3}


async def test_silence_is_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", PORT)):
        target = probe.Target("127.0.0.1", PORT, udp=False, timeout=0.2)

        tally = await probe.run(target, count=1, interval=0, parallel=1)

    assert tally.failures == {"timeout": 1}


async def test_an_end_without_an_answer_is_a_reset() -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", PORT)
    async with server:
        target = probe.Target("127.0.0.1", PORT, udp=False, timeout=LIMIT)

        tally = await probe.run(target, count=1, interval=0, parallel=1)

    assert tally.failures == {"reset": 1}


async def test_no_route_is_unreachable() -> None:
    target = probe.Target("192.0.2.1", PORT, udp=False, timeout=LIMIT)

    tally = await probe.run(target, count=1, interval=0, parallel=1)

    assert tally.failures == {"unreachable": 1}
    assert tally.as_dict()["unreachable"] == 1


@pytest.mark.parametrize(
    ("script", "expected"), [("exit 3", Ending.EXITED), ("kill -9 $$", Ending.KILLED)]
)
def test_the_kernel_tells_how_a_process_ended(script: str, expected: Ending) -> None:
    child = subprocess.Popen(["sh", "-c", f"read line; {script}"], stdin=subprocess.PIPE)
    held = os.pidfd_open(child.pid)
    try:
        assert kernel.ending(held, child.pid) is Ending.UNDECIDED

        child.communicate(b"\n")

        # Before Linux 6.15 nobody can tell once a process is buried.
        assert kernel.ending(held, child.pid) in {expected, Ending.HIDDEN}
    finally:
        os.close(held)


def _listens() -> bool:
    with socket.socket() as own:
        return own.connect_ex(("127.0.0.1", PORT)) == 0

"""Ports published without etcd when processes are killed, refused, or many; asked of clients."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import pytest

from mesh.dataplane import netns
from mesh.engine import lock, predecessor
from mesh.errors import ApplyFailed, Conflict, MeshError
from mesh.model.publish import Protocol
from tests.support import drivers, rules
from tests.support.echo import REFUSED, ask
from tests.support.lonehost import (
    ADDRESSES,
    HOST,
    SERVER_PORT,
    answers,
    publisher,
)

if TYPE_CHECKING:
    from pathlib import Path

    from mesh.hostports import HostPortPublisher

pytestmark = pytest.mark.netns

TASK: Final = "task-abc123"


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("verb", ["publish", "unpublish"])
def test_a_process_killed_half_way_leaves_all_or_nothing(
    ports: HostPortPublisher, state: Path, backend: str, verb: str, moment: str
) -> None:
    """Killed with the state written, before or after the kernel was asked."""
    ports.publish_ports("kept", ADDRESSES["c2"], [f"30082:{SERVER_PORT}"])
    if verb == "unpublish":
        ports.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}", f"30081:{SERVER_PORT}"])

    _killed(state, backend, verb, moment)

    assert not ports.unpublish_ports("nobody")  # whatever it is that is called next
    there = bool(ports.get_published_ports(TASK))
    assert there == (verb == "publish")  # it was written down
    assert answers(30080) == answers(30081) == ({"c1"} if there else {REFUSED})
    assert answers(30082) == {"c2"}
    assert not ports.check().repaired


_DIES: Final = """
import os, signal, sys
from mesh.dataplane import netns
from mesh.hostports import installation, HostPortPublisher

state, backend, verb, moment, task, address = sys.argv[1:]
change = installation.Installation.change

async def die(self, task):
    if moment == "after":
        await change(self, task)
    os.kill(os.getpid(), signal.SIGKILL)

installation.Installation.change = die
with netns.entered("/run/netns/host"):
    publisher = HostPortPublisher(state, backend=backend)
if verb == "publish":
    publisher.publish_ports(task, address.split(","), ["30080:8080", "30081:8080"])
else:
    publisher.unpublish_ports(task)
"""


def _killed(state: Path, backend: str, verb: str, moment: str) -> None:
    words = (str(state), backend, verb, moment, TASK, ",".join(ADDRESSES["c1"]))
    done = subprocess.run((sys.executable, "-c", _DIES, *words), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_what_the_kernel_refuses_is_taken_back(
    ports: HostPortPublisher, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}"])
    before = ports.get_published_ports(TASK)

    with monkeypatch.context() as patch:
        _refusing(ports, backend, tmp_path, patch)
        with pytest.raises(ApplyFailed, match="as they were"):
            ports.publish_ports(TASK, ADDRESSES["c2"], [f"30081:{SERVER_PORT}"])
        with pytest.raises(MeshError):
            ports.publish_ports("new", ADDRESSES["c2"], [f"30082:{SERVER_PORT}"])
    _allowing(ports, backend)

    assert ports.get_published_ports(TASK) == before
    assert ports.get_published_ports("new") == ()
    ports.check()
    assert answers(30080) == {"c1"}
    assert answers(30081) == answers(30082) == {REFUSED}


def _refusing(
    ports: HostPortPublisher, backend: str, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    """Have nf_tables refuse the publisher's thread, or iptables' program for IPv6 fail."""
    if backend == "nftables":
        _on_thread(ports, lambda: _capability(granted=False))
        return
    shims = tmp_path / "shims"
    shims.mkdir()
    shim = shims / f"ip6{backend.removeprefix('ip')}-restore"
    shim.write_text("#!/bin/sh\necho 'no memory' >&2\nexit 1\n")
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    patch.setenv("PATH", f"{shims}:{os.environ['PATH']}")


def _allowing(ports: HostPortPublisher, backend: str) -> None:
    if backend == "nftables":
        _on_thread(ports, lambda: _capability(granted=True))


def _on_thread(ports: HostPortPublisher, call: object) -> None:
    async def work(_transactions: object) -> None:
        call()  # type: ignore[operator]

    ports._shared.submit(work).result()


def _capability(*, granted: bool) -> None:
    """Have or have not CAP_NET_ADMIN in this thread (capset(2)); it stays permitted."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0
    bit = 1 << 12
    data[0] = data[0] | bit if granted else data[0] & ~bit
    assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())


_PUBLISHES: Final = """
import sys
from mesh.dataplane import netns
from mesh.hostports import HostPortPublisher

state, backend, name = sys.argv[1:]
with netns.entered("/run/netns/host"):
    publisher = HostPortPublisher(state, backend=backend)
with publisher:
    for number in range(4):
        publisher.publish_ports(f"{name}-{number}", "172.17.0.2", ["8080", "8080/udp"])
    publisher.unpublish_ports(f"{name}-0")
"""


def test_threads_and_processes_at_once(ports: HostPortPublisher, state: Path, backend: str) -> None:
    """Each has what it asked for, and nobody's number is another's."""
    others = [
        subprocess.Popen((sys.executable, "-c", _PUBLISHES, str(state), backend, name))
        for name in ("p1", "p2")
    ]

    def work(thread: int) -> None:
        for number in range(4):
            ports.publish_ports(f"t{thread}-{number}", ADDRESSES["c1"], ["8080", "8080/udp"])
        ports.unpublish_ports(f"t{thread}-0")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert [each.wait(120) for each in others] == [0, 0]

    found = ports.published()
    assert found.keys() == {f"{w}-{n}" for w in ("p1", "p2", "t0", "t1", "t2") for n in (1, 2, 3)}
    for protocol in Protocol.TCP, Protocol.UDP:
        given = [
            m.host_port for each in found.values() for m in each.mappings if m.protocol is protocol
        ]
        assert len(set(given)) == len(given) == len(found)
        for number in given:
            answer = ask("client", protocol, ADDRESSES["host"][0], number)
            assert answer == f"c1 {ADDRESSES['client'][0]}"
    assert not ports.check().repaired


def test_one_owner_in_a_namespace(
    ports: HostPortPublisher, state: Path, backend: str, tmp_path: Path
) -> None:
    """Another state directory's ports, and an agent's, stay as they are."""
    ports.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}"])
    with publisher(tmp_path / "second", backend) as second:
        with pytest.raises(Conflict, match="another state directory"):
            second.publish_ports("mine", ADDRESSES["c2"], [f"30081:{SERVER_PORT}"])
        with pytest.raises(Conflict, match="another state directory"):
            second.cleanup()
        assert second.published() == {}
        with netns.entered(HOST):
            with pytest.raises(Conflict, match="mesh unpublish --all"):
                asyncio.run(predecessor.check())
            with lock.namespace(), pytest.raises(Conflict, match="mesh service create"):
                ports.unpublish_ports(TASK)
        assert answers(30080) == {"c1"}

        second.cleanup(force=True)
        assert answers(30080) == {REFUSED}
    with netns.entered(HOST):
        driver = drivers.make(backend, rules.PARAMETERS)
        try:
            asyncio.run(driver.prepare())
            with pytest.raises(Conflict, match="belongs to a mesh agent"):
                ports.check()
            with pytest.raises(Conflict, match="belongs to a mesh agent"):
                ports.cleanup(force=True)
        finally:
            asyncio.run(driver.remove())
            driver.close()
    assert ports.check().repaired
    assert answers(30080) == {"c1"}
    assert state.exists()


def test_one_namespace_to_a_state_directory(
    ports: HostPortPublisher, state: Path, backend: str
) -> None:
    ports.publish_ports(TASK, "172.17.0.2", [f"30080:{SERVER_PORT}"])
    with rules.namespace():
        elsewhere = publisher_here(state, backend)
        with elsewhere:
            with pytest.raises(Conflict, match="another network namespace"):
                elsewhere.publish_ports("mine", "172.17.0.3", ["30081:80"])
            assert elsewhere.restore() == 1
            with pytest.raises(Conflict, match="another network namespace"):
                ports.unpublish_ports(TASK)
    assert ports.restore() == 1


def publisher_here(state: Path, backend: str) -> HostPortPublisher:
    from mesh.hostports import HostPortPublisher

    return HostPortPublisher(state, backend=backend)

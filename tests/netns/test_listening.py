"""A replica is used once it listens on its service's ports, and not before."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from mesh.containers import listening, run
from mesh.model.publish import Protocol, PublishedPort
from mesh.model.service import ServiceSpec
from mesh.store import schema
from tests.support import containers
from tests.support.containers import KEYS, python, record, running, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.netns

SLOW = """
import pathlib, socket, time
ports = (("SOCK_STREAM", {go!r}), ("SOCK_DGRAM", {then!r}))
held = []
for kind, permission in ports:
    while not pathlib.Path(permission).exists():
        time.sleep(0.01)
    held.append(socket.socket(socket.AF_INET6, getattr(socket, kind)))
    held[-1].bind(("::", 8080))
    if kind == "SOCK_STREAM":
        held[-1].listen()
    pathlib.Path(permission + ".done").touch()
time.sleep(1000)
"""


@pytest.fixture
def bridge() -> Iterator[str]:
    with containers.node_bridge() as name:
        yield name


@pytest.mark.usefixtures("bridge")
async def test_a_task_is_registered_once_it_listens_on_every_port(tmp_path: Path) -> None:
    store = await containers.cluster_of_one()
    spoken = (Protocol.TCP, Protocol.UDP)
    ports = tuple(PublishedPort(target=8080, published=80, protocol=p) for p in spoken)
    await store.put(KEYS.service("web"), schema.encode(ServiceSpec(name="web", ports=ports)))
    go, then = tmp_path / "go", tmp_path / "then"
    options = run.RunOptions("web", "web-1", python(SLOW.format(go=str(go), then=str(then))))

    stop, config = asyncio.Event(), containers.node_config(tmp_path)
    task = asyncio.create_task(run.run_until(stop, store, KEYS, config, options))
    go.touch()
    await until((tmp_path / "go.done").exists)
    with_tcp_only = await record(store, options)
    then.touch()
    await until(lambda: record(store, options))
    stop.set()
    await task

    assert with_tcp_only is None


@pytest.mark.usefixtures("bridge")
async def test_a_task_that_never_listens_is_registered_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "LIMIT_SECONDS", 0.3)
    store = await containers.cluster_of_one()
    spec = ServiceSpec(name="web", ports=(PublishedPort(target=8080, published=80),))
    await store.put(KEYS.service("web"), schema.encode(spec))
    options = run.RunOptions("web", "web-1", ("sleep", "1000"))

    async with running(store, containers.node_config(tmp_path), options) as task:
        await until(lambda: record(store, options))
        await task.end()


def test_connected_sockets_are_nobody_who_listens() -> None:
    table = (
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n"
        "   0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n"
        "   1: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0\n"
    )

    assert list(listening.parse(table, Protocol.TCP)) == [(Protocol.TCP, 80)]


def test_a_listening_endpoint_of_sctp_counts_and_another_does_not() -> None:
    table = (
        " ENDPT     SOCK   STY SST HBKT LPORT   UID INODE LADDRS\n"
        "       0        0 2   10  29   8080      0 41234 0.0.0.0 \n"
        "       0        0 0   7   30   8081      0 41235 10.0.1.5 fd00::5 \n"
    )

    assert list(listening.parse(table, Protocol.SCTP)) == [(Protocol.SCTP, 8080)]

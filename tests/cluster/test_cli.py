"""The `mesh` program against a real etcd: processes, signals, pipes."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from mesh.controller.lead import lead
from mesh.store.election import Election
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_channel import EtcdOptions
from mesh.store.schema import Keys
from tests.support.etcd import etcd
from tests.support.stores import running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.support.etcd import Etcd

pytestmark = pytest.mark.cluster

LIMIT = 60.0
"""Seconds any verb may take on a loaded machine."""

MESH = (sys.executable, "-m", "mesh")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Etcd]:
    with etcd(tmp_path) as running_server:
        yield running_server


async def _start(server: Etcd, *args: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *MESH, "--etcd", server.url, *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


async def _mesh(server: Etcd, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a verb."""
    process = await _start(server, *args)
    async with asyncio.timeout(LIMIT):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def _json(server: Etcd, *args: str) -> Any:
    code, out, err = await _mesh(server, *args, "--json")
    assert code == 0, err
    return json.loads(out)


@asynccontextmanager
async def _manager(server: Etcd) -> AsyncIterator[None]:
    """The elected allocator, as a manager's agent runs it."""
    store, keys = EtcdStore(EtcdOptions(endpoints=(server.url,))), Keys()
    try:
        election = Election(store, keys.leader, "n1", 5)
        async with running(election.run(lambda guard: lead(store, keys, guard))):
            yield
    finally:
        await store.close()


async def test_a_service_lives_from_creation_to_removal(server: Etcd) -> None:
    await _json(server, "cluster", "init")
    ports = ("-p", "8080:80", "--publish-mode", "ingress")

    async with _manager(server):
        code, created, _ = await _mesh(server, "service", "create", "web", *ports)
        shown = await _json(server, "service", "inspect", "web")
        taken = await _mesh(server, "service", "create", "api", *ports)
        again = await _mesh(server, "service", "create", "web", *ports)
        removed = await _mesh(server, "service", "rm", "web")
        listed = await _json(server, "service", "ls")

    assert code == 0
    assert created.splitlines()[0].endswith("Service created: web")
    assert "  VIP: 10.1.0.1, fd" in created
    assert "    8080:80/tcp (ingress)" in created
    assert shown["endpoint"]["Ports"][0]["PublishedPort"] == 8080
    assert (taken[0], "belongs to service 'web'" in taken[2]) == (4, True)
    assert (again[0], "'web' exists" in again[2]) == (4, True)
    assert removed[0] == 0
    assert listed == []


async def test_two_inits_at_once_make_one_cluster(server: Etcd) -> None:
    answers = await asyncio.gather(*(_mesh(server, "cluster", "init", "--json") for _ in range(2)))

    assert sorted(code for code, _, _ in answers) == [0, 4]
    (winner,) = (json.loads(out) for code, out, _ in answers if code == 0)
    assert await _json(server, "cluster", "show") == winner


async def test_an_etcd_that_is_gone_is_one_line_and_exit_code_1(server: Etcd) -> None:
    server.stop()

    code, out, err = await _mesh(server, "status")

    assert (code, out) == (1, "")
    lines = [line for line in err.splitlines() if "waiting for" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("mesh: ")
    assert str(server.port) in lines[0]


async def test_a_waiting_verb_says_so_and_ends_at_ctrl_c(server: Etcd) -> None:
    server.freeze()
    for _ in range(5):  # on a crowded machine it may give up before it is interrupted
        process = await _start(server, "status")
        assert process.stderr is not None
        async with asyncio.timeout(LIMIT):
            first = await process.stderr.readline()
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            rest = await process.stderr.read()
            code = await process.wait()
        if code != 1:
            break

    assert f"waiting for etcd at {server.url}" in first.decode()
    assert rest == b""
    assert code == 130


async def test_a_reader_that_stops_early_is_no_error(server: Etcd) -> None:
    command = f"{' '.join(MESH)} schema | true"

    process = await asyncio.create_subprocess_shell(command, stderr=subprocess.PIPE)
    async with asyncio.timeout(LIMIT):
        _, err = await process.communicate()

    assert err == b""


async def test_help_imports_nothing_that_costs_time() -> None:
    heavy = {"asyncio", "grpc", "msgspec", "pyroute2", "rich", "google.protobuf"}
    program = (
        "import sys\nfrom mesh.cli import main\n"
        "try: main.main()\nfinally: print(*sys.modules, file=sys.stderr)"
    )

    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, "--help", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate()

    assert b"Usage: mesh" in out
    assert set(err.decode().split()) & heavy == set()

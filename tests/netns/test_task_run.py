"""The life of a task: registered while it runs, started again, stopped, killed, refused."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
from typing import TYPE_CHECKING

import pytest

from mesh.agent.config import AgentConfig
from mesh.containers import addresses, attach, run
from mesh.errors import Conflict, HostNotReady, NotFound
from mesh.model.allocation import NodeAllocation
from mesh.model.report import Applied
from mesh.model.task import Task
from mesh.store import schema
from mesh.store.memory import MemoryStore
from tests.support import containers
from tests.support.containers import (
    BRIDGE,
    CLUSTER,
    KEYS,
    gone,
    inhabitants,
    links,
    python,
    record,
    running,
    shell,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.netns


@pytest.fixture
def bridge() -> Iterator[str]:
    with containers.node_bridge() as name:
        yield name


@pytest.fixture
async def store() -> MemoryStore:
    return await containers.cluster_of_one()


@pytest.fixture
def config(tmp_path: Path) -> AgentConfig:
    return containers.node_config(tmp_path)


@pytest.mark.usefixtures("bridge")
async def test_a_task_is_registered_while_it_runs_and_told_who_it_is(
    store: MemoryStore, config: AgentConfig, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    tell = f"net=$(readlink /proc/self/ns/net) env > {told}.new; mv {told}.new {told}"
    options = run.RunOptions("web", "web-1", shell(f"{tell}; exec sleep 1000"), weight=7)
    async with running(store, config, options) as task:
        await until(told.exists)
        found = await record(store, options)
        assert found is not None
        expected = Task(
            service="web", id="web-1", node="n1", weight=7, netns=found.netns,
            addresses=("10.0.3.2", "fd11:2233:4455:3::2"),
        )  # fmt: skip
        assert found == expected
        assert f"net={os.readlink(str(found.netns))}" in told.read_text().splitlines()
        assert {line for line in told.read_text().splitlines() if line.startswith("MESH_")} >= {
            "MESH_TASK=web-1",
            "MESH_SERVICE=web",
            "MESH_NODE=n1",
            "MESH_ADDRESS4=10.0.3.2",
            "MESH_ADDRESS6=fd11:2233:4455:3::2",
        }

        assert await task.end() == 128 + signal.SIGTERM

    assert await record(store, options) is None
    assert links() == {"lo", BRIDGE}
    assert addresses.claims(tmp_path / "addresses") == {}


@pytest.mark.usefixtures("bridge")
async def test_sigterm_ends_the_registration_before_the_command(
    store: MemoryStore, config: AgentConfig, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    options = run.RunOptions(
        "web", "web-1", python(TAKES_LEAVE.format(told=told, until=tmp_path / "go"))
    )
    ending = asyncio.create_task(run.run_task(store, KEYS, config, options))
    await until((tmp_path / "told.ready").exists)
    await until(lambda: record(store, options))

    os.kill(os.getpid(), signal.SIGTERM)
    await until(told.exists)

    assert await record(store, options) is None
    assert not ending.done()
    (tmp_path / "go").touch()
    assert await ending == 3


TAKES_LEAVE = """
import pathlib, signal, time
told = pathlib.Path("{told}")
def leave(*_):
    told.touch()
    while not pathlib.Path("{until}").exists():
        time.sleep(0.02)
    raise SystemExit(3)
signal.signal(signal.SIGTERM, leave)
told.with_suffix(".ready").touch()
while True:
    time.sleep(1)
"""


@pytest.mark.usefixtures("bridge")
async def test_a_stopping_task_runs_until_every_living_node_took_it_out(
    store: MemoryStore, config: AgentConfig
) -> None:
    def applied(revision: int) -> bytes:
        return schema.encode(Applied(revision=revision, backend="memory", version="1"))

    for node in ("n2", "odd"):
        await store.put(KEYS.alive(node), b"")
    for node in ("n2", "dead"):
        await store.put(KEYS.applied(node), applied(1))
    await store.put(KEYS.applied("odd"), b"nonsense")
    options = run.RunOptions("web", "web-1", shell("sleep 1000"))
    async with running(store, config, options) as task:
        task.stop.set()
        await until(lambda: gone(store, options))
        assert not task.ending.done()
        assert inhabitants("web-1")

        await store.put(KEYS.applied("n2"), applied(1000))

        assert await task.ending == 128 + signal.SIGTERM


@pytest.mark.usefixtures("bridge")
async def test_a_command_that_ends_is_started_and_registered_again(
    store: MemoryStore, config: AgentConfig, tmp_path: Path
) -> None:
    flag = tmp_path / "lived"
    program = (
        f"[ -e {flag}2 ] && exec sleep 1000; [ -e {flag} ] && touch {flag}2; touch {flag}; exit 1"
    )
    options = run.RunOptions("web", "web-1", shell(f"sleep 0.3; {program}"))
    history: list[bool] = []

    async def listen() -> None:
        async for changes in store.watch({KEYS.under("tasks"): 0}):
            history.extend(change.value is not None for change in changes.changes)

    listening = asyncio.create_task(listen())
    async with running(store, config, options):
        await until(lambda: len(history) >= 5)

        assert history == [True, False, True, False, True]
        found = await record(store, options)
        assert found is not None
        assert found.addresses == ("10.0.3.2", "fd11:2233:4455:3::2")
    listening.cancel()


@pytest.mark.usefixtures("bridge")
async def test_without_restart_the_exit_code_is_the_commands(
    store: MemoryStore, config: AgentConfig
) -> None:
    for code, program in ((0, "exit 0"), (7, "exit 7"), (137, "kill -9 $$")):
        options = run.RunOptions("web", "web-1", shell(program), restart=False)

        assert await run.run_until(asyncio.Event(), store, KEYS, config, options) == code


def supervise(directory: str) -> None:
    """What `mesh task run` does, in a process that will be killed."""

    async def main() -> None:
        store = MemoryStore()
        await store.put(KEYS.cluster, schema.encode(CLUSTER))
        await store.put(KEYS.node_allocation(3), schema.encode(NodeAllocation(node="n1")))
        config = AgentConfig(node="n1", state_dir=directory, bridge=BRIDGE)
        program = f"setsid sleep 1001 & sleep 1002 & touch {directory}/begun; wait"
        await run.run_task(store, KEYS, config, run.RunOptions("web", "web-1", shell(program)))

    asyncio.run(main())


@pytest.mark.usefixtures("bridge")
async def test_a_killed_supervisor_leaves_nothing_and_its_address_is_given_again(
    config: AgentConfig, store: MemoryStore, tmp_path: Path
) -> None:
    supervisor = multiprocessing.get_context("spawn").Process(
        target=supervise, args=(str(tmp_path),)
    )
    supervisor.start()
    await until((tmp_path / "begun").exists)
    await until(lambda: any("1001" in command for command in inhabitants("web-1")))
    assert attach.link_name("web-1") in links()

    supervisor.kill()
    await until(lambda: not inhabitants("web-1"))

    await until(lambda: links() == {"lo", BRIDGE})
    (tmp_path / "addresses/.lock").write_text("")
    options = run.RunOptions("web", "web-1", shell("sleep 1000"))
    async with running(store, config, options):
        found = await record(store, options)
        assert found is not None
        assert found.addresses[0] == "10.0.3.2"
    await asyncio.to_thread(supervisor.join)


@pytest.mark.usefixtures("bridge")
async def test_a_task_that_another_node_runs_is_a_conflict_and_left_alone(
    store: MemoryStore, config: AgentConfig
) -> None:
    other = Task(service="web", id="web-1", node="n2", addresses=("10.0.2.9",))
    await store.put(KEYS.task("web", "web-1"), schema.encode(other))
    options = run.RunOptions("web", "web-1", shell("sleep 1000"))

    with pytest.raises(Conflict, match="node n2"):
        await run.run_until(asyncio.Event(), store, KEYS, config, options)

    assert await record(store, options) == other


@pytest.mark.usefixtures("bridge")
async def test_a_record_that_another_node_took_over_is_left_to_it(
    store: MemoryStore, config: AgentConfig
) -> None:
    other = Task(service="web", id="web-1", node="n2", addresses=("10.0.2.9",))
    options = run.RunOptions("web", "web-1", shell("sleep 1000"))
    async with running(store, config, options) as task:
        await store.put(KEYS.task("web", "web-1"), schema.encode(other))

        await task.end()

    assert await record(store, options) == other


@pytest.mark.usefixtures("bridge")
async def test_a_task_already_here_is_a_conflict_and_goes_on(
    store: MemoryStore, config: AgentConfig
) -> None:
    options = run.RunOptions("web", "web-1", shell("sleep 1000"))
    async with running(store, config, options) as task:
        with pytest.raises(Conflict, match="on this node"):
            await run.run_until(asyncio.Event(), store, KEYS, config, options)

        assert not task.ending.done()
        assert await record(store, options) is not None


async def test_a_node_without_a_bridge_is_told_to_run_the_agent(
    store: MemoryStore, config: AgentConfig
) -> None:
    options = run.RunOptions("web", "web-1", shell("sleep 1000"))

    with pytest.raises(HostNotReady, match=f"{BRIDGE} not found.*mesh agent"):
        await run.run_until(asyncio.Event(), store, KEYS, config, options)


async def test_without_a_cluster_nothing_is_started(config: AgentConfig) -> None:
    options = run.RunOptions("web", "web-1", shell("sleep 1000"))

    with pytest.raises(NotFound, match="mesh cluster init"):
        await run.run_until(asyncio.Event(), MemoryStore(), KEYS, config, options)


@pytest.mark.usefixtures("bridge")
async def test_a_task_waits_for_its_nodes_number(store: MemoryStore, config: AgentConfig) -> None:
    await store.delete(KEYS.node_allocation(3))
    await store.put(KEYS.node_allocation(4), b"nonsense")
    options = run.RunOptions("web", "web-1", shell("exit 5"), restart=False)
    ending = asyncio.create_task(run.run_until(asyncio.Event(), store, KEYS, config, options))
    await asyncio.sleep(0)
    assert not ending.done()

    await store.put(KEYS.node_allocation(9), schema.encode(NodeAllocation(node="n1")))

    assert await ending == 5


async def test_a_node_that_gets_no_number_says_so(
    store: MemoryStore, config: AgentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.delete(KEYS.node_allocation(3))
    monkeypatch.setattr(run, "NUMBER_SECONDS", 0.1)

    with pytest.raises(HostNotReady, match="n1 has no number"):
        await run.wait_for_network(store, KEYS, CLUSTER, config.node)


@pytest.mark.usefixtures("bridge")
async def test_a_task_can_be_stopped_while_etcd_is_away(
    store: MemoryStore, config: AgentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    options = run.RunOptions("web", "web-1", shell("sleep 1000"))
    async with running(store, config, options) as task:
        store.stop()

        with caplog.at_level(logging.CRITICAL):
            assert await task.end() == 128 + signal.SIGTERM


@pytest.mark.usefixtures("bridge")
async def test_a_lost_lease_registers_the_task_again(
    store: MemoryStore, config: AgentConfig
) -> None:
    options = run.RunOptions("web", "web-1", shell("sleep 1000"))
    async with running(store, config, options):
        found = await store.get(KEYS.task("web", "web-1"))
        assert found is not None
        assert found.lease != 0

        store.expire(found.lease)

        assert await record(store, options) is None
        await until(lambda: record(store, options))

"""Containers with real namespaces, links and processes, on a bridge as the agent makes it."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mesh.agent.config import AgentConfig
from mesh.containers import addresses, attach, run
from mesh.containers.process import CannotRun, Process
from mesh.dataplane import netns, veth
from mesh.errors import BadUsage, Conflict, HostNotReady, NotFound
from mesh.model.address import FAMILIES, Family
from mesh.model.allocation import NodeAllocation
from mesh.model.cluster import Cluster
from mesh.model.report import Applied
from mesh.model.task import Task
from mesh.store import schema
from mesh.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

pytestmark = pytest.mark.netns

KEYS = schema.Keys()
CLUSTER = Cluster(id="test", prefix6="fd11:2233:4455::/48", liveness_ttl=2)
NETWORK = CLUSTER.network(3)
BRIDGE = "warren-br0"
BRIDGE_SYSCTLS = Path("/proc/sys/net/bridge")
SERVE = """
import socket, sys
servers = [socket.create_server(("", 8080)), socket.create_server(("::", 8080),
           family=socket.AF_INET6)]
import select
while True:
    for server in select.select(servers, [], [])[0]:
        server.accept()[0].sendall(b"hello")
"""


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def links() -> set[str]:
    return {link["ifname"] for link in json.loads(ip("-j", "link"))}


@pytest.fixture
def bridge() -> Iterator[str]:
    """The node's bridge with the gateway addresses; its end takes every link on it along."""
    ip("link", "set", "lo", "up")
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "set", BRIDGE, "up")
    ip("addr", "add", f"{NETWORK.gateway(Family.V4)}/24", "dev", BRIDGE)
    ip("-6", "addr", "add", f"{NETWORK.gateway(Family.V6)}/64", "dev", BRIDGE, "nodad")
    yield BRIDGE
    ip("link", "del", BRIDGE)


@pytest.fixture
async def store() -> MemoryStore:
    """A cluster whose node n1 has number 3."""
    store = MemoryStore()
    await store.put(KEYS.cluster, schema.encode(CLUSTER))
    await store.put(KEYS.node_allocation(3), schema.encode(NodeAllocation(node="n1")))
    return store


@pytest.fixture
def config(tmp_path: Path) -> AgentConfig:
    return AgentConfig(node="n1", state_dir=str(tmp_path), bridge=BRIDGE)


def python(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", program)


def shell(program: str) -> tuple[str, ...]:
    return ("sh", "-c", program)


async def until(condition: Callable[[], Awaitable[Any] | Any], seconds: float = 20) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(seconds):
        while True:
            holds = condition()
            if asyncio.iscoroutine(holds):
                holds = await holds
            if holds:
                return
            await asyncio.sleep(0.01)


class Running:
    """A task under way in this process."""

    def __init__(self, stop: asyncio.Event, ending: asyncio.Task[int]) -> None:
        self.stop = stop
        self.ending = ending

    async def end(self) -> int:
        self.stop.set()
        return await self.ending


@asynccontextmanager
async def running(
    store: MemoryStore, config: AgentConfig, options: run.RunOptions
) -> AsyncIterator[Running]:
    """A task, at least until it is registered."""
    stop = asyncio.Event()
    ending = asyncio.create_task(run.run_until(stop, store, KEYS, config, options))

    async def begun() -> bool:
        return ending.done() or await record(store, options) is not None

    try:
        await until(begun)
        yield Running(stop, ending)
    finally:
        stop.set()
        await asyncio.gather(ending, return_exceptions=True)


async def record(store: MemoryStore, options: run.RunOptions) -> Task | None:
    key = KEYS.task(options.service, options.id)
    found = await store.get(key)
    return None if found is None else schema.parse_task(key, found.value)


def netns_of(task: Task) -> str:
    """The namespace of the process that is told it is `task`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"MESH_TASK={task.id}".encode() in environment:
            return str(path / "ns/net")
    raise AssertionError(f"no process of {task.id}")


def fetch(address: str, source: str | None = None) -> bytes:
    """What the server at `address` says to a client in the namespace `source`, if any."""
    if source is not None:
        with netns.entered(source):
            return fetch(address)
    with socket.create_connection((address, 8080), timeout=5) as connection:
        return connection.recv(100)


@pytest.mark.usefixtures("bridge")
async def test_two_containers_on_a_bridge_reach_each_other_and_the_node(
    store: MemoryStore, config: AgentConfig
) -> None:
    one, two = (run.RunOptions("web", f"web-{n}", python(SERVE)) for n in (1, 2))
    async with running(store, config, one), running(store, config, two):
        tasks = [await record(store, options) for options in (one, two)]
        first, second = (task for task in tasks if task is not None)
        node = await asyncio.create_subprocess_exec(*python(SERVE))
        try:
            for family in FAMILIES:
                index = FAMILIES.index(family)
                gateway = NETWORK.gateway(family)

                async def served(gateway: str = gateway) -> bool:
                    try:
                        return await asyncio.to_thread(fetch, gateway) == b"hello"
                    except OSError:
                        return False

                await until(served)
                source = netns_of(first)
                assert await asyncio.to_thread(fetch, second.addresses[index]) == b"hello"
                assert await asyncio.to_thread(fetch, second.addresses[index], source) == b"hello"
                assert await asyncio.to_thread(fetch, gateway, source) == b"hello"
        finally:
            node.kill()
            await node.wait()


@pytest.mark.usefixtures("bridge")
async def test_a_task_is_registered_while_it_runs_and_told_who_it_is(
    store: MemoryStore, config: AgentConfig, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    options = run.RunOptions(
        "web", "web-1", shell(f"env > {told}.new; mv {told}.new {told}; exec sleep 1000"), weight=7
    )
    async with running(store, config, options) as task:
        await until(told.exists)
        expected = Task(
            service="web", id="web-1", node="n1", weight=7,
            addresses=("10.0.3.2", "fd11:2233:4455:3::2"),
        )  # fmt: skip
        assert await record(store, options) == expected
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

    await store.put(KEYS.alive("n2"), b"")
    for node in ("n2", "dead"):
        await store.put(KEYS.applied(node), applied(1))
    options = run.RunOptions("web", "web-1", shell("sleep 1000"))
    async with running(store, config, options) as task:
        task.stop.set()
        await until(lambda: gone(store, options))
        assert not task.ending.done()
        netns_of(Task(service="web", id="web-1", node="n1", addresses=("10.0.3.2",)))

        await store.put(KEYS.applied("n2"), applied(1000))

        assert await task.ending == 128 + signal.SIGTERM


async def gone(store: MemoryStore, options: run.RunOptions) -> bool:
    return await record(store, options) is None


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


def inhabitants(task: str) -> set[str]:
    """The commands of every process that was told it is `task`, at any depth."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"MESH_TASK={task}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.add((path / "cmdline").read_text())
        except OSError:
            continue
    return found


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
    await asyncio.to_thread(supervisor.join)

    await until(lambda: links() == {"lo", BRIDGE})
    (tmp_path / "addresses/.lock").write_text("")
    options = run.RunOptions("web", "web-1", shell("sleep 1000"))
    async with running(store, config, options):
        found = await record(store, options)
        assert found is not None
        assert found.addresses[0] == "10.0.3.2"


@pytest.mark.usefixtures("bridge")
async def test_what_cannot_be_executed_is_never_registered(
    store: MemoryStore, config: AgentConfig, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    plain.write_text("not a program")
    for code, command in ((127, "no-such-command"), (126, str(plain))):
        revision = (await store.list()).revision
        options = run.RunOptions("web", "web-1", (command,))

        with pytest.raises(CannotRun, match=command) as refusal:
            await run.run_until(asyncio.Event(), store, KEYS, config, options)

        assert refusal.value.exit_code == code
        assert (await store.list()).revision == revision
        assert links() == {"lo", BRIDGE}
        assert addresses.claims(tmp_path / "addresses") == {}


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


@pytest.mark.usefixtures("bridge")
@pytest.mark.skipif(not BRIDGE_SYSCTLS.is_dir(), reason="this kernel has no br_netfilter")
@pytest.mark.parametrize("called", ["0", "1"])
async def test_ports_are_hairpins_where_bridged_packets_pass_netfilter(
    store: MemoryStore, config: AgentConfig, called: str
) -> None:
    for name in ("iptables", "ip6tables"):
        (BRIDGE_SYSCTLS / f"bridge-nf-call-{name}").write_text(called)
    options = run.RunOptions("web", "web-1", shell("sleep 1000"))
    async with running(store, config, options):
        found = json.loads(ip("-j", "-d", "link", "show", attach.link_name("web-1")))[0]

        assert found["linkinfo"]["info_slave_data"]["hairpin"] is (called == "1")


@pytest.mark.usefixtures("bridge")
async def test_a_link_left_over_from_a_crash_is_replaced(
    store: MemoryStore, config: AgentConfig
) -> None:
    ip("link", "add", attach.link_name("web-1"), "type", "bridge")
    options = run.RunOptions("web", "web-1", python(SERVE))
    async with running(store, config, options):
        found = json.loads(ip("-j", "-d", "link", "show", attach.link_name("web-1")))[0]

        assert (found["master"], found["linkinfo"]["info_kind"]) == (BRIDGE, "veth")


async def test_the_link_has_the_bridges_mtu_and_one_address_per_family(bridge: str) -> None:
    ip("link", "set", bridge, "mtu", "1370")
    held = ("10.0.3.9", "fd11:2233:4455:3::9")
    process = await Process.prepare(("sleep", "1000"), {})
    try:
        await asyncio.to_thread(
            veth.connect, attach.plan("web-1", held, bridge, NETWORK), process.netns
        )
        with netns.entered(process.netns):
            (inner,) = json.loads(ip("-j", "addr", "show", "eth0"))

        assert (inner["mtu"], inner["address"]) == (1370, "0a:58:0a:00:03:09")
        assert {one["local"] for one in inner["addr_info"] if one["scope"] == "global"} == set(held)
    finally:
        await process.stop(0)


async def test_a_command_that_ignores_sigterm_is_killed_after_the_grace() -> None:
    process = await Process.prepare(shell("trap '' TERM; echo; sleep 1000"), {})
    await process.begin()

    assert await process.stop(0.2) == 128 + signal.SIGKILL


async def test_orphans_are_reaped_and_do_not_end_the_container() -> None:
    process = await Process.prepare(shell("(sleep 0.05 &) ; sleep 0.3; exit 4"), {})
    await process.begin()

    assert await process.wait() == 4


async def test_a_command_sees_no_process_but_its_own(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    program = f"import os, pathlib; pathlib.Path('{seen}').write_text(str(os.listdir('/proc')))"
    process = await Process.prepare(python(program), {})
    await process.begin()
    assert await process.wait() == 0

    assert {name for name in json.loads(seen.read_text().replace("'", '"')) if name.isdigit()} == {
        "1",
        "2",
    }


def test_without_rights_the_message_names_them() -> None:
    program = "import mesh.containers.run as run; run._check_rights()"
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", sys.executable, "-c", program],
        capture_output=True, text=True, check=False, cwd=Path(run.__file__).parents[2],
    )  # fmt: skip

    assert "CAP_NET_ADMIN and CAP_SYS_ADMIN: run as root" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        run.RunOptions("we/b", "web-1", ("true",)),
        run.RunOptions("web", "", ("true",)),
        run.RunOptions("web", "web-1", ("true",), weight=256),
        run.RunOptions("web", "web-1", ()),
    ],
)
async def test_malformed_options_are_refused_before_anything_is_touched(
    options: run.RunOptions, config: AgentConfig
) -> None:
    with pytest.raises(BadUsage):
        await run.run_until(asyncio.Event(), MemoryStore(), KEYS, config, options)


def test_pauses_double_to_a_limit_and_begin_anew_after_a_steady_life() -> None:
    pauses = [0.0]
    for _ in range(7):
        pauses.append(run.next_pause(pauses[-1], lasted=0.1))

    assert pauses[1:] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert run.next_pause(5.0, lasted=60) == 0.2


def test_a_default_id_is_a_name_that_begins_with_the_services() -> None:
    dice = random.Random(1)
    names = {run.default_id("s" * 63, dice) for _ in range(50)}

    assert len(names) == 50
    for name in names:
        Task(service="web", id=name, node="n1", addresses=("10.0.3.2",))
        assert name.startswith("s" * 56 + "-")

"""Containers with real namespaces, links and processes, on a bridge as the agent makes it."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mesh.containers import addresses, attach, run
from mesh.containers.process import CannotRun, Process
from mesh.dataplane import netns, veth
from mesh.model.address import FAMILIES
from tests.support import containers
from tests.support.containers import (
    BRIDGE,
    KEYS,
    NETWORK,
    SERVE,
    ip,
    links,
    python,
    record,
    running,
    shell,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.agent.config import AgentConfig
    from mesh.model.task import Task
    from mesh.store.memory import MemoryStore

OUTSIDE = ("192.0.2.1", "2001:db8::1")
"""Addresses that containers have only their default routes for (RFC 5737, RFC 3849)."""

pytestmark = pytest.mark.netns
BRIDGE_SYSCTLS = Path("/proc/sys/net/bridge")


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


async def serves(address: str) -> bool:
    """Whether the server at `address` answers the node yet."""
    try:
        return await asyncio.to_thread(fetch, address) == b"hello"
    except OSError:
        return False


@pytest.mark.usefixtures("bridge")
async def test_containers_reach_each_other_the_node_and_what_is_behind_it(
    store: MemoryStore, config: AgentConfig
) -> None:
    for address in OUTSIDE:
        ip("addr", "add", address, "dev", "lo")
    one, two = (run.RunOptions("web", f"web-{n}", python(SERVE)) for n in (1, 2))
    async with running(store, config, one), running(store, config, two):
        tasks = [await record(store, options) for options in (one, two)]
        first, second = (task for task in tasks if task is not None)
        node = await asyncio.create_subprocess_exec(*python(SERVE))
        try:
            for index, family in enumerate(FAMILIES):
                own, peer = first.addresses[index], second.addresses[index]
                for address in (OUTSIDE[index], own, peer):
                    await until(partial(serves, address))

                for address in (peer, NETWORK.gateway(family), OUTSIDE[index]):
                    assert await asyncio.to_thread(fetch, address, netns_of(first)) == b"hello"
        finally:
            node.kill()
            await node.wait()
            for address in OUTSIDE:
                ip("addr", "del", address, "dev", "lo")


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

        (outer,) = json.loads(ip("-j", "link", "show", attach.link_name("web-1")))
        assert outer["mtu"] == 1370
        assert (inner["mtu"], inner["address"]) == (1370, "0a:58:0a:00:03:09")
        assert {one["local"] for one in inner["addr_info"] if one["scope"] == "global"} == set(held)
    finally:
        await process.stop(0)


async def test_a_command_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    deaf = tmp_path / "deaf"
    process = await Process.prepare(shell(f"trap '' TERM; touch {deaf}; sleep 1000"), {})
    await process.begin()
    await until(deaf.exists)

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

"""`mesh task run`: a command in a container on this node's bridge, supervised and registered.

Composes addresses, process, link and registration, in that order, and takes them down in the
opposite one.  Never outlived by the command.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.containers import addresses, attach, listening
from mesh.containers.process import Process
from mesh.containers.registration import Registration
from mesh.dataplane import veth
from mesh.errors import BadUsage, HostNotReady, InvalidRecord, NotFound
from mesh.model.address import FAMILIES
from mesh.model.allocation import NodeAllocation
from mesh.model.cluster import Cluster
from mesh.model.names import check_name
from mesh.model.task import Task
from mesh.store import schema

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from mesh.agent.config import AgentConfig
    from mesh.model.cluster import NodeNetwork
    from mesh.store.protocol import Store
    from mesh.store.schema import Keys

GRACE_SECONDS: Final = 10.0
"""Between SIGTERM and SIGKILL, as Docker and Swarm do."""

BACKOFF_SECONDS: Final = (0.2, 5.0)
"""The first and the longest pause before a restart; it doubles in between."""

STEADY_SECONDS: Final = 10.0
"""A command that ran this long is not failing at its start: the pauses begin anew (Docker)."""

NUMBER_SECONDS: Final = 30.0
"""An agent that just joined has its number as soon as a manager is elected: some seconds."""

_NEEDED_RIGHTS: Final = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What to run.  `id` names the replica in its service, `command` has at least one word."""

    service: str
    id: str
    command: tuple[str, ...]
    weight: int = 1
    restart: bool = True


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything that a container's lives have in common."""

    command: tuple[str, ...]
    environment: dict[str, str]
    pair: veth.Pair
    registration: Registration
    restart: bool


def default_id(service: str, dice: random.Random) -> str:
    """A task's name when the user gives none: the service's and six hexadecimal digits."""
    return f"{service[:56]}-{dice.getrandbits(24):06x}"


def next_pause(previous: float, lasted: float) -> float:
    """Seconds to wait before a restart, after a life of `lasted` seconds; `previous` 0: first."""
    first, longest = BACKOFF_SECONDS
    if not previous or lasted >= STEADY_SECONDS:
        return first
    return min(previous * 2, longest)


async def run_task(store: Store, keys: Keys, config: AgentConfig, options: RunOptions) -> int:
    """Run a task until SIGTERM or SIGINT stops it; the exit code of its command.

    Must be called in the main thread.  Raises what `run_until` raises.
    """
    with _stop_signals() as stop:
        return await run_until(stop, store, keys, config, options)


async def run_until(
    stop: asyncio.Event, store: Store, keys: Keys, config: AgentConfig, options: RunOptions
) -> int:
    """Run a task until `stop` is set; the exit code of its command.

    Raises BadUsage, CannotRun (the command), Conflict (the task runs elsewhere), HostNotReady
    (rights, bridge, node number), NotFound (no cluster), StoreUnavailable, or MeshError if no
    address is free.
    """
    _check(options)
    _check_rights()
    cluster = await _cluster(store, keys)
    network = await wait_for_network(store, keys, cluster, config.node)
    await asyncio.to_thread(veth.check_bridge, config.bridge)
    with _addresses(config, network, options.id) as held:
        task = Task(
            service=options.service,
            id=options.id,
            node=config.node,
            addresses=held,
            weight=options.weight,
        )
        plan = _Plan(
            command=options.command,
            environment=_environment(task),
            pair=attach.plan(task.id, held, config.bridge, network),
            registration=Registration(store, keys, task, cluster.liveness_ttl),
            restart=options.restart,
        )
        await plan.registration.check_free()
        return await _supervise(plan, stop)


async def wait_for_network(store: Store, keys: Keys, cluster: Cluster, node: str) -> NodeNetwork:
    """The node's addresses, once the controller has given it a number.

    Raises HostNotReady after NUMBER_SECONDS.
    """
    prefix = keys.under("allocations/nodes")
    deadline = asyncio.get_running_loop().time() + NUMBER_SECONDS
    waiting = False
    while (number := await _number(store, prefix, node)) is None:
        if asyncio.get_running_loop().time() > deadline:
            raise HostNotReady(
                f"node {node} has no number below {prefix} after {NUMBER_SECONDS:g} s: "
                "does `mesh agent` run here and on a manager?"
            )
        if not waiting:
            _log.warning("waiting for a manager to give node %s a number", node)
            waiting = True
        await asyncio.sleep(0.25)
    try:
        return cluster.network(number)
    except ValueError as error:
        raise HostNotReady(f"{keys.node_allocation(number)}: {error}") from None


async def _cluster(store: Store, keys: Keys) -> Cluster:
    found = await store.get(keys.cluster)
    if found is None:
        raise NotFound(f"{keys.cluster}: no cluster here; run `mesh cluster init` first")
    return schema.decode(found.key, found.value, Cluster)


async def _number(store: Store, prefix: str, node: str) -> int | None:
    numbers = []
    for item in (await store.list(prefix)).items:
        try:
            owner = schema.decode(item.key, item.value, NodeAllocation)
            if owner.node == node:
                numbers.append(schema.parse_index(item.key))
        except InvalidRecord as error:
            _log.warning("skipped: %s", error)
    return min(numbers, default=None)


def _check(options: RunOptions) -> None:
    try:
        check_name(options.service, "service")
        check_name(options.id, "task")
    except ValueError as error:
        raise BadUsage(str(error)) from None
    if not 0 <= options.weight <= 255:
        raise BadUsage(f"--weight {options.weight} is not in 0-255")
    if not options.command:
        raise BadUsage("no command: write it after --")


def _check_rights() -> None:
    """Reads the effective capabilities of this process (proc(5), /proc/pid/status)."""
    status = Path("/proc/self/status").read_text()
    (effective,) = (
        int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")
    )
    missing = [name for name, bit in _NEEDED_RIGHTS.items() if not effective >> bit & 1]
    if missing:
        raise HostNotReady(f"starting a container needs {' and '.join(missing)}: run as root")


def _environment(task: Task) -> dict[str, str]:
    """What a command learns about itself."""
    own = {f"MESH_ADDRESS{f.suffix}": one for f, one in zip(FAMILIES, task.addresses, strict=True)}
    return {"MESH_TASK": task.id, "MESH_SERVICE": task.service, "MESH_NODE": task.node, **own}


@contextmanager
def _addresses(config: AgentConfig, network: NodeNetwork, task: str) -> Iterator[tuple[str, ...]]:
    directory = Path(config.state_dir) / "addresses"
    owner = addresses.this_process(task)
    held = addresses.claim(directory, network, owner)
    try:
        yield held
    finally:
        addresses.release(directory, held, owner)


@contextmanager
def _stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    wanted = (signal.SIGTERM, signal.SIGINT)
    for one in wanted:
        loop.add_signal_handler(one, stop.set)
    try:
        yield stop
    finally:
        for one in wanted:
            loop.remove_signal_handler(one)


async def _supervise(plan: _Plan, stop: asyncio.Event) -> int:
    loop = asyncio.get_running_loop()
    pause = 0.0
    while True:
        began = loop.time()
        code = await _live(plan, stop)
        if stop.is_set() or not plan.restart:
            return code
        pause = next_pause(pause, loop.time() - began)
        task = plan.registration.task
        _log.warning("task %s ended with code %d, restart in %g s", task.id, code, pause)
        try:
            await asyncio.wait_for(stop.wait(), pause)
        except TimeoutError:
            continue
        return code


async def _live(plan: _Plan, stop: asyncio.Event) -> int:
    """One life of the command, from its namespaces to its exit code; registered in between."""
    process = await Process.prepare(plan.command, plan.environment)
    try:
        await asyncio.to_thread(veth.connect, plan.pair, process.netns)
        await process.begin()
        plan.registration.lives_in(process.netns)
        await _registered(plan.registration, process, stop)
        if stop.is_set():
            await plan.registration.settled()
        return await process.stop(GRACE_SECONDS)
    finally:
        await process.stop(0)
        await asyncio.to_thread(veth.remove, plan.pair.outer)


async def _registered(record: Registration, process: Process, stop: asyncio.Event) -> None:
    """Keep the task registered until the command ends or is to be stopped; then it is not.

    It is registered once it listens: what is not answered by anybody yet would be refused.
    """
    waits = {
        asyncio.create_task(process.wait()),
        asyncio.create_task(stop.wait()),
        asyncio.create_task(_hold(record, process)),
    }
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
    for wait in waits:
        if not wait.cancelled():
            wait.result()


async def _hold(record: Registration, process: Process) -> None:
    await listening.until_listening(process.pid, await record.targets())
    await record.hold()

"""Starting a lab from outside, and what is done to it from there.

Owns the pipe that ends the lab when this process ends, unless `release` lets it go.  Never
enters the lab's namespaces.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from mesh import errors
from mesh.lab import control, environment, readiness, tools, topology, wire
from mesh.model.names import check_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from mesh.lab.ancestry import Watched
    from mesh.lab.wire import LabStatus
    from mesh.store.protocol import Store

BUILD_SECONDS: Final = 30.0
"""A lab is built in a second; a crowded machine may need many."""

READY_SECONDS: Final = 60.0
"""Three nodes are ready in some seconds; fifty on two cores take most of a minute."""

SETTLE_SECONDS: Final = 10.0
"""How long a new replica may take until every living node sends connections to it."""

_IN_ORDER: Final = 5
"""So few nodes start one after the other, for the sake of their numbers."""

_DESCRIPTORS: Final = ("control", "relay", "lifeline")


class Completed(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    stdout: str
    stderr: str


class Lab:
    """A running lab.  `name` is what every `mesh lab` verb calls it."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def status(self) -> LabStatus:
        """The lab as it is now.  Raises NotFound when it has ended."""
        return await control.status(self.name)

    async def run_task(
        self, service: str, node: str, command: Sequence[str], id: str | None
    ) -> wire.TaskStatus:
        """Start a replica; returns when it is registered and every living node uses it.

        It gets this process's environment and directory.  Raises NotFound (node), Conflict (id),
        MeshError with the end of its log if it ends.
        """
        lab = await self.status()
        request = wire.Task(
            node=node, service=service, id=id, command=tuple(command),
            environment=dict(os.environ), directory=str(Path.cwd()),
        )  # fmt: skip
        async with open_store(lab.etcd) as store:
            task = msgspec.convert(await control.call(self.name, request), wire.TaskStatus)
            await self._used(store, await self._registered(store, task))
        return task

    async def _registered(self, store: Store, task: wire.TaskStatus) -> int:
        """The revision of the task's record, once it is there."""
        key = readiness.KEYS.task(task.service, task.id)
        revision = 0

        async def written() -> bool:
            nonlocal revision
            if (found := await store.get(key)) is not None:
                revision = found.mod_revision
            elif task not in (await self.status()).tasks:
                raise errors.MeshError(f"task {task.id} ended: {await self._last_words(task.id)}")
            return bool(revision)

        await readiness.until(written, READY_SECONDS, lambda: f"no record {key}")
        return revision

    async def _used(self, store: Store, revision: int) -> None:
        """Wait for the living nodes; one that hangs is no reason to fail."""

        async def known() -> bool:
            return not (await readiness.read(store)).behind(revision)

        try:
            await readiness.until(known, SETTLE_SECONDS, lambda: "")
        except errors.MeshError:
            return

    async def run(self, machine: str, command: Sequence[str]) -> Completed:
        """Run a command on a machine to its end.  Raises NotFound, or Conflict if it is off."""
        pid = await control.call(self.name, wire.Where(machine=machine))
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mesh.lab.inside", str(pid), *command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment.with_this_package(os.environ),
        )
        try:
            stdout, stderr = await child.communicate()
        except asyncio.CancelledError:
            child.kill()
            await child.wait()
            raise
        return Completed(await child.wait(), stdout.decode(), stderr.decode())

    async def power_on(self, node: str) -> None:
        """Start a node, or its agent, and wait until its agent has brought the kernel in line."""
        lab = await self.status()
        async with open_store(lab.etcd) as store:
            before = (await readiness.read(store)).reported.get(node, 0)
            await control.call(self.name, wire.Start(target=node))

            async def reported() -> bool:
                await self._check_agents([node])
                return (await readiness.read(store)).reported.get(node, 0) > before

            await readiness.until(
                reported, READY_SECONDS, lambda: f"the agent of {node} has reported nothing"
            )

    async def form(self) -> None:
        """Write the cluster's settings, start every node's agent, wait until all are ready.

        Raises MeshError with what is lacking, or the end of the log of an agent that ended.
        """
        lab = await self.status()
        nodes = [node.name for node in lab.nodes]
        async with open_store(lab.etcd) as store:
            await readiness.initialise(store, BUILD_SECONDS)
            for node in nodes:
                await control.call(self.name, wire.Start(target=node))
                if len(nodes) <= _IN_ORDER:
                    await self._known(store, node)
            lacking: dict[str, str] = {}

            async def ready() -> bool:
                nonlocal lacking
                await self._check_agents(nodes)
                progress = await readiness.read(store)
                lacking = progress.lacking(nodes)
                if not lacking:
                    learn = wire.Learn(networks=progress.addresses())
                    await control.call(self.name, learn)
                return not lacking

            await readiness.until(
                ready, READY_SECONDS, lambda: "; ".join(f"{n}: {w}" for n, w in lacking.items())
            )

    async def _known(self, store: Store, node: str) -> None:
        """Wait until a node has registered: numbers are given in that order, so n1 gets 1."""

        async def registered() -> bool:
            await self._check_agents([node])
            return await store.get(readiness.KEYS.node(node)) is not None

        await readiness.until(registered, READY_SECONDS, lambda: f"{node} has not registered")

    async def _check_agents(self, nodes: Sequence[str]) -> None:
        for node in (await self.status()).nodes:
            if node.name in nodes and node.agent_pid is None:
                last = await self._last_words(node.name)
                raise errors.MeshError(f"the agent of {node.name} ended: {last}")

    async def _last_words(self, name: str) -> str:
        return environment.last_line(await control.call(self.name, wire.Logs(name=name)))


class OwnLab(Lab):
    """A lab that this process started; it ends when this process does, or with `end`."""

    def __init__(self, name: str, guard: subprocess.Popen[bytes], lifeline: int, log: int) -> None:
        super().__init__(name)
        self._guard = guard
        self._lifeline = lifeline
        self._log = log

    def release(self) -> None:
        """Let the lab live on without this process."""
        os.write(self._lifeline, b".")
        self._close()

    async def end(self) -> None:
        """End the lab; returns when the last of its processes is gone."""
        self._close()
        await control.gone(self._guard.pid, control.END_SECONDS)
        self._guard.wait()

    async def ended(self) -> None:
        """Return when the lab has ended for whatever reason."""
        await control.gone(self._guard.pid)

    async def built(self) -> None:
        """Wait until the machines stand and etcd runs.  Raises MeshError with the reason if not."""
        try:
            async with asyncio.timeout(BUILD_SECONDS):
                while True:
                    if await self._answers():
                        return
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise errors.MeshError(
                f"lab {self.name} is not built after {BUILD_SECONDS:g} s: {self._last_line()}"
            ) from None

    async def _answers(self) -> bool:
        try:
            await self.status()
        except errors.NotFound:
            if self._guard.poll() is None:
                return False  # the guard does not listen yet
            raise self._failure() from None
        except errors.MeshError:
            raise self._failure() from None
        return True

    def _failure(self) -> errors.MeshError:
        return errors.HostNotReady(f"lab {self.name} cannot be built: {self._last_line()}")

    def _last_line(self) -> str:
        return environment.last_line(os.pread(self._log, wire.LOG_TAIL, 0).decode(errors="replace"))

    def _close(self) -> None:
        for descriptor in (self._lifeline, self._log):
            os.close(descriptor)


@asynccontextmanager
async def lab(name: str, nodes: int, backend: str = "auto") -> AsyncIterator[OwnLab]:
    """A lab for the time of a block: ready when it begins, gone when it has ended.

    Raises HostNotReady (tools, rights), Conflict (name), MeshError (not ready in time).
    """
    own = launch(name, nodes, (), backend)
    try:
        await own.built()
        await own.form()
        yield own
    finally:
        await own.end()


def launch(name: str, nodes: int, watched: Sequence[Watched], backend: str = "auto") -> OwnLab:
    """Start building a lab, which ends with this process, or when a `watched` one is killed.

    Raises BadUsage, HostNotReady (tools missing) or Conflict (the name is taken).
    """
    try:
        check_name(name, "lab")
    except ValueError as error:
        raise errors.BadUsage(f"--name: {error}") from None
    if nodes not in topology.NODE_COUNTS:
        raise errors.BadUsage(f"--nodes {nodes} is not in 1-{topology.NODE_COUNTS[-1]}")
    tools.check()
    ours_to_hold = os.memfd_create("mesh-lab")
    with control.claim(name) as door, socket.socket() as relay:
        relay.bind(("127.0.0.1", 0))
        relay.listen()
        theirs, ours = os.pipe()
        plan = wire.Plan(
            name=name, nodes=nodes, watched=tuple(watched), control=door.fileno(),
            relay=relay.fileno(), lifeline=theirs, backend=backend,
        )  # fmt: skip
        guard = _start_guard(plan, ours_to_hold)
        os.close(theirs)
    return OwnLab(name, guard, ours, ours_to_hold)


def _start_guard(plan: wire.Plan, log: int) -> subprocess.Popen[bytes]:
    inherited = (getattr(plan, name) for name in _DESCRIPTORS)
    return subprocess.Popen(
        (sys.executable, "-m", "mesh.lab.guard", msgspec.json.encode(plan).decode()),
        pass_fds=(*inherited, *(one.descriptor for one in plan.watched)),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd="/",
        env=environment.with_this_package(os.environ),
        start_new_session=True,
    )


async def kill(name: str, target: str, *, agent_only: bool) -> None:
    """Power a node off, or kill its agent, a task or etcd.  Raises NotFound."""
    nodes = {node.name for node in (await control.status(name)).nodes}
    if target in nodes and not agent_only:
        await control.call(name, wire.PowerOff(node=target))
    else:
        await control.call(name, wire.Signal(target=target, number=signal.SIGKILL))


@asynccontextmanager
async def open_store(url: str) -> AsyncIterator[Store]:
    """The lab's etcd, as seen from the host."""
    from mesh.store.etcd import EtcdStore
    from mesh.store.etcd_channel import EtcdOptions

    store = EtcdStore(EtcdOptions(endpoints=(url,)))
    try:
        yield store
    finally:
        await store.close()

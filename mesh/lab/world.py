"""What runs in the lab, and what may be done to it: the answer to every request.

Lives in the lab's first process.  Never decides that something should run: requests do.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, assert_never

from mesh import errors
from mesh.agent import config
from mesh.lab import environment, machines, process, topology, wire
from mesh.lab.topology import Kind
from mesh.model.names import check_name
from mesh.model.node import Role

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.lab.machines import Host
    from mesh.lab.process import Started
    from mesh.lab.topology import Machine

_KILL_SECONDS: Final = 10.0

_RESERVED: Final = ("etcd", "lab", topology.SWITCH)


@dataclass(slots=True)
class Process:
    """Something started: its numbers, and whether it has ended."""

    started: Started
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return not self.ended.is_set()

    def signal(self, number: int) -> None:
        """Send it a signal; one that ended just now is not an error."""
        if self.runs:
            os.kill(self.started.pid, number)

    async def kill(self) -> None:
        """Kill it, and wait until it is buried."""
        self.signal(signal.SIGKILL)
        await asyncio.wait_for(self.ended.wait(), _KILL_SECONDS)


@dataclass(frozen=True, slots=True)
class Replica:
    """A task started here."""

    service: str
    id: str
    node: str
    process: Process

    def status(self) -> wire.TaskStatus:
        """As the lab tells it."""
        return wire.TaskStatus(
            service=self.service, id=self.id, node=self.node, pid=self.process.started.host_pid
        )


class World:
    """Machines and processes by name.  `etcd` is the address of etcd on the host."""

    def __init__(self, name: str, etcd: str, guard: int, host: Host) -> None:
        self._name = name
        self._etcd_url = etcd
        self._guard = guard
        self._host = host
        self._machines: dict[str, Machine] = {}
        self._holders: dict[str, Process] = {}
        self._agents: dict[str, Process] = {}
        self._tasks: dict[str, Replica] = {}
        self._networks: dict[str, wire.Network] = {}
        self._etcd: Process | None = None

    def build(self, planned: tuple[Machine, ...], backend: str) -> None:
        """Make every machine and its link.  Raises CommandFailed or OSError."""
        for machine in planned:
            self._machines[machine.name] = machine
            self._power_on(machine)
        for machine in planned:
            machines.connect(machine, self._pids())
            if machine.kind is Kind.NODE:
                self._write_config(machine, backend)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hear of every process that ends: the first process of a lab inherits all orphans."""
        loop.add_signal_handler(signal.SIGCHLD, self._bury)

    def start_etcd(self) -> None:
        """Start etcd on what it had stored before."""
        url = f"http://[::]:{topology.ETCD_PORT}"
        argv = (
            "etcd", "--name", "lab", "--data-dir", str(environment.HOME / "etcd"),
            "--listen-client-urls", url,
            "--advertise-client-urls", f"http://{topology.ETCD}:{topology.ETCD_PORT}",
            "--listen-peer-urls", "http://127.0.0.1:2380",
            "--initial-advertise-peer-urls", "http://127.0.0.1:2380",
            "--initial-cluster", "lab=http://127.0.0.1:2380",
        )  # fmt: skip
        output = self._log("etcd")
        try:
            program = process.Program(argv, environment.inside(os.environ), output)
            started = process.start(program, self._host.proc, process.nothing, process.nothing)
        finally:
            os.close(output)
        self._etcd = Process(started)

    def etcd_runs(self) -> bool:
        """Whether etcd has not ended."""
        return self._etcd is not None and self._etcd.runs

    async def handle(self, request: wire.AnyRequest) -> Any:
        """Do what is asked and return what there is to tell.  Raises MeshError or OSError."""
        match request:
            case wire.Status():
                return self.status()
            case wire.Learn(networks=networks):
                self._networks |= networks
            case wire.Where(machine=name):
                return self._where(name)
            case wire.Task():
                return self._start_task(request)
            case wire.Start(target=target):
                self._start(target)
            case wire.Signal(target=target, number=number):
                await self._signal(target, number)
            case wire.PowerOff(node=node):
                await self._power_off(self._node(node))
            case wire.Logs(name=name):
                return self.tail(name)
            case wire.Down():
                return self._guard
            case _:
                assert_never(request)
        return None

    def status(self) -> wire.LabStatus:
        """The lab as it is now."""
        return wire.LabStatus(
            name=self._name,
            etcd=self._etcd_url,
            nodes=tuple(self._node_status(m) for m in self._of_kind(Kind.NODE)),
            clients=tuple(self._client_status(m) for m in self._of_kind(Kind.CLIENT)),
            tasks=tuple(t.status() for t in self._tasks.values() if t.process.runs),
            guard=self._guard,
        )

    def tail(self, name: str) -> str:
        """The end of a log.  Raises NotFound."""
        path = self._log_path(name)
        if not path.exists():
            raise errors.NotFound(f"lab {self._name} has no log {name!r}")
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - wire.LOG_TAIL))
            return log.read().decode(errors="replace")

    def _of_kind(self, kind: Kind) -> list[Machine]:
        return [machine for machine in self._machines.values() if machine.kind is kind]

    def _pids(self) -> dict[str, int]:
        return {name: holder.started.pid for name, holder in self._holders.items()}

    def _node(self, name: str) -> Machine:
        machine = self._machines.get(name)
        if machine is None or machine.kind is not Kind.NODE:
            known = ", ".join(m.name for m in self._of_kind(Kind.NODE))
            raise errors.NotFound(f"lab {self._name} has no node {name!r}, only {known}")
        return machine

    def _where(self, name: str) -> int:
        if name == topology.SWITCH:
            return self._host.own_pid
        holder = self._holders.get(name)
        if holder is None:
            known = ", ".join((*self._machines, topology.SWITCH))
            raise errors.NotFound(f"lab {self._name} has no machine {name!r}, only {known}")
        if not holder.runs:
            raise errors.Conflict(f"{name} is off: power it on with `mesh lab start {name}`")
        return holder.started.host_pid

    def _node_status(self, machine: Machine) -> wire.NodeStatus:
        holder = self._holders[machine.name]
        agent = self._agents.get(machine.name)
        network = self._networks.get(machine.name)
        pid = holder.started.host_pid if holder.runs else None
        overlay = network.overlay if network else (None, None)
        subnets = network.subnets if network else (None, None)
        disk = environment.HOME / machine.name
        return wire.NodeStatus(
            name=machine.name,
            netns=machines.netns_path(pid) if pid else None,
            underlay4=machine.addresses[0],
            underlay6=machine.addresses[1],
            overlay4=overlay[0],
            overlay6=overlay[1],
            subnet4=subnets[0],
            subnet6=subnets[1],
            agent_pid=agent.started.host_pid if agent and agent.runs else None,
            config=f"/proc/{self._host.own_pid}/root{disk / environment.CONFIG.name}",
            pid=pid,
        )

    def _client_status(self, machine: Machine) -> wire.ClientStatus:
        pid = self._holders[machine.name].started.host_pid
        return wire.ClientStatus(
            name=machine.name,
            netns=machines.netns_path(pid),
            address4=machine.addresses[0],
            address6=machine.addresses[1],
            pid=pid,
        )

    def _write_config(self, machine: Machine, backend: str) -> None:
        first = machine.number - topology.FIRST_NODE
        settings = config.AgentConfig(
            node=machine.name,
            role=Role.MANAGER if first < topology.MANAGERS else Role.WORKER,
            etcd=config.EtcdConfig(endpoints=(f"http://{topology.ETCD}:{topology.ETCD_PORT}",)),
            state_dir=str(environment.HOME / "state"),
            endpoints=machine.addresses,
            backend=backend,
            exec_checks=True,
        )
        (environment.HOME / machine.name / environment.CONFIG.name).write_text(
            config.dump(settings)
        )

    def _power_on(self, machine: Machine) -> None:
        self._holders[machine.name] = Process(machines.power_on(machine, self._host, 2))

    async def _power_off(self, machine: Machine) -> None:
        await self._holders[machine.name].kill()
        machines.disconnect(machine)

    def _start(self, target: str) -> None:
        if target == "etcd":
            if not self.etcd_runs():
                self.start_etcd()
            return
        machine = self._node(target)
        if not self._holders[target].runs:
            self._power_on(machine)
            machines.connect(machine, self._pids())
        agent = self._agents.get(target)
        if agent is None or not agent.runs:
            argv = _mesh("agent", "--config", str(environment.CONFIG))
            self._agents[target] = self._run(target, argv, target, (os.environ, "/"))

    def _start_task(self, request: wire.Task) -> wire.TaskStatus:
        self._node(request.node)
        self._where(request.node)
        name = self._task_name(request)
        options = ("--config", str(environment.CONFIG), "--id", name, "--")
        argv = _mesh("task", "run", request.service, *options, *request.command)
        started = self._run(request.node, argv, name, (request.environment, request.directory))
        replica = Replica(request.service, name, request.node, started)
        self._tasks[name] = replica
        return replica.status()

    def _task_name(self, request: wire.Task) -> str:
        if request.id is None:
            numbered = (f"{request.service}-{i}" for i in itertools.count(1))
            return next(name for name in numbered if name not in self._tasks)
        try:
            check_name(request.id, "task")
        except ValueError as error:
            raise errors.BadUsage(f"--id: {error}") from None
        if request.id in (*self._machines, *_RESERVED):
            raise errors.BadUsage(f"--id {request.id}: a machine or log of the lab has this name")
        running = self._tasks.get(request.id)
        if running is not None and running.process.runs:
            raise errors.Conflict(f"task {request.id} runs already: choose another --id")
        return request.id

    def _run(
        self, node: str, argv: tuple[str, ...], log: str, origin: tuple[Mapping[str, str], str]
    ) -> Process:
        """Start a program on a node; `origin` is the environment and directory it comes from."""
        given, directory = origin
        output = self._log(log)
        try:
            program = process.Program(argv, environment.inside(given), output, directory)
            return Process(machines.run_on(self._pids()[node], self._host, program))
        finally:
            os.close(output)

    async def _signal(self, target: str, number: int) -> None:
        found = self._process(target)
        if number == signal.SIGKILL:
            await found.kill()
        else:
            found.signal(number)

    def _process(self, target: str) -> Process:
        if target == "etcd" and self._etcd is not None:
            return self._etcd
        if target in self._agents:
            return self._agents[target]
        if target in self._tasks:
            return self._tasks[target].process
        raise errors.NotFound(f"lab {self._name} has no node or task {target!r}")

    def _log_path(self, name: str) -> Path:
        if name == "lab":
            return Path("/proc/self/fd/2")
        return environment.HOME / "logs" / name

    def _log(self, name: str) -> int:
        path = self._log_path(name)
        path.parent.mkdir(exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _bury(self) -> None:
        known = {
            one.started.pid: one
            for one in (
                *self._holders.values(),
                *self._agents.values(),
                *(task.process for task in self._tasks.values()),
                *((self._etcd,) if self._etcd else ()),
            )
            if one.runs
        }
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid in known:
                known[pid].ended.set()


def _mesh(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "mesh", *arguments)

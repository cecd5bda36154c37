"""A whole mesh in a lab of one's own, as automation and clients see it.

Services and tasks are written through etcd's JSON gateway, with no code of the mesh in between;
requests are sent by sockets of this process that were born in the lab's namespaces.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from mesh.agent import config
from mesh.lab import client, control, readiness, wire
from mesh.model.cluster import Cluster as Mesh
from mesh.model.publish import Protocol
from mesh.rules.program import Devices, Parameters
from mesh.store import schema
from tests.support import gateway, lagging, readback
from tests.support.layouts import marks_of
from tests.support.patience import PATIENT
from tests.support.requests import SPOKEN, Answer, Ask, ask, replicas

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

    from mesh.lab.wire import LabStatus, NodeStatus
    from mesh.rules.marks import Layout

LIMIT: Final = 60.0
"""Seconds anything may take on a crowded machine before a test fails."""

_PATIENCE: Final = 5.0
"""Seconds until one of many tries is given up."""

_SYSCTLS: Final = (
    "ipv4.icmp_ratelimit=0",
    "ipv6.icmp.ratelimit=0",
    "netfilter.nf_conntrack_udp_timeout=120",
)
"""Every refused datagram is answered, not one a second; flows outlive what slow machines need."""

REPLICA: Final = (sys.executable, "-m", "mesh.lab.replica", "--udp")

PORT: Final = 80
"""Where every replica answers, on TCP and UDP."""


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str = "") -> None:
    """Wait until a condition holds; `what` explains a failure."""
    try:
        async with asyncio.timeout(LIMIT):
            while True:
                held = condition()
                if await held if inspect.isawaitable(held) else held:
                    return
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within {LIMIT:g} s: {what or condition}") from None


async def until_served(asks: Sequence[Ask], by: set[str]) -> None:
    """Wait until requests are answered by these replicas, by all of them and by no others.

    A request may come from the port of an earlier one, whose UDP flow is not forgotten yet.
    """
    told: set[str] = set()

    async def served() -> bool:
        nonlocal told
        told = await replicas(asks, _PATIENCE)
        return told == by

    try:
        await until(served)
    except AssertionError:
        raise AssertionError(f"served by {told}, not by {by}") from None


@dataclass(frozen=True, slots=True)
class Container:
    """A running replica; `addresses` are IPv4 and IPv6, `netns` its network namespace."""

    id: str
    node: str
    addresses: tuple[str, str]
    netns: str


@dataclass
class Cluster:
    """A running lab."""

    lab: client.OwnLab
    records: gateway.Records
    status: LabStatus
    containers: dict[str, Container] = field(default_factory=dict)
    revision: int = 0

    @property
    def nodes(self) -> tuple[NodeStatus, ...]:
        return self.status.nodes

    def node(self, name: str) -> NodeStatus:
        return self.status.node(name)

    def netns(self, machine: str) -> str:
        """Where a machine's or a container's sockets are made."""
        if machine in self.containers:
            return self.containers[machine].netns
        machines = {one.name: one.netns for one in self.nodes}
        machines |= {one.name: one.netns for one in self.status.clients}
        found = machines[machine]
        assert found is not None, f"{machine} is off"
        return found

    def addresses(self, machine: str) -> tuple[str, str]:
        """A client's or a node's underlay addresses, IPv4 and IPv6."""
        for one in self.status.clients:
            if one.name == machine:
                return one.address4, one.address6
        return self.node(machine).underlay4, self.node(machine).underlay6

    def asks(self, clients: Iterable[str], addresses: Iterable[str], port: int) -> list[Ask]:
        """A request of each client to each address, on TCP and UDP."""
        each = list(addresses)
        return [
            Ask(self.netns(client), address, port, protocol)
            for client in clients
            for address in each
            for protocol in SPOKEN
        ]

    def from_outside(self, port: int, *nodes: str) -> list[Ask]:
        """Requests of both clients to a published port, through these nodes, or all."""
        names = nodes or tuple(node.name for node in self.nodes)
        return self.asks(("c1", "c2"), (a for n in names for a in self.addresses(n)), port)

    def elements(self, node: str, *kinds: str) -> dict[str, str]:
        """The elements of the mesh's sets and maps in a node's kernel, by the set's name.

        Whatever the backend; none while they are damaged.
        """
        backend = self.records.get(f"applied/{node}")["backend"]
        found = readback.read(self.netns(node), backend, self.parameters(node))
        return readback.told(found, *kinds)

    def parameters(self, node: str) -> Parameters:
        """What a node's program is made from."""
        settings = schema.decode("cluster", json.dumps(self.records.get("cluster")).encode(), Mesh)
        held = self.records.under("allocations/nodes/").items()
        (number,) = (int(key) for key, record in held if record["node"] == node)
        mac = settings.network(number).bridge_mac
        return Parameters.of(settings, number, Devices("warren0", "warren-x0", "warren-br0", mac))

    async def refresh(self) -> None:
        """Ask the lab again: processes and namespaces change when something is started anew."""
        self.status = await self.lab.status()

    # ---- what is written

    def service(self, name: str, *ports: Mapping[str, object], **fields: object) -> None:
        """Write a service."""
        self.revision = self.records.put(
            f"services/{name}", {"name": name, "ports": ports, **fields}
        )

    def task(self, service: str, container: str, **fields: object) -> None:
        """Register a container, or what was one, as a replica of a service."""
        one = self.containers[container]
        record = {"service": service, "id": one.id, "node": one.node, "addresses": one.addresses}
        self.revision = self.records.put(f"tasks/{service}/{one.id}", {**record, **fields})

    def untask(self, service: str, container: str) -> None:
        """Take a replica out of a service."""
        self.revision = self.records.delete(f"tasks/{service}/{container}")

    def remove(self, service: str) -> None:
        """Remove a service and its tasks."""
        self.records.delete_below(f"tasks/{service}/")
        self.revision = self.records.delete(f"services/{service}")

    # ---- what is reported

    def vips(self, service: str) -> tuple[str, ...]:
        """The addresses a service was given, or none yet."""
        for record in self.records.under("allocations/vips/").values():
            if record.get("service") == service:
                return tuple(record["addresses"])
        return ()

    def problems(self, node: str) -> str:
        """What a node reports to be wrong, as one text."""
        return json.dumps((self.records.get(f"applied/{node}") or {}).get("problems", []))

    def answers(self) -> bool:
        """Whether etcd does."""
        try:
            return self.records.get("cluster") is not None
        except OSError:
            return False

    async def settled(self, *nodes: str) -> None:
        """Wait until the nodes have in their kernels what was written last, and its allocations."""
        names = nodes or tuple(node.name for node in self.nodes)

        def behind() -> list[str]:
            applied = self.records.under("applied/")
            return [n for n in names if applied.get(n, {}).get("revision", 0) < self.revision]

        try:
            await until(lambda: not behind())
        except AssertionError:
            why = await lagging.told(self.lab.name, self.records, behind(), self.revision)
            raise AssertionError(why) from None

    async def allocated(self, *services: str) -> None:
        """Wait until services have their VIPs and ingress ports, and all nodes know."""
        await until(lambda: all(map(self.is_allocated, services)), f"allocations of {services}")
        self.revision = max(self._written("allocations/"), self.revision)
        await self.settled()

    def is_allocated(self, service: str) -> bool:
        """Whether a service has its VIP, if it wants one, and its ingress ports."""
        spec = self.records.get(f"services/{service}")
        wanted = {
            f"{p.get('protocol', 'tcp')}/{p['published']}"
            for p in spec["ports"]
            if p.get("mode") == "ingress" and p.get("published")
        }
        held = self.records.under("allocations/ports/")
        mine = {key for key, record in held.items() if record.get("service") == service}
        return (spec.get("vip") == "none" or bool(self.vips(service))) and wanted <= mine

    def _written(self, prefix: str) -> int:
        """The newest revision below a prefix."""
        body = {
            "key": gateway.full(prefix),
            "range_end": gateway.encoded(gateway.end_of(prefix)),
            "keys_only": True,
        }
        found = self.records.call("kv/range", body)
        return max((int(item["mod_revision"]) for item in found.get("kvs", ())), default=0)

    # ---- what is done

    async def start(self, *placed: tuple[str, str]) -> None:
        """Start replicas, given as (id, node), of no service that exists."""
        await asyncio.gather(*(self._start(id, node) for id, node in placed))

    async def _start(self, id: str, node: str, service: str = "idle") -> None:
        task = await self.lab.run_task(service, node, REPLICA, id)
        netns = f"/proc/{_child(task.pid)}/ns/net"
        addresses = self.records.get(f"tasks/{service}/{id}")["addresses"]
        listens = Ask(netns, "127.0.0.1", PORT, Protocol.TCP)

        async def ready() -> bool:
            return isinstance(await ask(listens), Answer)

        await until(ready, f"replica {id} listens")
        self.containers[id] = Container(id, node, tuple(addresses), netns)

    async def start_for(self, service: str, id: str, node: str) -> None:
        """Start a replica of a service; it is used before it listens."""
        await self._start(id, node, service)

    async def signal(self, target: str, number: int) -> None:
        """Signal a node's agent, a task or etcd; SIGKILL waits for its end."""
        await control.call(self.lab.name, wire.Signal(target=target, number=number))

    async def kill(self, target: str) -> None:
        """Kill a node's agent, a task or etcd."""
        await self.signal(target, signal.SIGKILL)

    async def start_again(self, target: str) -> None:
        """Start a killed agent, a node that is off, or etcd."""
        if target == "etcd":
            await control.call(self.lab.name, wire.Start(target=target))
        else:
            await self.lab.power_on(target)
        await self.refresh()

    async def power_off(self, node: str) -> None:
        await control.call(self.lab.name, wire.PowerOff(node=node))

    def sh(self, machine: str, *argv: str, input: str | None = None) -> str:
        """Run a program with a machine's network and files; what it printed."""
        net = self.netns(machine)
        done = subprocess.run(
            ("nsenter", f"--net={net}", f"--mount={net.removesuffix('net')}mnt", "--", *argv),
            input=input, capture_output=True, text=True, check=False, timeout=LIMIT,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr or done.stdout}"
        return done.stdout

    def configure(self, node: str, **changed: object) -> None:
        """Change a node's configuration; its next agent reads it."""
        path = Path(self.node(node).config)
        settings = replace(config.load(path), **changed)
        path.write_text(config.dump(settings))

    def agent_runs(self, node: str) -> bool:
        """Whether the agent that `status` knows of is still there."""
        pid = self.node(node).agent_pid
        return pid is not None and Path(f"/proc/{pid}").exists()


@contextmanager
def cluster(
    name: str,
    nodes: int,
    *containers: tuple[str, str],
    backend: str = "auto",
    layouts: Mapping[str, Layout] | None = None,
    settings: Mapping[str, object] | None = None,
    reach: config.ReachConfig = PATIENT,
) -> Iterator[Cluster]:
    """A lab of one's own with replicas, given as (id, node); gone after the block.

    `layouts` are what some nodes keep in marks, `settings` what the cluster's record says, and
    `reach` is how all nodes probe the others.
    """
    own = client.launch(name, nodes, (), backend)
    try:
        yield asyncio.run(_formed(own, containers, layouts or {}, settings or {}, reach))
    finally:
        asyncio.run(own.end())


async def _formed(
    own: client.OwnLab,
    containers: Sequence[tuple[str, str]],
    layouts: Mapping[str, Layout],
    settings: Mapping[str, object],
    reach: config.ReachConfig,
) -> Cluster:
    await own.built()
    status = await own.status()
    made = Cluster(own, gateway.Records(status.etcd), status)
    for node in made.nodes:
        made.configure(node.name, reach=reach)
    for name, layout in layouts.items():
        made.configure(name, marks=marks_of(layout))
    async with client.open_store(status.etcd) as store:
        await readiness.initialise(store, LIMIT)
    put(made, "cluster", {**made.records.get("cluster"), **settings})
    await own.form()
    await made.refresh()
    for node in made.nodes:
        made.sh(node.name, "sysctl", "-qwe", *(f"net.{each}" for each in _SYSCTLS))
    await made.start(*containers)
    return made


def _child(pid: int) -> int:
    """The only child of a process."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def ingress(published: int, target: int = PORT) -> list[dict[str, object]]:
    """A port published on every node, for TCP and UDP."""
    return _published("ingress", published, target)


def host(published: int, target: int = PORT) -> list[dict[str, object]]:
    """A port published on the replica's node, for TCP and UDP."""
    return _published("host", published, target)


def _published(mode: str, published: int, target: int) -> list[dict[str, object]]:
    return [
        {"target": target, "published": published, "protocol": p.value, "mode": mode}
        for p in SPOKEN
    ]


def put(mesh: Cluster, key: str, record: object) -> None:
    """Write a record as it is."""
    mesh.revision = mesh.records.put(key, record)


async def withdraw(mesh: Cluster, *keys: str) -> None:
    """Delete keys, and wait until that is in force."""
    for key in keys:
        mesh.revision = mesh.records.delete(key)
    await mesh.settled()

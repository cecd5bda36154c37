"""One node's host ports as its agent keeps them, and what survives the agent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mesh.hostports.ports import HostPorts
from mesh.model.cluster import Cluster
from mesh.model.mapping import Cursors, PortMapping
from mesh.model.publish import PublishedPort
from mesh.model.service import ServiceSpec
from mesh.model.task import Task, TaskState

if TYPE_CHECKING:
    from collections.abc import Iterable

CLUSTER = Cluster(id="c", prefix6="fd00:1::/48", host_ports=(32000, 32003))


def port(target: int = 80, published: int | None = None, **more: Any) -> PublishedPort:
    return PublishedPort(target=target, published=published, **more)


def task(service: str, name: str, state: TaskState = TaskState.RUNNING) -> Task:
    addresses = ("10.0.1.5", "fd00::5")
    return Task(service=service, id=name, node="n1", addresses=addresses, state=state)


class Node:
    """One node's host ports, and what survives its agent."""

    def __init__(self, cluster: Cluster = CLUSTER, *, loopback: bool = False) -> None:
        self.cluster = cluster
        self.loopback = loopback
        self.records: dict[str, tuple[PortMapping, ...]] = {}
        self.cursors = Cursors()
        self.created = 0
        self.services: dict[str, tuple[tuple[PublishedPort, ...], list[tuple[Task, int]]]] = {}
        self.ports = HostPorts("n1", loopback=loopback)
        self.ports.confine(cluster)

    def publish(self, service: str, *ports: PublishedPort, tasks: Iterable[str] = ()) -> None:
        """Write a service, and start tasks of it."""
        _, known = self.services.get(service, ((), []))
        for name in tasks:
            self.created += 1
            known.append((task(service, name), self.created))
        self.services[service] = ports, known
        self.tell(service)

    def end(self, service: str, name: str) -> None:
        ports, known = self.services[service]
        self.services[service] = ports, [each for each in known if each[0].id != name]
        self.tell(service)

    def drain(self, service: str, name: str) -> None:
        ports, known = self.services[service]
        self.services[service] = (
            ports,
            [(task(service, name, TaskState.DRAINING) if t.id == name else t, c) for t, c in known],
        )
        self.tell(service)

    def tell(self, service: str) -> None:
        ports, tasks = self.services[service]
        self.ports.update(service, ServiceSpec(name=service, ports=ports), tasks)

    def settle(self) -> frozenset[str]:
        return self.ports.settle()

    def write(self) -> None:
        """What the agent does once the kernel has it."""
        for name, mappings in self.ports.unwritten().items():
            if mappings:
                self.records[name] = mappings
            else:
                self.records.pop(name, None)
            self.ports.recorded(name, mappings)
        self.cursors = self.ports.cursors

    def restart(self) -> None:
        self.ports = HostPorts("n1", loopback=self.loopback)
        self.ports.confine(self.cluster)
        self.ports.resume(self.cursors)
        for name, mappings in self.records.items():
            self.ports.recorded(name, mappings)
        for service in self.services:
            self.tell(service)

    def numbers(self, service: str) -> dict[tuple[str, int], int]:
        """The published port of each task and target."""
        granted = self.ports.granted(service)
        return {(claim.task, claim.target): claim.published for claim in granted}

    def problems(self) -> list[str]:
        return [f"{problem.about}: {problem.message}" for problem in self.ports.problems()]

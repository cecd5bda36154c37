"""What is said over a lab's socket: requests, replies and the status.  Values only.

One JSON line each way, camelCase.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from mesh import errors
from mesh.lab.ancestry import Watched

LINE_LIMIT: Final = 1 << 20
LOG_TAIL: Final = 64 * 1024


class _Wire(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The shape of everything on the socket."""


class NodeStatus(_Wire, frozen=True):
    """A node; what is None is not known, or off.  `pid` and the paths are the host's."""

    name: str
    netns: str | None
    underlay4: str
    underlay6: str
    overlay4: str | None
    overlay6: str | None
    subnet4: str | None
    subnet6: str | None
    agent_pid: int | None
    config: str
    pid: int | None


class ClientStatus(_Wire, frozen=True):
    """A machine outside the cluster."""

    name: str
    netns: str
    address4: str
    address6: str
    pid: int


class TaskStatus(_Wire, frozen=True):
    """A command started by `mesh lab task` that runs; `pid` is its supervisor's."""

    service: str
    id: str
    node: str
    pid: int


class LabStatus(_Wire, frozen=True):
    """What `mesh lab status --json` prints; `guard` is the process whose end is the lab's."""

    name: str
    etcd: str
    nodes: tuple[NodeStatus, ...]
    clients: tuple[ClientStatus, ...]
    tasks: tuple[TaskStatus, ...]
    guard: int

    def node(self, name: str) -> NodeStatus:
        """One node.  Raises NotFound."""
        for one in self.nodes:
            if one.name == name:
                return one
        raise errors.NotFound(f"lab {self.name} has no node {name!r}: `mesh lab status` lists them")


class Network(_Wire, frozen=True):
    """The addresses a node was given, IPv4 then IPv6."""

    overlay: tuple[str, str]
    subnets: tuple[str, str]


class Plan(_Wire, frozen=True):
    """What a lab is to be, and the descriptors the client made for it.

    `relay` listens on the host for etcd, `control` has the lab's name, `lifeline` says by its end
    that the client is gone, or by a byte that it is done.
    """

    name: str
    nodes: int
    watched: tuple[Watched, ...]
    control: int
    relay: int
    lifeline: int
    backend: str = "auto"


class Request(_Wire, frozen=True, tag_field="verb", tag=str.lower):
    """Any of the following."""


class Status(Request, frozen=True):
    """What is there: answered by a LabStatus."""


class Learn(Request, frozen=True):
    """The addresses that the cluster has given its nodes."""

    networks: dict[str, Network]


class Where(Request, frozen=True):
    """The host's number of a process in the namespaces of a machine: answered by it."""

    machine: str


class Task(Request, frozen=True):
    """Start a replica's command on a node: answered by a TaskStatus; `id` None: a free one."""

    node: str
    service: str
    id: str | None
    command: tuple[str, ...]
    environment: dict[str, str]
    directory: str


class Start(Request, frozen=True):
    """Power a node on if it is off, and start its agent; or start etcd, by that name."""

    target: str


class Signal(Request, frozen=True):
    """Send a signal to a node's agent, a task's supervisor, or etcd; after SIGKILL, wait."""

    target: str
    number: int


class PowerOff(Request, frozen=True):
    """Kill everything on a node at once and pull its cable out."""

    node: str


class Logs(Request, frozen=True):
    """The end of the log of a node's agent, a task, etcd, or of the lab itself, by its name."""

    name: str


class Down(Request, frozen=True):
    """End the lab."""


AnyRequest = Status | Learn | Where | Task | Start | Signal | PowerOff | Logs | Down


class Reply(_Wire, frozen=True):
    """A result, or why there is none with the exit code that says the same."""

    result: Any = None
    error: str | None = None
    code: int = 0

"""A task: one replica of a service, an address on a node."""

from __future__ import annotations

import enum
import re
import sys
from typing import Final

import msgspec
from msgspec import UNSET, UnsetType

from mesh.model.address import check_host
from mesh.model.names import NO_LABELS, check_name

_NETNS: Final = re.compile(
    r"/proc/[1-9][0-9]{0,9}/ns/net|(/var)?/run/(docker/)?netns/[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}"
)
"""Where the kernel, iproute2, CNI's runtimes and Docker keep them: no other file is ever opened."""


class TaskState(enum.Enum):
    """Whether a task may be given new connections."""

    RUNNING = "running"
    DRAINING = "draining"


class Task(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    rename="camel",
    forbid_unknown_fields=True,
    gc=False,  # it cannot be part of a cycle, and there are tens of thousands
):
    """One replica, as an orchestrator writes it.  `weight` 0 means: no new connections.

    `netns` is the path of its network namespace on its node, which a check of type exec needs.
    """

    service: str
    id: str
    node: str
    addresses: tuple[str, ...]
    weight: int = 1
    state: TaskState = TaskState.RUNNING
    labels: dict[str, str] = {}
    netns: str | UnsetType = UNSET

    def __post_init__(self) -> None:
        check_name(self.service, "service")
        check_name(self.id, "task")
        check_name(self.node, "node")
        if not self.addresses:
            raise ValueError("a task needs at least one address")
        for address in self.addresses:
            check_host(address)
        if not 0 <= self.weight <= 255:
            raise ValueError(f"weight {self.weight} is not in 0-255")
        if self.netns is not UNSET and not _NETNS.fullmatch(self.netns):
            raise ValueError(
                f"netns {self.netns!r} is no network namespace: write /proc/PID/ns/net, "
                "/run/netns/NAME or /run/docker/netns/NAME"
            )
        # One text for all tasks of a service or node, not one each.
        msgspec.structs.force_setattr(self, "service", sys.intern(self.service))
        msgspec.structs.force_setattr(self, "node", sys.intern(self.node))
        if not self.labels:
            msgspec.structs.force_setattr(self, "labels", NO_LABELS)

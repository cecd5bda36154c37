"""A task: one replica of a service, an address on a node."""

from __future__ import annotations

import enum
import sys

import msgspec

from mesh.model.address import check_host
from mesh.model.names import NO_LABELS, check_name


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
    """One replica, as an orchestrator writes it.  `weight` 0 means: no new connections."""

    service: str
    id: str
    node: str
    addresses: tuple[str, ...]
    weight: int = 1
    state: TaskState = TaskState.RUNNING
    labels: dict[str, str] = {}

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
        # One text for all tasks of a service or node, not one each.
        msgspec.structs.force_setattr(self, "service", sys.intern(self.service))
        msgspec.structs.force_setattr(self, "node", sys.intern(self.node))
        if not self.labels:
            msgspec.structs.force_setattr(self, "labels", NO_LABELS)

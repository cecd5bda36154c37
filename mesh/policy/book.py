"""The policies that are in force, and which changes of other records matter to them.

Mutable, in the agent's loop only.  Pure otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.policy.plan import plan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.model.policy import NetworkPolicy
    from mesh.model.service import ServiceSpec
    from mesh.model.task import Task
    from mesh.policy.plan import Labelled
    from mesh.rules.guards import Guards


class Policies:
    """Every readable policy of the cluster; most clusters have none, and pay nothing."""

    def __init__(self, node: str) -> None:
        self._node = node
        self.all: dict[str, NetworkPolicy] = {}
        """By name."""

    def put(self, name: str, policy: NetworkPolicy | None) -> None:
        """Take in a policy, or forget it."""
        if policy is None:
            self.all.pop(name, None)
        else:
            self.all[name] = policy

    def concern_task(self, old: Task | None, new: Task | None) -> bool:
        """Whether a change of a task may change what policies come to."""
        if not self.all:
            return False
        if old is None or new is None:
            return True
        return (old.node, old.addresses, old.labels) != (new.node, new.addresses, new.labels)

    def concern_service(self, old: ServiceSpec | None, new: ServiceSpec | None) -> bool:
        """The same of a service, whose labels its tasks inherit."""
        if not self.all:
            return False
        labels = [spec.labels if spec is not None else {} for spec in (old, new)]
        return labels[0] != labels[1]

    def guards(self, tasks: Iterable[Labelled]) -> Guards:
        """What they come to on this node."""
        return plan(self.all.values(), tasks if self.all else (), self._node)

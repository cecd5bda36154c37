"""Which tasks are healthy, as far as this node knows: what it found itself, what others report.

Mutable, in the agent's loop only.  Pure: no clock, no I/O.  A node's report is believed of its own
tasks alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mesh.model.report import Health
    from mesh.model.service import ServiceSpec
    from mesh.model.task import Task

_Tasks = dict[tuple[str, str], "Health"]
"""What is known of a service's tasks, by node and name."""

_NOBODY: frozenset[str] = frozenset()


class Verdicts:
    """Everything that is known of tasks' health, by service."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._reported: dict[str, _Tasks] = {}
        self._found: dict[str, dict[str, Health]] = {}
        self._trusted: dict[str, set[str]] = {}

    def reported(
        self, node: str, task: str, old: Iterable[Health], new: Iterable[Health]
    ) -> frozenset[str]:
        """A node's record of a task of one name changed; which services that touches."""
        services = set()
        for health in old:
            services.add(health.service)
            known = self._reported.get(health.service, {})
            known.pop((node, task), None)
            if not known:
                self._reported.pop(health.service, None)
        for health in new:
            services.add(health.service)
            self._reported.setdefault(health.service, {})[node, task] = health
            if not health.starting:
                self._trusted.get(health.service, set()).discard(task)
        return frozenset(services)

    def found(self, service: str, task: str, health: Health | None) -> None:
        """What this node found of a task of its own; None: it looks at it no longer."""
        if health is not None:
            self._found.setdefault(service, {})[task] = health
            if not health.starting:
                self._trusted.get(service, set()).discard(task)
            return
        known = self._found.get(service, {})
        known.pop(task, None)
        if not known:
            self._found.pop(service, None)

    def of_own(self, service: str, task: Task) -> Health | None:
        """What an agent of this node reported last of a task of this node."""
        return _about(task, self._reported.get(service, {}).get((self._node, task.id)))

    def unreported(self, records: dict[str, tuple[Health, ...]]) -> Iterator[str]:
        """Those of this node's `records`, by task, that are not what etcd holds."""
        for task, wanted in records.items():
            held = (self._reported.get(h.service, {}).get((self._node, task)) for h in wanted)
            if tuple(held) != wanted:
                yield task

    def spec_changed(
        self, service: str, old: ServiceSpec | None, new: ServiceSpec | None, tasks: Iterable[str]
    ) -> None:
        """A service's spec changed.

        Tasks that run when a check is switched on are trusted until their node has an opinion: to
        check a service must not interrupt it.
        """
        if new is None or new.check is None:
            self._trusted.pop(service, None)
        elif old is not None and old.check is None:
            self._trusted[service] = set(tasks)

    def task_gone(self, service: str, task: str) -> None:
        """A task is there no more, nor is trust in one of that name."""
        self._trusted.get(service, set()).discard(task)

    def healthy(self, spec: ServiceSpec, tasks: Iterable[Task]) -> frozenset[str]:
        """The names of those of a service's `tasks` that pass its check; none if it has none."""
        if spec.check is None:
            return _NOBODY
        trusted = self._trusted.get(spec.name, _NOBODY)
        reported = self._reported.get(spec.name, {})
        found = self._found.get(spec.name, {})
        passing = set()
        for task in tasks:
            health = found.get(task.id) if task.node == self._node else None
            if health is None:
                health = reported.get((task.node, task.id))
            health = _about(task, health)
            if task.id in trusted if health is None or health.starting else health.healthy:
                passing.add(task.id)
        return frozenset(passing)


def _about(task: Task, health: Health | None) -> Health | None:
    """What is known, if it is about this very task."""
    return health if health is not None and health.address in task.addresses else None

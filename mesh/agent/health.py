"""Health of this node's tasks: has them probed, acts on it here at once, and tells the others.

Owns `/mesh/health/<node>/<task>`, written when a verdict changes and under the agent's lease.  What
is healthy is decided in mesh.health.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from mesh.engine.desired import Touched
from mesh.health import memory, target
from mesh.health.judge import Pace, Verdict
from mesh.health.prober import Prober
from mesh.model.report import Health
from mesh.model.service import ServiceSpec
from mesh.store import schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mesh.agent.config import AgentConfig
    from mesh.agent.state import State
    from mesh.health.target import Target
    from mesh.model.task import Task
    from mesh.store.lease import LeaseHolder

log = logging.getLogger(__name__)

_MEND_SECONDS: Final = 5.0
"""How often it is looked whether somebody else changed the records."""

_SAVE_SECONDS: Final = 0.1
"""Between two writes of the file at least."""

_NO_COMMANDS: Final = "this node executes nothing from etcd: see exec_checks in its configuration"


class _Key(NamedTuple):
    service: str
    task: str


class HealthChecks:
    """The checks of one node.  `touch` is told of services that may be planned otherwise now."""

    def __init__(self, state: State, config: AgentConfig, touch: Callable[[Touched], None]) -> None:
        self._state = state
        self._node = config.node
        self._directory = Path(config.state_dir)
        self._executes = config.exec_checks
        self._touch = touch
        self._prober = Prober(self._told, random.random)
        self._found: defaultdict[str, dict[str, Health]] = defaultdict(dict)
        self._services: defaultdict[str, set[str]] = defaultdict(set)
        self._untold: set[str] = set()
        self._wake = asyncio.Event()
        self._unsaved = asyncio.Event()

    def found(self) -> Iterator[tuple[str, Health]]:
        """What is held of every task of this node that has a check, with the task's name."""
        for task, each in self._found.items():
            for health in each.values():
                yield task, health

    # ---- what is checked

    async def adopt(self) -> None:
        """Go on from the verdicts of the agent before this one, before anything is planned."""
        saved = await asyncio.to_thread(memory.load, self._directory)
        for service in filter(self._has_check, self._state.services()):
            for task, probed, pace in self._checked(service):
                told = self._state.health.of_own(service, task)
                kept = saved.get((service, task.id))
                if kept is not None and kept.address != probed.address:
                    kept = None
                known = max(filter(None, (told, kept)), key=lambda h: h.since, default=None)
                if known is None or known.starting or not self._may(probed):
                    continue
                verdict = Verdict.HEALTHY if known.healthy else Verdict.UNHEALTHY
                key = _Key(service, task.id)
                # What etcd still holds was found a moment ago.
                self._prober.adopt(key, probed, pace, verdict, settled=told is not None)
                self._hold(key, known)

    def look(self, services: Iterable[str]) -> None:
        """Begin, change and end checks as these services say now."""
        for service in services:
            if service not in self._services and not self._has_check(service):
                continue
            gone = set(self._services.pop(service, ()))
            for task, probed, pace in self._checked(service):
                gone.discard(task.id)
                self._watch(_Key(service, task.id), probed, pace)
            for name in gone:
                self._prober.forget(_Key(service, name))
                self._drop(_Key(service, name))

    def _has_check(self, service: str) -> bool:
        spec = self._state.record(self._state.keys.service(service))
        return isinstance(spec, ServiceSpec) and spec.check is not None

    def _checked(self, service: str) -> Iterator[tuple[Task, Target, Pace]]:
        """Every task of this node with how it is probed."""
        view = self._state.service_view(service)
        if view is None or view.spec.check is None:
            return
        pace = Pace.of(view.spec.check)
        for task in view.tasks:
            if task.node == self._node:
                probed = target.of(view.spec, task)
                if probed is not None:
                    yield task, probed, pace

    def _watch(self, key: _Key, probed: Target, pace: Pace) -> None:
        self._services[key.service].add(key.task)
        known = self._found[key.task].get(key.service)
        if not self._may(probed):
            self._prober.forget(key)
            if known is None or known.reason != _NO_COMMANDS:
                self._decide(key, Verdict.UNHEALTHY, _NO_COMMANDS, probed.address)
            return
        if known is None or known.address != probed.address or key not in self._prober:
            self._decide(key, Verdict.STARTING, "", probed.address)
        self._prober.watch(key, probed, pace)

    def _may(self, probed: Target) -> bool:
        return self._executes or not isinstance(probed, target.Exec)

    # ---- what is found

    def _told(self, key: object, verdict: Verdict, reason: str) -> None:
        assert isinstance(key, _Key)
        self._decide(key, verdict, reason, self._found[key.task][key.service].address)

    def _decide(self, key: _Key, verdict: Verdict, reason: str, address: str) -> None:
        health = Health(
            service=key.service,
            healthy=verdict is Verdict.HEALTHY,
            starting=verdict is Verdict.STARTING,
            address=address,
            reason=reason,
            since=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        )
        before = self._found[key.task].get(key.service)
        if before is not None and _side(before) == _side(health):
            self._hold(key, _since(health, before.since))
            return
        self._hold(key, health)
        if verdict is not Verdict.STARTING:
            log.info("task=%s/%s health=%s reason=%r", *key, verdict.value, reason)
        self._touch(Touched(frozenset((key.service,)), nodes=False))

    def _hold(self, key: _Key, health: Health) -> None:
        self._services[key.service].add(key.task)
        self._found[key.task][key.service] = health
        self._state.health.found(key.service, key.task, health)
        self._tell(key.task)

    def _drop(self, key: _Key) -> None:
        self._found[key.task].pop(key.service, None)
        if not self._found[key.task]:
            del self._found[key.task]
        self._state.health.found(key.service, key.task, None)
        self._tell(key.task)

    # ---- what is told

    def _tell(self, task: str) -> None:
        self._untold.add(task)
        self._wake.set()
        self._unsaved.set()

    async def begin(self, lease: LeaseHolder, tasks: asyncio.TaskGroup) -> None:
        """Check everything from now on, and tell and keep what is found."""
        self.look(self._state.services())
        await self.tell(lease)
        tasks.create_task(self._keep_told(lease), name="health")
        tasks.create_task(self._keep_saved(), name="health file")

    async def tell(self, lease: LeaseHolder) -> None:
        """Write what is not told yet, under the lease; it holds that from then on."""
        untold, self._untold = self._untold, set()
        records = {task: self._record(task) for task in untold}
        await lease.change({
            self._state.keys.health(self._node, task): schema.encode(record) if record else None
            for task, record in records.items()
        })  # fmt: skip

    def _record(self, task: str) -> tuple[Health, ...]:
        """The record of all tasks of one name; of a starting one nothing until there is a reason:
        most are healthy a moment later.
        """
        each = self._found.get(task, {}).items()
        return tuple(h for _, h in sorted(each) if h.reason or not h.starting)

    async def _keep_told(self, lease: LeaseHolder) -> None:
        while True:
            try:
                async with asyncio.timeout(_MEND_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                wanted = {task: self._record(task) for task in self._found}
                for task in self._state.health.unreported(wanted):
                    lease.again(self._state.keys.health(self._node, task))
            self._wake.clear()
            await self.tell(lease)

    async def _keep_saved(self) -> None:
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            tasks = tuple((task, health) for task, health in self.found() if not health.starting)
            try:
                await asyncio.to_thread(memory.save, self._directory, tasks)
            except OSError as error:
                log.warning("health not kept for the next agent: %s", error)
            await asyncio.sleep(_SAVE_SECONDS)

    async def close(self) -> None:
        """Stop probing."""
        await self._prober.close()


def _side(health: Health) -> tuple[bool, bool, str]:
    return health.healthy, health.starting, health.address


def _since(health: Health, since: str) -> Health:
    return msgspec.structs.replace(health, since=since)

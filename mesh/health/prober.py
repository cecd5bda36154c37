"""Probes tasks again and again, each in its own time, and tells what they come to.

Owns the timers and how many probes run at once.  Draws no dice of its own, and knows neither
records nor services.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from mesh.health import judge, probe
from mesh.health.judge import Verdict
from mesh.health.target import Exec

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from mesh.health.judge import Pace, Standing
    from mesh.health.target import Target

    Told = Callable[[Hashable, Verdict, str], None]

log = logging.getLogger(__name__)

MOST_CONNECTIONS: Final = 512
"""Probes under way at once: half of the descriptors that a process has by default."""

MOST_COMMANDS: Final = 8

_UNSURE_SECONDS: Final = 1.0
"""Until a probe is tried again that this process could not make."""

TELL_SECONDS: Final = 10.0
"""Between two tellings of another reason at least: each is a write to etcd."""


class Prober:
    """A changing set of tasks under probation.

    `told` hears of every new verdict, with its reason, and now and then of another reason.
    `dice` gives numbers from 0 to 1, which keep the probes of many tasks apart.
    """

    def __init__(self, told: Told, dice: Callable[[], float]) -> None:
        self.told = told
        self.dice = dice
        self.room = asyncio.Semaphore(MOST_CONNECTIONS)
        self.executor = ThreadPoolExecutor(MOST_COMMANDS, "health")
        self._watched: dict[Hashable, _Watched] = {}

    def __len__(self) -> int:
        return len(self._watched)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._watched

    def watch(self, key: Hashable, target: Target, pace: Pace) -> None:
        """Probe a task that nothing is known of, or one that is watched, from now on so.

        A watched task keeps its verdict, unless it has another address: then it is another task.
        """
        known = self._watched.get(key)
        if known is None or known.target.address != target.address:
            self.forget(key)
            watched = _Watched(self, key, target, pace, judge.fresh(_now()))
            self._watched[key] = watched
            watched.begin()
        elif known.target != target or known.pace != pace:
            known.change(target, pace)

    def adopt(
        self, key: Hashable, target: Target, pace: Pace, verdict: Verdict, *, settled: bool
    ) -> None:
        """Probe a task on which there is a verdict already.

        In a hurry unless it is `settled`; then some time within the interval.
        """
        standing = judge.adopted(verdict, _now(), settled=settled)
        self._watched[key] = watched = _Watched(self, key, target, pace, standing)
        watched.begin_in(pace.interval * self.dice() if standing.settled else 0.0)

    def forget(self, key: Hashable) -> None:
        """Probe a task no longer."""
        watched = self._watched.pop(key, None)
        if watched is not None:
            watched.end()

    async def close(self) -> None:
        """Forget all, and wait until commands under way have ended."""
        for key in tuple(self._watched):
            self.forget(key)
        await asyncio.to_thread(self.executor.shutdown, cancel_futures=True)


class _Watched:
    """One task, its timer, and the probe under way."""

    def __init__(
        self, prober: Prober, key: Hashable, target: Target, pace: Pace, standing: Standing
    ) -> None:
        self._prober = prober
        self._key = key
        self.target = target
        self.pace = pace
        self.standing = standing
        self._reason = ""
        self._told = standing.verdict
        self._told_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._probing: asyncio.Task[None] | None = None

    def change(self, target: Target, pace: Pace) -> None:
        """Go on with another check, at once if something else is to be tried."""
        other = target != self.target
        self.target, self.pace = target, pace
        if other:
            verdict = self.standing.verdict
            self.standing = judge.adopted(verdict, _now(), settled=verdict is Verdict.HEALTHY)
            self._reason = ""
        self.end()
        self.begin_in(0.0 if other else judge.pause(self.standing, pace, _now(), self._dice()))

    def begin(self) -> None:
        """Probe now."""
        self._timer = None
        self._probing = asyncio.create_task(self._probe(), name="probe")
        self._probing.add_done_callback(self._ended)

    def begin_in(self, seconds: float) -> None:
        """Probe after a while."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self.begin)

    def end(self) -> None:
        """Leave the task alone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._probing is not None:
            self._probing.cancel()
            self._probing = None

    def _ended(self, probing: asyncio.Task[None]) -> None:
        """Go on although a probe broke in a way that nobody has thought of."""
        if not probing.cancelled() and (error := probing.exception()) is not None:
            log.error("check=%s broke: %r", self._key, error, exc_info=error)
            if self._probing is probing:
                self._again(_now() + self.pace.interval)

    def _dice(self) -> float:
        return self._prober.dice()

    async def _probe(self) -> None:
        began = _now()
        try:
            reason = await self._once()
        except probe.Unsure as error:
            log.warning("check=%s not judged: %s", self._key, error.__cause__ or "too busy")
            self._again(began + min(self.pace.interval, _UNSURE_SECONDS))
            return
        now = _now()
        self.standing = judge.judge(self.standing, self.pace, now, passed=not reason)
        self._again(began + judge.pause(self.standing, self.pace, now, self._dice()))
        self._tell(reason, now)

    async def _once(self) -> str:
        prober, timeout = self._prober, self.pace.timeout
        if isinstance(self.target, Exec):
            return await probe.run(self.target, timeout, prober.executor)
        async with prober.room:
            return await probe.run(self.target, timeout, prober.executor)

    def _again(self, at: float) -> None:
        self._probing = None
        self.begin_in(max(0.0, at - _now()))

    def _tell(self, reason: str, now: float) -> None:
        verdict = self.standing.verdict
        if verdict is Verdict.HEALTHY:
            reason = ""
        if verdict is self._told:
            if not reason or reason == self._reason:
                return
            if self._reason and now < self._told_at + TELL_SECONDS:
                return
        self._told, self._told_at, self._reason = verdict, now, reason
        self._prober.told(self._key, verdict, reason)


def _now() -> float:
    return asyncio.get_running_loop().time()

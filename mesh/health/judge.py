"""What a task's probes come to: its standing, and when to look again.  Pure.

A task changes sides after `rise` successes or `fall` failures in a row, and never on fewer.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model.names import parse_duration

if TYPE_CHECKING:
    from mesh.model.health import HealthCheck

QUICKEST: Final = 0.1
"""Seconds between the probes of a task that is expected to become healthy any moment."""

_SHARE: Final = 0.1
"""... and of one that has been expected for long: this part of the time it has taken so far, so
that it is seen to be ready a tenth later than it was, and costs little if it never is."""

_SPREAD: Final = 0.1
"""How much of an interval varies, so that the probes of many tasks do not run in step."""


class Verdict(enum.Enum):
    """What is held of a task."""

    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class Pace(NamedTuple):
    """The numbers of a check; times in seconds."""

    interval: float
    timeout: float
    rise: int
    fall: int
    start_period: float

    @staticmethod
    def of(check: HealthCheck) -> Pace:
        """The numbers in a check."""
        return Pace(
            parse_duration(check.interval),
            parse_duration(check.timeout),
            check.rise,
            check.fall,
            parse_duration(check.start_period),
        )


class Standing(NamedTuple):
    """A task before the judge.

    `began` is when it was first looked at under this check.  `streak` is how many probes in a row
    spoke against the verdict; of a starting task successes, or failures below zero.  `settled`: it
    has been healthy under this check; from then on there is no hurry.
    """

    verdict: Verdict
    began: float
    streak: int = 0
    settled: bool = False


def fresh(now: float) -> Standing:
    """Of a task that nothing is known of."""
    return Standing(Verdict.STARTING, now)


def adopted(verdict: Verdict, now: float, *, settled: bool) -> Standing:
    """Of a task on which there is a verdict: it holds until probes speak against it; in a hurry
    unless it is `settled`.
    """
    return Standing(verdict, now, settled=settled and verdict is Verdict.HEALTHY)


def judge(before: Standing, pace: Pace, now: float, *, passed: bool) -> Standing:
    """The standing after one more probe."""
    if passed:
        return _after_success(before, pace)
    return _after_failure(before, pace, now)


def _after_success(before: Standing, pace: Pace) -> Standing:
    if before.verdict is Verdict.HEALTHY:
        return before._replace(streak=0, settled=True)
    streak = max(before.streak, 0) + 1
    if streak >= pace.rise:
        return before._replace(verdict=Verdict.HEALTHY, streak=0, settled=True)
    return before._replace(streak=streak)


def _after_failure(before: Standing, pace: Pace, now: float) -> Standing:
    match before.verdict:
        case Verdict.UNHEALTHY:
            return before._replace(streak=0)
        case Verdict.STARTING if now - before.began < pace.start_period:
            return before._replace(streak=0)
        case Verdict.STARTING:
            failures = 1 - min(before.streak, 0)
            if failures >= pace.fall:
                return before._replace(verdict=Verdict.UNHEALTHY, streak=0)
            return before._replace(streak=-failures)
        case Verdict.HEALTHY:
            failures = before.streak + 1
            if failures >= pace.fall:
                return before._replace(verdict=Verdict.UNHEALTHY, streak=0)
            return before._replace(streak=failures)


def pause(standing: Standing, pace: Pace, now: float, dice: float) -> float:
    """Seconds from the start of a probe to the next one's; `dice` is drawn from 0 to 1."""
    if standing.settled:
        return pace.interval * (1 - _SPREAD / 2 + _SPREAD * dice)
    wait = QUICKEST if standing.streak > 0 else _SHARE * (now - standing.began)
    return min(max(wait, QUICKEST), pace.interval)

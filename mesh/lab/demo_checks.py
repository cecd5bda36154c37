"""What the demo takes for right: a judge per kind of row.  Pure: observations in, verdicts out.

A failed verdict says what was expected and what was seen.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

AT_ONCE: Final = 0.5
"""Seconds: a refusal takes under a millisecond, one that waits for a SYN sent again 1 s or more."""

FAIR_PART: Final = 4
"""Every replica gets 1/4 of its fair share at least: with 60 connections to 3 replicas chance
gives less once in a million runs."""

FEWEST: Final = 30
"""A disturbance is judged by this many connections at least."""


QUIET: Final = 0.3
"""Seconds without a failure after which a disturbance counts as over."""


class Seen(msgspec.Struct, frozen=True, array_like=True):
    """One connection or request.  `began` is CLOCK_MONOTONIC, the same on every machine of a lab.

    `replica` and `client` are what was answered; else `failure` says how it failed.
    """

    host: str
    began: float
    seconds: float
    replica: str | None = None
    client: str | None = None
    failure: str | None = None

    @property
    def ended(self) -> float:
        """When it was answered, or had failed."""
        return self.began + self.seconds


class Verdict(NamedTuple):
    """Whether a row is as it should be, and what was seen (if not, also what was expected)."""

    ok: bool
    detail: str


class Check(NamedTuple):
    """A row: the keys of `mesh lab demo --json`."""

    name: str
    ok: bool
    detail: str


def spread(seen: Sequence[Seen], replicas: Collection[str]) -> Verdict:
    """Every connection answered, by all of the `replicas` and by no other."""
    least = max(1, len(seen) // len(replicas) // FAIR_PART)
    answered = _by_replica(seen)
    right = not _failed(seen) and set(answered) == set(replicas) and min(answered.values()) >= least
    who = ", ".join(replicas)
    wanted = f"{len(seen)} answers, at least {least} from each of {who}"
    return _verdict(right, wanted, _tally(seen))


def own_address(seen: Sequence[Seen], addresses: Collection[str]) -> Verdict:
    """Every connection answered, and the replicas saw one of the client's own `addresses`."""
    told = Counter(one.client for one in seen if one.client)
    right = bool(seen) and not _failed(seen) and set(told) <= set(addresses)
    text = ", ".join(f"{address} {n} times" for address, n in told.items())
    wanted = f"{len(seen)} times {' or '.join(addresses)}"
    return _verdict(right, wanted, _with_failures(text, seen))


def refused(seen: Sequence[Seen]) -> Verdict:
    """Every connection refused at once: nobody waits for a time-out."""
    right = bool(seen) and all(o.failure == "refused" and o.seconds <= AT_ONCE for o in seen)
    wanted = f"{len(seen)} refused within {_duration(AT_ONCE)}"
    return _verdict(right, wanted, f"{_tally(seen)}, slowest {_slowest(seen)}")


def unanswered(seen: Sequence[Seen]) -> Verdict:
    """No connection answered."""
    right = bool(seen) and all(one.failure for one in seen)
    detail = f"0 of {len(seen)} answered" if right else _tally(seen)
    return _verdict(right, f"{len(seen)} without an answer", detail)


def unbroken(seen: Sequence[Seen]) -> Verdict:
    """No connection failed."""
    right = len(seen) >= FEWEST and not _failed(seen)
    detail = f"{len(_failed(seen))} of {len(seen)} failed, slowest {_slowest(seen)}"
    return _verdict(right, f"0 of at least {FEWEST} to fail", _with_failures(detail, seen))


def settled(seen: Sequence[Seen], at: float, limit: float) -> Verdict:
    """What happened at the time `at` fails no connection that begins `limit` seconds later.

    Those that had ended before `at` did not fail, and `QUIET` seconds at the end nothing did.
    """
    lost = _failed(seen)
    last = max((one.began for one in lost), default=at)
    end = max((one.began for one in seen), default=at)
    early = [one for one in lost if one.ended < at]
    right = len(seen) >= FEWEST and not early and last - at <= limit and end - last >= QUIET
    detail = f"{len(lost)} of {len(seen)} failed"
    if lost:
        kinds = ", ".join(sorted({str(one.failure) for one in lost}))
        side = "after" if last >= at else "before"
        detail += f" ({kinds}), the last began {_duration(abs(last - at))} {side}"
    slowest = max((one.seconds for one in seen if one.replica), default=0)
    if slowest > AT_ONCE:
        detail += f", the slowest answer took {_duration(slowest)}"
    wanted = f"none to fail that begins {_duration(limit)} after or in the last {_duration(QUIET)}"
    return _verdict(right, wanted, detail)


def taken_over(seen: Iterable[Seen], replicas: Collection[str]) -> Verdict:
    """Meanwhile each of the `replicas` answered, and no other."""
    answered = _by_replica(seen)
    wanted = f"answers from {' and '.join(replicas)} only"
    return _verdict(set(answered) == set(replicas), wanted, _counts(answered))


def back(seen: Sequence[Seen], at: float, replica: str, limit: float) -> Verdict:
    """The `replica` answers again within `limit` seconds."""
    first = min((o.ended for o in seen if o.replica == replica and o.began > at), default=None)
    wanted = f"an answer from {replica} within {_duration(limit)}"
    if first is None:
        return _verdict(False, wanted, "none")
    return _verdict(first - at <= limit, wanted, f"answers again after {_duration(first - at)}")


def _verdict(right: bool, wanted: str, detail: str) -> Verdict:
    return Verdict(right, detail if right else f"expected {wanted}; saw {detail or 'nothing'}")


def _failed(seen: Iterable[Seen]) -> list[Seen]:
    return [one for one in seen if one.failure]


def _by_replica(seen: Iterable[Seen]) -> Counter[str]:
    return Counter(one.replica for one in seen if one.replica)


def _tally(seen: Sequence[Seen]) -> str:
    return _with_failures(_counts(_by_replica(seen)), seen)


def _with_failures(text: str, seen: Sequence[Seen]) -> str:
    """`text`, and where connections failed in which way."""
    by_kind = Counter((one.failure, one.host) for one in seen if one.failure)
    if len({host for _, host in by_kind}) == len({one.host for one in seen}):
        found = _counts(Counter(one.failure for one in seen if one.failure))
    else:
        found = ", ".join(f"{kind} {n} at {host}" for (kind, host), n in by_kind.items())
    return ", ".join(part for part in (text, found) if part)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counter.items()))


def _slowest(seen: Iterable[Seen]) -> str:
    return _duration(max((one.seconds for one in seen), default=0))


def _duration(seconds: float) -> str:
    if seconds < 0.01:
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"

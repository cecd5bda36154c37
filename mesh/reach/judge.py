"""What probes of the other nodes come to: who can be reached, and whom to leave out.  Pure.

Times are seconds of the prober's own clock, which stands still while the prober does (`heeded`):
what is silent for that long alone is never held against a node.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

_DEAF: Final = 8
"""Probes in a row by one IP family without an answer, after which it is tried as rarely."""

_ATTENTION: Final = 1.5
"""How many intervals pass at most between two looks, however late the second one is."""

_LONGEST: Final = 2.0
"""Seconds that an answer may take at most, whatever earlier ones took."""

_EARLY: Final = 0.8
"""... and at least this part of an interval: answers are looked for once an interval."""

_MEMORY: Final = 300.0
"""How long it is remembered that a node was lost: each time doubles what it takes to come back."""

_DOUBLINGS: Final = 6

_GRACE: Final = 5.0
"""Seconds after a handshake in which an echo comes back, if echoes come back at all."""

_TRIAL: Final = 20.0
"""Seconds in which WireGuard makes a session, with a try every five, if one can be made."""

_SESSION: Final = 190.0
"""Seconds after its handshake at which no session carries anything any more; WireGuard says 180."""


class Reach(enum.Enum):
    """What is held of a node: unknown is one whose echo never came, and which is none the worse
    for it.
    """

    UNKNOWN = "unknown"
    REACHABLE = "reachable"
    UNREACHABLE = "unreachable"


class Pace(NamedTuple):
    """Seconds from probe to probe of one node; how many in a row, unanswered or answered, change
    what is held of it.
    """

    interval: float
    fall: int
    rise: int


class Standing(NamedTuple):
    """A node before the judge.

    `since` is when it became what it is, `heard` when it last answered.  `pending` are the probes
    since then, by when they were sent, the first `fall` of them; `streak` is how many answers in a
    row an unreachable node gave, `lost` when it was lost.  `trip` and `jitter` are the smoothed
    round-trip time and how far it strays.
    """

    reach: Reach
    since: float
    heard: float | None = None
    pending: tuple[float, ...] = ()
    streak: int = 0
    lost: tuple[float, ...] = ()
    trip: float | None = None
    jitter: float = 0.0


def heeded(elapsed: float, pace: Pace) -> float:
    """How much time passed for the prober, which looks again `elapsed` seconds after it looked."""
    return min(elapsed, _ATTENTION * pace.interval)


def slept(elapsed: float, pace: Pace) -> bool:
    """Whether the prober was away for so long that its last probes prove nothing."""
    return elapsed >= pace.fall * pace.interval


def fresh(now: float) -> Standing:
    """Of a node that nothing is known of."""
    return Standing(Reach.UNKNOWN, now)


def adopted(now: float) -> Standing:
    """Of a node that could not be reached before this prober began."""
    return Standing(Reach.UNREACHABLE, now)


def probed(before: Standing, pace: Pace, now: float) -> Standing:
    """The standing after a probe was sent."""
    if len(before.pending) >= pace.fall:
        return before
    return before._replace(pending=(*before.pending, now))


def answered(before: Standing, pace: Pace, now: float, trip: float) -> Standing:
    """The standing after an answer, which took `trip` seconds."""
    after = _timed(before, trip)._replace(heard=now, pending=())
    match before.reach:
        case Reach.REACHABLE:
            return after
        case Reach.UNKNOWN:
            return after._replace(reach=Reach.REACHABLE, since=now)
        case Reach.UNREACHABLE:
            if before.streak + 1 >= needed(before, pace, now):
                return after._replace(reach=Reach.REACHABLE, since=now, streak=0)
            return after._replace(streak=before.streak + 1)


def needed(standing: Standing, pace: Pace, now: float) -> int:
    """How many answers in a row bring an unreachable node back."""
    times = sum(now - lost < _MEMORY for lost in standing.lost)
    return pace.rise << min(max(times - 1, 0), _DOUBLINGS)


def excused(before: Standing) -> Standing:
    """The standing when the prober slept: no probe of before is held against the node."""
    return before._replace(pending=())


def looked(before: Standing, pace: Pace, now: float) -> Standing:
    """The standing once all answers were taken in that had arrived by now."""
    overdue = sum(now - sent >= _allowance(before, pace) for sent in before.pending)
    if before.reach is Reach.UNREACHABLE:
        return before._replace(streak=0) if overdue and before.streak else before
    silent = before.heard is not None and now - before.heard >= pace.fall * pace.interval
    if before.reach is Reach.REACHABLE and silent and overdue >= pace.fall:
        return _lost(before, now)
    return before


def shaken(before: Standing, now: float, age: float | None) -> Standing:
    """The standing when WireGuard shook hands with the node `age` seconds ago; None: never.

    A handshake takes both directions, so one after the last echo acquits a node whose host does no
    more than keep echoes away; and where there is no session nothing can be carried.
    """
    lasted = now - before.since
    if before.reach is Reach.UNREACHABLE and age is not None:
        silent = min(lasted, now - before.heard) if before.heard is not None else lasted
        if _GRACE <= age < silent:
            return before._replace(reach=Reach.UNKNOWN, since=now, pending=(), streak=0)
    if before.reach is Reach.UNKNOWN and lasted >= _TRIAL and (age is None or age >= _SESSION):
        return _lost(before, now)
    return before


def way(misses: Sequence[int], turn: int) -> int:
    """By which of the IP families to probe a node next: in turn by those that it answers.

    `misses` are the probes since its last answer, by family.
    """
    answering = [index for index, count in enumerate(misses) if count < _DEAF]
    if not answering or turn % _DEAF == 0:
        return turn // (_DEAF if answering else 1) % len(misses)
    return answering[turn % len(answering)]


def left_out(
    before: Collection[str],
    standings: Mapping[str, Standing],
    live: Collection[str],
    pace: Pace,
    now: float,
) -> frozenset[str]:
    """Whom to give no new connections: unreachable nodes, each on the word of a witness.

    A witness is another node that answers at this moment.  Where none does, it is most likely this
    node that is cut off: who was left out `before` stays so, and nobody else joins them.  A node
    needs no witness if no other one of the `live` could be one.
    """
    witnessed = any(_answers(each, pace, now) for each in standings.values())
    possible = {name for name in live if _may_witness(standings.get(name))}
    return frozenset(
        name
        for name, standing in standings.items()
        if standing.reach is Reach.UNREACHABLE
        and (witnessed or name in before or possible <= {name})
    )


def _answers(standing: Standing, pace: Pace, now: float) -> bool:
    heard = standing.heard
    recent = heard is not None and now - heard <= 2 * pace.interval
    return standing.reach is Reach.REACHABLE and recent


def _may_witness(standing: Standing | None) -> bool:
    return standing is not None and standing.reach is not Reach.UNKNOWN


def _lost(before: Standing, now: float) -> Standing:
    lost = (*(each for each in before.lost if now - each < _MEMORY), now)
    return before._replace(reach=Reach.UNREACHABLE, since=now, streak=0, lost=lost)


def _allowance(standing: Standing, pace: Pace) -> float:
    """Seconds that an answer may take, by what earlier ones took (RFC 6298)."""
    least = _EARLY * pace.interval
    if standing.trip is None:
        return least
    return max(least, min(standing.trip + 4 * standing.jitter, _LONGEST))


def _timed(before: Standing, trip: float) -> Standing:
    if before.trip is None:
        return before._replace(trip=trip, jitter=trip / 2)
    jitter = before.jitter + (abs(before.trip - trip) - before.jitter) / 4
    return before._replace(trip=before.trip + (trip - before.trip) / 8, jitter=jitter)

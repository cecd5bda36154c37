"""Ways to a service that take turns, and what a connection by one costs beside another.

A round calls each of them; what disturbs the machine meanwhile disturbs all of them alike, so only
figures of the same round are compared.
"""

from __future__ import annotations

import gc
import os
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mesh.bench import figures
from mesh.bench.connections import Generator, Processor, Taken
from mesh.bench.progress import tell
from mesh.dataplane import netns
from mesh.errors import MeshError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mesh.bench.connections import Server, Target
    from mesh.model.address import Family

_BATCHES: Final = 8
_REPEATS: Final = 2
"""Of one round: batches for processor time, and how often each target is called by itself."""

_SHARES: Final = (10, 50)


@dataclass(slots=True)
class Lane:
    """One way to a service: what is called, by which address; `stream` is what sends much."""

    path: str
    tcp: Sequence[Target]
    udp: Sequence[Target]
    stream: Target | None = None
    rounds: list[float] = field(default_factory=list)
    """Processor seconds of a connection in each round: the lower quartile of its batches, for what
    disturbs a batch only ever adds to it."""
    taken: Taken = field(default_factory=Taken)

    def measure(self, generator: Generator, processor: Processor) -> tuple[float, int]:
        """One round; the generator's own seconds, and in how many connections."""
        taken = Taken()
        began = processor.own()
        for _ in range(_BATCHES):
            generator.batch(self.tcp, taken)
        own, connections = processor.own() - began, taken.connections
        for _ in range(_REPEATS):
            for target in self.tcp:
                generator.connect(target, taken)
            for target in self.udp:
                generator.round_trip(target, taken)
        if self.stream is not None:
            generator.download(self.stream, taken)
        if taken.batches:
            self.rounds.append(figures.percentile(taken.batches, 25))
        self.taken.connects += taken.connects
        self.taken.round_trips += taken.round_trips
        self.taken.downloads += taken.downloads
        self.taken.connections += taken.connections
        self.taken.failed += taken.failed
        return own, connections

    def forget(self) -> None:
        """What was measured so far does not count."""
        self.rounds, self.taken = [], Taken()

    def is_whole(self, rounds: int, *, intact: bool) -> bool:
        """Whether there are figures of so many rounds; if `intact`, without any failure."""
        return len(self.rounds) == rounds and not (self.taken.failed and intact)


@dataclass(slots=True)
class Stage:
    """Lanes that begin in one namespace, `client`, and end at one server."""

    name: str
    client: str
    server: Server
    forget_flows: Callable[[], None]
    lanes: list[Lane]


def take_turns(stages: Sequence[Stage], family: Family, rounds: int) -> float:
    """Measure all lanes; how many seconds of each connection were the generator's own.

    Raises MeshError if one of them does not work.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    processor, own = Processor(), 0.0
    connections = 0
    dice = random.Random(rounds)
    for number in range(rounds + 1):
        tell(f"{len(stages)} rule sets: round {number} of {rounds}" if number else "warming up")
        for stage in dice.sample(stages, len(stages)):
            generator = Generator(stage.server, family, processor)
            with netns.entered(stage.client):
                for lane in dice.sample(stage.lanes, len(stage.lanes)):
                    used, count = lane.measure(generator, processor)
                    own, connections = own + used, connections + count
            stage.forget_flows()
        if number == 0:
            _check(stages, rounds=1, intact=True)
            for lane in (lane for stage in stages for lane in stage.lanes):
                lane.forget()
            own, connections = 0.0, 0
    processor.close()
    _check(stages, rounds=rounds, intact=False)
    return own / connections


def _check(stages: Sequence[Stage], *, rounds: int, intact: bool) -> None:
    """Raise MeshError if a lane did not forward: `rounds` in full, or all there is if `intact`.

    The first round does not count, but must be intact: it tells whether there is something to
    compare.
    """
    for stage in stages:
        for lane in stage.lanes:
            if not lane.is_whole(rounds, intact=intact):
                raise MeshError(
                    f"{stage.name}: {lane.taken.failed} of {lane.taken.connections} connections "
                    f"by {lane.path} failed, so there is nothing to compare"
                )


def compared(direct: Lane, lane: Lane, own: float) -> dict[str, object]:
    """What a connection by a lane costs beside `direct`, of whose every connection the generator
    itself takes `own` seconds.
    """
    taken = lane.taken
    return {
        "connect_us": _spread(taken.connects),
        "added_us": _added(taken.connects, direct.taken.connects),
        "cpu_us": round((figures.median(lane.rounds) - own) * 1e6, 1),
        "cpu_added_us": round(_more(direct, lane) * 1e6, 1),
        "cpu_ratio_to_direct": round(ratio(direct, lane, own), 3),
        "generator_us": round(own * 1e6, 1),
        "udp_us": _spread(taken.round_trips),
        "udp_added_us": _added(taken.round_trips, direct.taken.round_trips),
        "connections": taken.connections,
        "failed": taken.failed,
    }


def ratio(direct: Lane, lane: Lane, own: float) -> float:
    """The median over the rounds of direct's kernel time to the lane's."""
    pairs = zip(direct.rounds, lane.rounds, strict=False)
    return figures.median([(one - own) / (other - own) for one, other in pairs])


def _more(direct: Lane, lane: Lane) -> float:
    """The median over the rounds of what the lane takes longer; the generator's part cancels."""
    pairs = zip(direct.rounds, lane.rounds, strict=False)
    return figures.median([other - one for one, other in pairs])


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    return figures.percentiles(values, 1e6, _SHARES) if values else None


def _added(values: Sequence[float], plain: Sequence[float]) -> dict[str, float] | None:
    """What a lane takes longer than direct, percentile by percentile."""
    if not (values and plain):
        return None
    return {
        f"p{share}": round(
            (figures.percentile(values, share) - figures.percentile(plain, share)) * 1e6, 1
        )
        for share in _SHARES
    }

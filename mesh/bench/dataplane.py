"""What a new connection costs through the node, against the same without any rules.

All rule sets are loaded at once, each in a node of its own, and take turns: every round calls every
one of them, in another order.  So what disturbs the machine disturbs all of them alike.
`python -m mesh.bench.dataplane` measures, in namespaces of its own (mesh.bench.isolated).
"""

from __future__ import annotations

import gc
import os
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mesh.bench import figures, isolated, names
from mesh.bench.connections import Generator, Processor, Server, Taken
from mesh.bench.names import KUBE_PROXY
from mesh.bench.progress import tell
from mesh.bench.topology import Topology
from mesh.bench.variants import BASELINES, Variant
from mesh.dataplane import netns
from mesh.errors import MeshError
from mesh.model.address import Family
from mesh.model.publish import Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mesh.bench.connections import Target

_BATCHES: Final = 8
_REPEATS: Final = 2
"""Of one round: batches for processor time, and how often each target is called by itself."""


def planned(
    chosen: Sequence[str], sizes: Sequence[int], *, kube_proxy: bool, slow: bool
) -> list[Variant]:
    """What to load: baselines, then each backend at each size, ours beside kube-proxy's."""
    rivals = [KUBE_PROXY + name for name in names.BACKENDS if name in (*chosen, *_ALWAYS)]
    wanted = [*chosen, *(rivals if kube_proxy else ())]
    return [
        *map(Variant, BASELINES),
        *(
            Variant(name, size)
            for size in sorted(set(sizes))
            for name in wanted
            if slow or not names.is_slow(name, size)
        ),
    ]


_ALWAYS: Final = ("nftables", "iptables-legacy")
"""kube-proxy's rules for these are there whatever backend of ours is measured."""


@dataclass(slots=True)
class _Lane:
    """One way to a service: through which rules, by which address."""

    variant: Variant
    path: str
    tcp: Sequence[Target]
    udp: Sequence[Target]
    rounds: list[float] = field(default_factory=list)
    """Processor seconds of a connection in each round: the lower quartile of its batches, for what
    disturbs a batch only ever adds to it."""
    taken: Taken = field(default_factory=Taken)


@dataclass(slots=True)
class _Stage:
    """A rule set in place, and who answers behind it."""

    variant: Variant
    topology: Topology
    server: Server
    load: float
    lanes: list[_Lane]


def run(variants: Sequence[Variant], family: Family, rounds: int) -> list[dict[str, object]]:
    """The figures of every way through every rule set.  Raises MeshError if one does not work."""
    stages = [_stage(number, variant, family) for number, variant in enumerate(variants)]
    gc.collect()
    gc.freeze()
    gc.disable()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    processor, own = Processor(), 0.0
    connections = 0
    dice = random.Random(rounds)
    for number in range(rounds + 1):
        tell(f"{len(variants)} rule sets: round {number} of {rounds}" if number else "warming up")
        for stage in dice.sample(stages, len(stages)):
            generator = Generator(stage.server, family, processor)
            with netns.entered(stage.topology.client):
                for lane in stage.lanes:
                    used, count = _measure(generator, lane, processor)
                    own, connections = own + used, connections + count
            stage.topology.forget_flows()
        if number == 0:
            _check(stages, rounds=1, intact=True)
            for lane in (lane for stage in stages for lane in stage.lanes):
                lane.rounds, lane.taken = [], Taken()
            own, connections = 0.0, 0
    processor.close()
    _check(stages, rounds=rounds, intact=False)
    return list(_figures(stages, own / connections, family))


def _stage(number: int, variant: Variant, family: Family) -> _Stage:
    tell(f"loading {variant}")
    topology = Topology(f"v{number}")
    topology.build()
    with netns.entered(topology.node):
        load = variant.load(family)
    lanes = [
        _Lane(
            variant,
            path,
            variant.targets(path, Protocol.TCP, family),
            variant.targets(path, Protocol.UDP, family),
        )
        for path in variant.paths
    ]
    return _Stage(variant, topology, Server(topology.server, family), load, lanes)


def _measure(generator: Generator, lane: _Lane, processor: Processor) -> tuple[float, int]:
    """One round of one lane; the generator's own seconds, and in how many connections."""
    taken = Taken()
    began = processor.own()
    for _ in range(_BATCHES):
        generator.batch(lane.tcp, taken)
    own, connections = processor.own() - began, taken.connections
    for _ in range(_REPEATS):
        for target in lane.tcp:
            generator.connect(target, taken)
        for target in lane.udp:
            generator.round_trip(target, taken)
    if taken.batches:
        lane.rounds.append(figures.percentile(taken.batches, 25))
    lane.taken.connects += taken.connects
    lane.taken.round_trips += taken.round_trips
    lane.taken.connections += taken.connections
    lane.taken.failed += taken.failed
    return own, connections


def _check(stages: Sequence[_Stage], *, rounds: int, intact: bool) -> None:
    """Raise MeshError if a rule set did not forward: `rounds` in full, or all there is if `intact`.

    The first round does not count, but must be intact: it tells whether there is something to
    compare.
    """
    for stage in stages:
        for lane in stage.lanes:
            failed = lane.taken.failed
            if len(lane.rounds) != rounds or (failed and intact):
                raise MeshError(
                    f"{stage.variant}: {failed} of {lane.taken.connections} connections by "
                    f"{lane.path} failed, so there is nothing to compare"
                )


# ---- figures


def _figures(stages: Sequence[_Stage], own: float, family: Family) -> Iterator[dict[str, object]]:
    """One record a lane; `own` is the generator's part of every connection, in seconds."""
    direct = stages[0].lanes[0]
    smallest: dict[tuple[str, str], float] = {}
    for stage in stages:
        for lane in stage.lanes:
            ratio = _ratio(direct, lane, own)
            first = smallest.setdefault((stage.variant.backend, lane.path), ratio)
            found: dict[str, object] = {
                "bench": "dataplane",
                "backend": stage.variant.backend,
                "services": stage.variant.services,
                "path": lane.path,
                "family": family.value,
                "connect_us": _spread(lane.taken.connects),
                "added_us": _added(lane.taken.connects, direct.taken.connects),
                "cpu_us": round((figures.median(lane.rounds) - own) * 1e6, 1),
                "cpu_added_us": round(_more(direct, lane) * 1e6, 1),
                "cpu_ratio_to_direct": round(ratio, 3),
                "cpu_ratio_to_smallest": round(ratio / first, 3),
                "generator_us": round(own * 1e6, 1),
                "udp_us": _spread(lane.taken.round_trips),
                "udp_added_us": _added(lane.taken.round_trips, direct.taken.round_trips),
                "load_ms": figures.milliseconds(stage.load),
                "connections": lane.taken.connections,
                "failed": lane.taken.failed,
            }
            yield found


def _ratio(direct: _Lane, lane: _Lane, own: float) -> float:
    """The median over the rounds of direct's kernel time to the lane's."""
    pairs = zip(direct.rounds, lane.rounds, strict=False)
    return figures.median([(one - own) / (other - own) for one, other in pairs])


def _more(direct: _Lane, lane: _Lane) -> float:
    """The median over the rounds of what the lane takes longer; the generator's part cancels."""
    pairs = zip(direct.rounds, lane.rounds, strict=False)
    return figures.median([other - one for one, other in pairs])


_SHARES: Final = (10, 50)


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


def _work(wanted: Mapping[str, Any]) -> list[dict[str, object]]:
    variants = [Variant(backend, services) for backend, services in wanted["variants"]]
    return run(variants, Family(wanted["family"]), wanted["rounds"])


if __name__ == "__main__":
    isolated.answer(_work)

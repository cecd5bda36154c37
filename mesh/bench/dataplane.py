"""What a new connection costs through the node, against the same without any rules.

All rule sets are loaded at once, each in a node of its own, and take turns: every round calls every
one of them, in another order.  So what disturbs the machine disturbs all of them alike.
`python -m mesh.bench.dataplane` measures, in namespaces of its own (mesh.bench.isolated).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mesh.bench import figures, isolated, lanes, names
from mesh.bench.connections import Server
from mesh.bench.lanes import Lane, Stage
from mesh.bench.names import KUBE_PROXY
from mesh.bench.progress import tell
from mesh.bench.topology import Topology
from mesh.bench.variants import BASELINES, Variant
from mesh.dataplane import netns
from mesh.model.address import Family
from mesh.model.publish import Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


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
class _Loaded:
    """A rule set in place, how long that took, and the ways through it."""

    variant: Variant
    seconds: float
    stage: Stage


def run(variants: Sequence[Variant], family: Family, rounds: int) -> list[dict[str, object]]:
    """The figures of every way through every rule set.  Raises MeshError if one does not work."""
    found = [_load(number, variant, family) for number, variant in enumerate(variants)]
    own = lanes.take_turns([each.stage for each in found], family, rounds)
    return list(_figures(found, own, family))


def _load(number: int, variant: Variant, family: Family) -> _Loaded:
    tell(f"loading {variant}")
    topology = Topology(f"v{number}")
    topology.build()
    with netns.entered(topology.node):
        seconds = variant.load(family)
    ways = [
        Lane(
            path,
            variant.targets(path, Protocol.TCP, family),
            variant.targets(path, Protocol.UDP, family),
        )
        for path in variant.paths
    ]
    server = Server(topology.server, family)
    stage = Stage(str(variant), topology.client, server, topology.forget_flows, ways)
    return _Loaded(variant, seconds, stage)


def _figures(found: Sequence[_Loaded], own: float, family: Family) -> Iterator[dict[str, object]]:
    """One record a lane; `own` is the generator's part of every connection, in seconds."""
    direct = found[0].stage.lanes[0]
    smallest: dict[tuple[str, str], float] = {}
    for each in found:
        for lane in each.stage.lanes:
            ratio = lanes.ratio(direct, lane, own)
            first = smallest.setdefault((each.variant.backend, lane.path), ratio)
            yield {
                "bench": "dataplane",
                "backend": each.variant.backend,
                "services": each.variant.services,
                "path": lane.path,
                "family": family.value,
                **lanes.compared(direct, lane, own),
                "cpu_ratio_to_smallest": round(ratio / first, 3),
                "load_ms": figures.milliseconds(each.seconds),
            }


def _work(wanted: Mapping[str, Any]) -> list[dict[str, object]]:
    variants = [Variant(backend, services) for backend, services in wanted["variants"]]
    return run(variants, Family(wanted["family"]), wanted["rounds"])


if __name__ == "__main__":
    isolated.answer(_work)

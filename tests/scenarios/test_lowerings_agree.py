"""Random clusters, three opinions: the nftables program by the tracer, the text for iptables and
ipset by an exact walk, and what the records mean.  They agree on what becomes of a packet, and on
every backend's share: nftables exactly, iptables within the kernel's rounding.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mesh.agent.planner import Plans
from mesh.agent.state import State
from mesh.dataplane.memory import MemoryDriver
from mesh.delta import Delta
from mesh.engine.reconciler import Reconciler
from mesh.model.address import FAMILIES, Family, contains, family_of
from mesh.model.publish import Protocol, PublishMode
from mesh.model.service import Affinity, Prefer, Source
from mesh.rules import elements, ipsets, marks, trace, xtables
from mesh.rules.program import Devices, Parameters
from mesh.rules.trace import Entry, Packet, Path, Place, Verdict
from mesh.rules.xtables_image import Image
from tests.support import drawn, layouts, oracle, xtables_rule
from tests.support.drawn import CLUSTER, HERE, Port, Replica, Service, World
from tests.support.records import KEYS
from tests.support.xtables_walk import ROUNDING, End, Host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mesh.dataplane.protocol import ElementDelta
    from mesh.rules.elements import Elements
    from mesh.rules.marks import Layout
    from mesh.rules.trace import Trace
    from mesh.rules.xtables_image import Step

DEVICES: Final = Devices("warren0", "warren-x0", "warren-br0", CLUSTER.network(HERE).bridge_mac)
SEEDS: Final = st.integers(0, 1 << 30)
LAYOUTS: Final = st.sampled_from((marks.DEFAULT, *layouts.ALL.values()))
FIXED: Final = settings(deadline=None, derandomize=True, phases=(Phase.generate,))
"""The same examples each time, and none made smaller: that would take minutes."""


# ---- the node, by each engine


class Kernel(MemoryDriver):
    """Holds elements, and the changes that led to them."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[ElementDelta] = []

    async def apply(self, delta: ElementDelta) -> None:
        self.changes.append(Delta(dict(delta.remove), dict(delta.add)))
        await super().apply(delta)


async def _live(
    layout: Layout, first: World, *others: World
) -> list[tuple[list[ElementDelta], Elements]]:
    """What an agent writes in each of the worlds that it sees, and what there is then."""
    kernel, state = Kernel(), State(KEYS, f"n{HERE}")
    await kernel.prepare()
    state.apply(first.snapshot())
    reconciler = Reconciler(Plans(state), kernel, lambda _delta: None, layout)
    await reconciler.start({})
    found = [(kernel.changes, await kernel.read())]
    for world in others:
        kernel.changes = []
        await reconciler.reconcile(state.apply(world.snapshot()))
        found.append((kernel.changes, await kernel.read()))
    assert list(reconciler.problems()) == []
    return found


def live(layout: Layout, first: World, *others: World) -> list[tuple[list[ElementDelta], Elements]]:
    return asyncio.run(_live(layout, first, *others))


class Node:
    """A node as both engines have it: the elements, and the text that iptables' driver hands to
    the programs.
    """

    def __init__(self, layout: Layout) -> None:
        self.parameters = Parameters.of(CLUSTER, HERE, DEVICES, layout)
        self.host, self._image = Host(), Image(layout)
        self.host.ipset("\n".join(ipsets.program()))
        for family in FAMILIES:
            dynamic = self._image.chains(family)
            for table, static in xtables.program(self.parameters, family).items():
                chains = static.chains | dynamic.get(table, {})
                hooks = xtables.hook_commands(static, xtables.Saved({}))
                self.host.restore(family, xtables.restore(table, Delta({}, chains), hooks))

    @staticmethod
    def holding(layout: Layout, found: Elements) -> Node:
        """A node with these elements."""
        made = Node(layout)
        for _ in made.take(Delta({}, found)):
            pass
        return made

    def take(self, delta: ElementDelta) -> Iterator[None]:
        """Make a change; stops wherever a packet may come in between."""
        self._image.check(delta)
        for stage in self._image.plan(self._image.effective(delta)).stages:
            for step in stage:
                yield from self._do(step)

    def _do(self, step: Step) -> Iterator[None]:
        if step.family is None:
            for line in step.text.splitlines():
                self.host.ipset(line)
                yield
        else:
            for table in step.text.split("COMMIT\n"):
                self.host.restore(step.family, table)
                yield

    def place(self, found: Elements, backend: str = "nftables") -> Place:
        return Place(self.parameters, found, drawn.underlay(HERE), backend=backend)

    def ends(self, packet: Packet) -> dict[End, Fraction]:
        """What becomes of a packet by iptables."""
        return self.host.walk(packet, self.place({}))


def ends(walked: Trace) -> dict[End, Fraction]:
    """What the tracer says, in the words of the exact walk."""
    if not walked.answers:
        end = walked.ending
        return {End(end.verdict, "", end.path, end.seen): Fraction(1)}
    found: Counter[End] = Counter()
    for answer in walked.answers:
        verdict, _, path, seen = answer.ending
        target = str(answer.target) if verdict is Verdict.FORWARDED else ""
        found[End(verdict, target, path, seen)] += answer.probability  # type: ignore[assignment]
    return dict(found)  # type: ignore[arg-type]


# ---- what must hold


def sample(world: World, seed: int, each: int = 2) -> list[Packet]:
    """Some packets of every fate and entry there is."""
    dice, found = random.Random(seed), drawn.questions(world)
    strata: dict[object, list[Packet]] = {}
    for packet in dice.sample(found, min(len(found), 150)):
        fate = oracle.expected(packet, world)
        strata.setdefault(
            (*sorted(v.value for v in fate.verdicts), fate.sticky, packet.entry), []
        ).append(packet)
    return [packet for alike in strata.values() for packet in alike[:each]]


def check(packet: Packet, world: World, found: Elements, node: Node) -> None:
    """All three say the same."""
    wanted = oracle.expected(packet, world)
    by_nft = trace.walk(packet, node.place(found))
    by_iptables = ends(trace.walk(packet, node.place(found, "iptables-nft")))
    walked = node.ends(packet)

    _check_shares(wanted, ends(by_nft), Fraction(0))
    _check_shares(wanted, by_iptables, Fraction(0))
    _check_shares(wanted, walked, len(wanted.shares) * ROUNDING)
    assert by_iptables.keys() == walked.keys()
    if wanted.sticky:
        assert pool(by_nft) == wanted.shares
    else:
        assert ends(by_nft) == by_iptables
    if packet.entry is Entry.OUTSIDE:
        own = CLUSTER.network(HERE).overlay_address(family_of(packet.source))
        seen = {end.seen for end in walked if _is_remote(end)}
        assert seen <= {packet.source if wanted.kept else own}


def _check_shares(
    wanted: oracle.Expected, found: Mapping[End, Fraction], tolerance: Fraction
) -> None:
    """`tolerance`: each of n rules adds what it is wrong by at most, whatever the others do."""
    verdicts = {end.verdict for end in found}
    assert sum(found.values()) == 1
    shares = {end.target: share for end, share in found.items() if end.target}
    open_ = {target: n for target, n in wanted.shares.items() if target not in wanted.closed}
    if wanted.sticky:
        assert len(verdicts) == 1
        assert verdicts <= wanted.verdicts
        assert shares.keys() <= open_.keys()
        assert list(shares.values()) in ([1], [] if wanted.closed else [1])
        return
    assert verdicts == wanted.verdicts
    assert shares.keys() == open_.keys()
    for target, share in open_.items():
        assert abs(shares[target] - share) <= tolerance, target


def pool(walked: Trace) -> dict[str, Fraction]:
    """Every backend's share of all clients."""
    shares: Counter[str] = Counter()
    for target, share in walked.pool:
        shares[str(target)] += share  # type: ignore[assignment]
    return dict(shares)  # type: ignore[arg-type]


def _is_remote(end: End) -> bool:
    host = end.target.rpartition(":")[0].strip("[]")
    return bool(host) and not contains(CLUSTER.network(HERE).subnet(family_of(host)), host)


@settings(FIXED, max_examples=80)
@given(world=drawn.worlds(), layout=LAYOUTS, seed=SEEDS)
def test_both_engines_do_what_the_records_mean(world: World, layout: Layout, seed: int) -> None:
    ((_, found),) = live(layout, world)
    node = Node.holding(layout, found)

    for packet in sample(world, seed):
        check(packet, world, found, node)


@settings(FIXED, max_examples=25)
@given(change=drawn.changes(), layout=LAYOUTS, seed=SEEDS)
def test_a_packet_during_a_change_meets_what_was_or_what_will_be(
    change: tuple[World, World], layout: Layout, seed: int
) -> None:
    before, after = change
    (_, held), (deltas, found) = live(layout, before, after)
    node, at_last = Node.holding(layout, held), Node.holding(layout, found)
    packets = [*sample(before, seed, 1), *sample(after, seed, 1)]
    allowed = [fates(each, before, node) | fates(each, after, at_last) for each in packets]

    for delta in deltas:
        for _ in node.take(delta):
            for packet, ends_allowed in zip(packets, allowed, strict=True):
                assert fates(packet, None, node) <= ends_allowed, packet

    for packet in packets:
        check(packet, after, found, node)


Fate = tuple[Verdict, str, bool]
"""What becomes of a packet, the backend, and whether that is itself and gets its answer."""


def fates(packet: Packet, world: World | None, node: Node) -> set[Fate]:
    """What may become of a packet.

    Where clients have a backend of their own, any of the service's, if the world is given: for one
    moment they are not told apart while the last backends leave.
    """
    found = {(end.verdict, end.target, end.path is Path.HAIRPIN) for end in node.ends(packet)}
    wanted = oracle.expected(packet, world) if world is not None else None
    if wanted is not None and wanted.sticky:
        itself = {target: target.rpartition(":")[0].strip("[]") for target in wanted.shares}
        found |= {(wanted.verdict, t, host == packet.source) for t, host in itself.items()
                  if t not in wanted.closed}  # fmt: skip
        found |= {(Verdict.REFUSED, "", False)} if wanted.closed else set()
    return found


# ---- that the check sees what is wrong

REPLICA: Final = Replica(2, 1, draining=False, unhealthy=False, families=FAMILIES)
WEB: Final = Service(
    1, vip=True, affinity=Affinity.NONE, source=Source.PRESERVE, prefer=Prefer.ANY, allow=(),
    limit=0, ports=(Port(80, Protocol.TCP, PublishMode.INGRESS, 30100),),
    replicas=(REPLICA, replace(REPLICA, node=3, weight=2)),
)  # fmt: skip
STICKY: Final = replace(WEB, affinity=Affinity.CLIENT_IP)
FRONTEND: Final = elements.PROTO_BYTES[Protocol.TCP] + elements.port_bytes(30100)
ASK: Final = Packet("203.0.113.9", "192.0.2.1", Protocol.TCP, 30100)


def _another_share(_found: Elements, node: Node) -> None:
    """One part in 100 million, of what ten digits can say."""
    chain = node.host.tables[Family.V4, "nat"]["MESH-P-00001"]
    chain[0] = xtables_rule.parse(chain[0].text.replace("0.3333333333", "0.3333333433"))


def _another_backend(found: Elements, _node: Node) -> None:
    one, other = (key for key in found if key[0] == "targets4" and key[1][4:5] in b"\0\1")
    found[one] = found[other]


def _no_limit(_found: Elements, node: Node) -> None:
    node.host.tables[Family.V4, "nat"]["MESH-P-00001"].pop(0)


@pytest.mark.parametrize(
    ("service", "break_it"),
    [
        (WEB, _another_share),
        (WEB, _another_backend),
        (replace(WEB, allow=("198.51.100.0/24",)), _no_limit),
    ],
)
def test_the_check_sees_what_is_wrong(
    service: Service, break_it: Callable[[Elements, Node], None]
) -> None:
    world = World((service,), frozenset())
    ((_, found),) = live(marks.DEFAULT, world)
    node = Node.holding(marks.DEFAULT, found)
    check(ASK, world, found, node)

    break_it(found, node)

    with pytest.raises(AssertionError):
        check(ASK, world, found, node)


@pytest.mark.parametrize("layout", layouts.ALL.values(), ids=layouts.ALL)
@pytest.mark.parametrize("weight", [1, 3, 40])
def test_clients_are_spread_over_the_chains_as_the_trace_says(weight: int, layout: Layout) -> None:
    replicas = (replace(REPLICA, weight=weight), *STICKY.replicas)
    world = World((replace(STICKY, replicas=replicas),), frozenset())
    ((_, found),) = live(layout, world)
    node = Node.holding(layout, found)
    told = trace.walk(ASK, node.place(found, "iptables-legacy"))

    mark = elements.mark_of(found["meshports4", FRONTEND]) & ~layout.slots
    drawn_by = (mark | n << layout.shift for n in range(1, xtables.DRAWS + 1))

    assert node.host.pool(Family.V4, drawn_by) == pool(told)

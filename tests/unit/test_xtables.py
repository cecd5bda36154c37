"""Pools as iptables chains: who is drawn how often, what is read back, and in which order."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest

from mesh.delta import Delta
from mesh.errors import ApplyFailed
from mesh.model.address import FAMILIES, Family
from mesh.model.publish import Protocol
from mesh.model.service import Affinity
from mesh.rules import elements, ipsets, marks, nft, xtables, xtables_intact
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.ids import Ids
from mesh.rules.xtables_image import Image
from tests.support import rules
from tests.support.layouts import ALL

if TYPE_CHECKING:
    from mesh.rules.elements import ElementKey, Elements
    from mesh.rules.marks import Layout
    from mesh.rules.xtables import Chains

_MARK = re.compile(r"-m connmark --mark 0x([0-9a-f]+)/0x([0-9a-f]+) ")
_ODDS = re.compile(r"--probability ([0-9.]+)")
_TARGET = re.compile(r"-(j DNAT --to-destination|g) (\S+)$")


def service(number: int, weights: dict[str, int], affinity: Affinity = Affinity.NONE) -> Forwarding:
    frontends = tuple(Frontend(Scope.INGRESS, None, p, 30000 + number) for p in Protocol)
    pool = tuple(Backend(address, 80, weight) for address, weight in weights.items())
    return Forwarding(f"service{number}", frontends, pool, affinity)


def lowered(*services: Forwarding, ids: Ids | None = None) -> Elements:
    ids = ids or Ids()
    return {k: v for each in services for k, v in nft.lower(each, ids).items()}


def holding(found: Elements, layout: Layout = marks.DEFAULT) -> Image:
    image = Image(layout)
    image.update(Delta(add=found))
    return image


def drawn(chains: Chains, mark: int) -> Counter[str]:
    """The chance of each destination for a flow with `mark`, by walking the chains."""
    chances: Counter[str] = Counter()
    left, chain = Fraction(1), "MESH-POOLS"
    rest = list(chains[chain])
    while rest and left:
        rule = rest.pop(0)
        match, target = _MARK.search(rule), _TARGET.search(rule)
        assert target is not None, rule
        if match and mark & int(match[2], 16) != int(match[1], 16):
            continue
        if target[1] == "g":
            rest = list(chains[target[2]])
            continue
        odds = _ODDS.search(rule)
        share = Fraction(odds[1]).limit_denominator(1023) if odds else Fraction(1)
        chances[target[2]] += left * share  # type: ignore[assignment]
        left -= left * share
    return chances


def mark_of(found: Elements) -> int:
    return elements.mark_of(next(v for (name, _), v in found.items() if name == "meshports4"))


@pytest.mark.parametrize(
    "weights",
    [
        {"10.0.1.2": 1},
        {"10.0.1.2": 1, "10.0.2.2": 1, "10.0.3.2": 1},
        {"10.0.1.2": 200, "10.0.2.2": 99},
        {f"10.0.1.{n}": n for n in range(1, 40)},
        {f"10.0.{n >> 8}.{n & 255}": 1 for n in range(1, 1024)},
    ],
    ids=["one", "equal", "weights", "many weights", "1023"],
)
def test_each_backend_is_drawn_exactly_as_often_as_its_weight(weights: dict[str, int]) -> None:
    found = lowered(service(1, weights))

    chances = drawn(holding(found).chains(Family.V4)["nat"], mark_of(found))

    total = sum(weights.values())
    assert chances == {f"{a}:80": Fraction(weight, total) for a, weight in weights.items()}


def test_a_flow_finds_the_pool_of_its_frontend_among_many() -> None:
    ids = Ids()
    services = [service(n, {f"10.0.{n >> 8}.{n & 255}": 1}) for n in range(1, 600)]
    image = holding(lowered(*services, ids=ids))
    chains = image.chains(Family.V4)["nat"]

    found = {
        n: drawn(chains, marks.DEFAULT.frontend(ids.of(f"service{n}"), 1)) for n in range(1, 600)
    }

    assert found == {n: {f"10.0.{n >> 8}.{n & 255}:80": 1} for n in range(1, 600)}
    assert max(map(len, chains)) <= 28
    assert max(len(rules) for rules in chains.values()) <= 16


@pytest.mark.parametrize("replicas", [1, 2, 5, 30])
def test_an_affine_client_has_one_backend_and_backends_even_shares(replicas: int) -> None:
    weights = {f"10.0.1.{n}": 1 for n in range(1, replicas + 1)}
    found = lowered(service(1, weights, Affinity.CLIENT_IP))
    chains = holding(found).chains(Family.V4)["nat"]
    mark = mark_of(found) & ~marks.MAX_SLOTS

    shares: Counter[str] = Counter()
    for draw in range(1, 1024):
        chances = drawn(chains, mark | draw)
        assert list(chances.values()) == [1]
        shares.update(chances.keys())

    slots = Counter(data for (name, _), data in found.items() if name == "targets4")
    for target, count in slots.items():
        share = count / sum(slots.values())
        there = f"{'.'.join(map(str, target[:4]))}:80"
        assert shares[there] / 1023 == pytest.approx(share, rel=0.15, abs=0.01)


def read_back(image: Image, layout: Layout = marks.DEFAULT) -> Elements:
    """What an image's chains hold when they are parsed as iptables-save would print them."""
    saved = {}
    for family in FAMILIES:
        dynamic = image.chains(family)
        saved[family] = {table: xtables.Saved(chains) for table, chains in dynamic.items()}
    held = image.elements()
    entries = [ipsets.create_list(name) for name in ipsets.sets_of(held, layout)]
    entries += [line for key, data in held.items() for line in _entry_lines(key, data, layout)]
    found, _ = ipsets.parse("\n".join(entries), layout)
    return Image.parse(saved, found, layout).elements()


def _entry_lines(key: ElementKey, data: bytes, layout: Layout) -> list[str]:
    kept = key[0] in ipsets.KEPT or key[0].startswith("allow")
    return ipsets.additions(key, data, layout) if kept else []


EACH_LAYOUT = pytest.mark.parametrize("layout", ALL.values(), ids=ALL)


@pytest.mark.parametrize("affinity", Affinity)
@pytest.mark.parametrize("replicas", [0, 1, 3, 40, 300])
@EACH_LAYOUT
def test_what_is_written_is_what_is_read(layout: Layout, affinity: Affinity, replicas: int) -> None:
    weights = {f"10.0.{n >> 8}.{n & 255}": 1 + n % 3 for n in range(1, replicas + 1)}
    found = lowered(service(1, weights, affinity), service(2, weights), ids=Ids(layout))

    assert read_back(holding(found, layout), layout) == found


@EACH_LAYOUT
def test_two_pools_of_one_id_are_told_apart_while_one_replaces_the_other(layout: Layout) -> None:
    ids = Ids(layout)
    old = lowered(service(1, {"10.0.1.2": 1, "10.0.1.3": 1}), ids=ids)
    new = lowered(service(1, {"10.0.1.4": 1}), ids=ids)
    image = holding({k: v for k, v in old.items() if k[0] in elements.TARGETS} | new, layout)
    chains = image.chains(Family.V4)["nat"]

    for hosts in (0, layout.foreign):
        assert drawn(chains, hosts | mark_of(old)) == {"10.0.1.2:80": 0.5, "10.0.1.3:80": 0.5}
        assert drawn(chains, hosts | mark_of(new)) == {"10.0.1.4:80": 1}
    assert read_back(image, layout) == image.elements()


@pytest.mark.parametrize(
    ("allow", "ranges"),
    [
        (("0.0.0.0/0", "::/0"), 2),
        (("128.0.0.0/1",), 8),
        (("198.51.100.0/24", "192.0.2.1/32"), 2),
    ],
    ids=["everybody", "half of them", "some"],
)
def test_allow_lists_read_back_as_written(allow: tuple[str, ...], ranges: int) -> None:
    port = Frontend(Scope.INGRESS, None, Protocol.TCP, 30001)
    limited = Forwarding("limited", (port,), (Backend("10.0.1.2", 80),), allow=allow)
    found = lowered(limited)

    assert read_back(holding(found)) == found
    assert sum(name.startswith("allow") for name, _ in found) == ranges


def test_a_range_that_is_no_prefix_is_refused() -> None:
    key = ("allow4", elements.mark_bytes(0x400 | 24) + bytes((10, 0, 0, 1)))

    with pytest.raises(ApplyFailed, match="not a prefix"):
        Image(marks.DEFAULT).check(Delta({}, {key: b""}))


def steps(before: Elements, after: Elements) -> list[str]:
    image = holding(before)
    delta = Delta.between(before, after)
    image.check(delta)
    stages = image.plan(image.effective(delta)).stages
    assert image.elements() == after
    return ["".join(step.text for step in stage) for stage in stages]


def test_a_pool_comes_before_its_frontends_and_goes_after_them() -> None:
    web = lowered(service(1, {"10.0.1.2": 1}))

    pool, frontends = steps({}, web)
    frontends_gone, pool_gone = steps(web, {})

    assert ":MESH-P-00001" in pool
    assert "add mesh-meshports4" in frontends
    assert "del mesh-meshports4" in frontends_gone
    assert "-X MESH-P-00001" in pool_gone


def test_a_replica_may_reach_itself_before_it_is_in_a_pool() -> None:
    web = lowered(service(1, {"10.0.1.2": 1})) | nft.lower_hairpins(["10.0.1.2"])

    hairpin, pool, _ = steps({}, web)
    *_, pool_gone, hairpin_gone = steps(web, {})

    assert "add mesh-hairpin4" in hairpin
    assert ":MESH-P-00001" in pool
    assert "del mesh-hairpin4" in hairpin_gone
    assert "-X MESH-P-00001" in pool_gone


def test_a_swapped_replica_is_one_chain_and_nothing_else() -> None:
    ids = Ids()
    many = [service(n, {"10.0.1.2": 1, "10.0.1.3": 1}) for n in range(1, 50)]
    before = lowered(*many, ids=ids)
    after = lowered(service(1, {"10.0.1.2": 1, "10.0.1.9": 1}), *many[1:], ids=ids)

    (change,) = steps(before, after)

    assert re.findall(r":(\S+)", change)[0] == "MESH-P-00001"
    assert change.count("- [0:0]") == 1
    assert change.count("COMMIT") == 1


def test_undoing_the_steps_gives_the_chains_there_were() -> None:
    ids = Ids()
    before = lowered(service(1, {"10.0.1.2": 1}), ids=ids)
    after = lowered(service(1, {"10.0.1.3": 1}), service(2, {"10.0.1.4": 1}), ids=ids)
    image = holding(before)
    forth = image.plan(image.effective(Delta.between(before, after))).stages
    back = image.plan(image.effective(Delta.between(after, before))).stages

    undone = [step.undo for stage in reversed(forth) for step in stage if step.undo]
    redone = [step.text for stage in back for step in stage if step.text]

    assert set("".join(undone).splitlines()) == set("".join(redone).splitlines())


def test_no_name_is_too_long_for_iptables_or_ipset() -> None:
    tables = [xtables.program(rules.PARAMETERS, family) for family in FAMILIES]
    chains = [chain for each in tables for table in each.values() for chain in table.chains]
    largest = marks.DEFAULT.frontend(marks.DEFAULT.ids.stop - 1, 1021, hashed=True, stays=True)

    assert max(map(len, chains)) <= 28
    assert len(f"MESH-H-{largest:x}-1f") <= 28
    assert (
        len(ipsets.allow_name(Family.V6, marks.DEFAULT.id_bits(marks.DEFAULT.ids.stop - 1))) <= 31
    )


def test_the_canary_tells_when_a_static_rule_was_changed() -> None:
    table = xtables.program(rules.PARAMETERS, Family.V4)["filter"]
    saved = xtables.Saved(dict(table.chains))
    changed = xtables.Saved(table.chains | {"MESH-NONE": table.chains["MESH-NONE"][1:]})

    assert xtables.witness(table, saved) != xtables.witness(table, changed)


def canaries(text: str) -> dict[str, xtables.Saved]:
    rules = (f"-m comment --comment {text}",)
    return {table: xtables.Saved({xtables.CANARY: rules}) for table in xtables.TABLES}


@EACH_LAYOUT
def test_a_canary_tells_of_its_layout(layout: Layout) -> None:
    program = xtables_intact.Program("1a2b3c4d", {}, layout)
    text = xtables_intact.told(program, xtables.Table({}, {}), xtables.Saved({}))

    assert xtables_intact.layout(canaries(text)) == layout
    assert xtables_intact.loaded(canaries(text)) == "1a2b3c4d"
    assert len(text) <= 255
    assert text.count(".") == (1 if layout == marks.DEFAULT else 3)


@pytest.mark.parametrize("text", ["", "x", "1.2.fff00000", "1.2.ff.ff", "1.2.x.y", "1.2.3.4.5"])
def test_a_canary_that_somebody_else_wrote_tells_nothing(text: str) -> None:
    assert xtables_intact.layout(canaries(text)) is None
    assert xtables_intact.layout({}) is None


def test_chains_of_another_layout_are_another_program() -> None:
    found = {
        xtables.version(xtables.program(replace(rules.PARAMETERS, layout=layout), family))
        for layout in ALL.values()
        for family in FAMILIES
    }

    assert len(found) == len(ALL) * len(FAMILIES)

"""Layouts of marks: what is where, what can be no layout, and marks of one in those of another."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mesh.agent import config
from mesh.dataplane import foreign
from mesh.dataplane.foreign import RoutingRule
from mesh.delta import Delta
from mesh.errors import ApplyFailed, BadUsage, HostNotReady
from mesh.model.address import Family
from mesh.model.cluster import NODE_NUMBERS
from mesh.model.publish import Protocol
from mesh.model.service import Affinity, Source
from mesh.rules import elements, marks, nft
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.ids import Ids
from mesh.rules.marks import Layout, Mark
from mesh.rules.remark import Remark
from mesh.wg import conf
from tests.support import rules
from tests.support.layouts import ALL, HIGH, LOW, layouts

if TYPE_CHECKING:
    from pathlib import Path

NUMBERS = st.sampled_from(NODE_NUMBERS)


@st.composite
def frontends(draw: st.DrawFn, layout: Layout) -> Mark:
    return Mark(
        draw(st.sampled_from(layout.ids)),
        draw(st.integers(0, marks.MAX_SLOTS)),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def written(layout: Layout, mark: Mark) -> int:
    return layout.frontend(*mark)


# ---- what is where


def test_the_default_is_what_other_tools_are_told() -> None:
    default = marks.DEFAULT

    assert (default.packet_mark, default.ct_mark) == (0xFFF00000, 0xFFFFFFFF)
    assert (default.ours, default.via, default.hash, default.stay) == (
        0x10000, 0x20000, 0x40000, 0x80000,
    )  # fmt: skip
    assert (default.slots, default.id, default.ids) == (0x3FF, 0xFFF0FC00, range(1, 1 << 18))
    assert (default.size, default.flows, default.plain) == (0x403FF, 0xFFF3FC00, 0x90000)
    assert default.frontend(0x12345, 3, hashed=True) == 0x12345 >> 6 << 20 | 5 << 10 | 0x50003
    assert default.arrival(7) == 0x730000
    assert default.foreign == 0


@given(layouts())
def test_every_bit_has_one_meaning_and_flags_are_outside_the_field(layout: Layout) -> None:
    flags = (layout.ours, layout.via, layout.hash, layout.stay)
    parts = (*flags, layout.slots, layout.id)

    assert sum(parts) == reduce(or_, parts) == layout.ct_mark
    assert all(flag.bit_count() == 1 and not flag & layout.packet_mark for flag in flags)
    assert layout.slots == marks.MAX_SLOTS << layout.shift
    assert len(layout.ids) + 1 == 1 << layout.id.bit_count() >= 1 << 12


@given(st.data(), layouts())
def test_a_frontends_mark_reads_back_as_written(data: st.DataObject, layout: Layout) -> None:
    mark = data.draw(frontends(layout))

    value = written(layout, mark)

    assert layout.parse(value) == mark
    assert (layout.id_of(value), layout.slots_of(value)) == (mark.id, mark.slots)
    assert layout.id_bits(mark.id) == value & layout.id
    assert value & (layout.ours | layout.via | layout.foreign) == layout.ours


@given(st.data(), layouts())
def test_no_two_frontends_share_their_bits(data: st.DataObject, layout: Layout) -> None:
    one, other = data.draw(frontends(layout)), data.draw(frontends(layout))
    assume(one.id != other.id)

    assert written(layout, one) & layout.flows != written(layout, other) & layout.flows


@given(layouts(), NUMBERS)
def test_a_node_is_told_by_the_field(layout: Layout, number: int) -> None:
    mark = layout.arrival(number)

    assert (mark & layout.packet_mark) >> layout.node_shift == number
    assert mark & layout.packet_mark not in (0, layout.packet_mark)  # nobody, and steered
    assert mark & ~layout.packet_mark == layout.ours | layout.via


@given(layouts())
def test_each_bit_of_the_host_has_a_place_to_wait(layout: Layout) -> None:
    waiting = layout.waiting()

    assert sum(waiting) == layout.foreign
    assert len(set(waiting.values())) == len(waiting)
    assert all(place & layout.packet_mark == place for place in waiting.values())


# ---- what can be none


@pytest.mark.parametrize(
    ("packet_mark", "ct_mark", "words"),
    [
        (0xFF000000, 0xFFFFFFFF, "packet_mark 0xff000000 has 8 bits: it must be 12 in a row"),
        (0xFFFF0000, 0xFFFFFFFF, "packet_mark 0xffff0000 has 16 bits"),
        (0xFF00F000, 0xFFFFFFFF, "packet_mark 0xff00f000 has gaps"),
        (0xFFF000000, 0xFFFFFFFF, "packet_mark 0xfff000000 is not a mask of 32 bits"),
        (0xFFF00000, -1, "ct_mark -0x1 is not a mask"),
        (0xFFF00000, 0x7FFFFFFF, "0xfff00000 is not within ct_mark 0x7fffffff"),
        (0xFFF00000, 0xFFF01FFF, "ct_mark 0xfff01fff has 25 bits: 26 are needed"),
        (0xFFF00000, 0, "ct_mark 0x00000000 has 0 bits"),
    ],
)
def test_fields_that_cannot_hold_what_they_must_are_refused_in_one_line(
    tmp_path: Path, packet_mark: int, ct_mark: int, words: str
) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f'node = "n1"\n[marks]\npacket_mark = {packet_mark}\nct_mark = {ct_mark}\n')

    with pytest.raises(BadUsage) as refusal:
        config.load(path)

    assert words in str(refusal.value)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


def test_the_configuration_says_the_fields_in_hexadecimal(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    chosen = config.MarksConfig(packet_mark=HIGH.packet_mark, ct_mark=HIGH.ct_mark)
    given = config.AgentConfig(node="n1", marks=chosen, loopback_ports=True)

    path.write_text(config.dump(given))

    assert "packet_mark = 0x000fff00\nct_mark = 0x0fffffff\n" in path.read_text()
    assert config.load(path) == given
    assert config.load(path).marks.layout == HIGH
    assert config.AgentConfig(node="n1").marks.layout == marks.DEFAULT


def test_a_smaller_ct_mark_is_named_when_its_ids_run_out() -> None:
    ids = Ids(replace(HIGH, ids=range(1, 2)))
    ids.of("a")

    with pytest.raises(ApplyFailed, match=r"b: all 1 frontend ids .* ct_mark \(0x0fffffff\)"):
        ids.of("b")


# ---- what else marks packets on the host


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (
            RoutingRule(Family.V4, 100, 0x100000, 0x100000),
            "IPv4 rule 100 (fwmark 0x100000/0x100000)",
        ),
        (RoutingRule(Family.V4, 9, 0x80000000, 0xFFFFFFFF), "IPv4 rule 9 (fwmark 0x80000000)"),
    ],
)
def test_a_rule_about_bits_of_the_field_is_named(rule: RoutingRule, words: str) -> None:
    tailscale = RoutingRule(Family.V4, 5210, 0x80000, 0xFF0000)  # also wants a bit that is not ours
    everything = RoutingRule(Family.V6, 5270, 0, 0xFF000000)  # matches what has no mark at all

    with pytest.raises(HostNotReady) as refusal:
        foreign.check_marks(marks.DEFAULT, [tailscale, everything, rule], {})

    assert f"packet_mark 0xfff00000 overlaps {words}" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    foreign.check_marks(Layout.of(0xFFF0, 0xFFFFFFFF), [tailscale, everything, rule], {})


def test_a_tunnel_that_marks_its_packets_is_named_where_it_uses_the_field() -> None:
    used = conf.parse_fwmarks("wg0\toff\nwg1\t0xca6c\n")
    quick = RoutingRule(Family.V4, 32764, 0xCA6C, 0xFFFFFFFF)  # what wg-quick(8) writes

    foreign.check_marks(marks.DEFAULT, [quick], used)
    with pytest.raises(HostNotReady, match=r"WireGuard device wg1 \(fwmark 0xca6c\)"):
        foreign.check_marks(HIGH, [], used)


# ---- from one layout to another


@given(st.data(), layouts(), layouts())
def test_a_flow_means_the_same_in_another_layout(
    data: st.DataObject, old: Layout, new: Layout
) -> None:
    mark = data.draw(frontends(old))
    remark = Remark({}, old, new)

    became = remark.mark(written(old, mark) | data.draw(st.integers(0, 2**32 - 1)) & old.foreign)

    assert new.parse(became) == mark._replace(id=mark.id if mark.id in new.ids else 0)
    assert became & (new.ours | new.via | new.foreign) == new.ours
    assert became & ~remark.mask == 0


@given(layouts(), layouts(), NUMBERS)
def test_other_flows_of_ours_mean_the_same_too(old: Layout, new: Layout, number: int) -> None:
    remark = Remark({}, old, new)

    assert remark.mark(old.arrival(number)) == new.arrival(number)
    assert remark.mark(old.plain) == new.plain


def some(ids: Ids) -> elements.Elements:
    """Elements of every set that has marks in it."""
    found = nft.lower_peer(rules.CLUSTER.network(2), ids.layout) | nft.lower_nodes(["192.0.2.1"])
    for number in range(3):
        port = Frontend(Scope.INGRESS, None, Protocol.TCP, 8080 + number)
        vip = Frontend(Scope.VIP, f"fd00::{number}", Protocol.UDP, 80)
        pool = (Backend("10.0.1.2", 80), Backend("fd00:1::2", 80), Backend("10.0.1.3", 80))
        affinity = Affinity.CLIENT_IP if number == 1 else Affinity.NONE
        source = Source.MASQUERADE if number == 2 else Source.PRESERVE
        allow = ("192.0.2.0/24", "2001:db8::/32")
        found |= nft.lower(
            Forwarding(f"s{number}", (port, vip), pool, affinity, source=source, allow=allow), ids
        )
    return found


@pytest.mark.parametrize("new", ALL.values(), ids=ALL)
@pytest.mark.parametrize("old", ALL.values(), ids=ALL)
def test_elements_are_as_if_they_were_made_in_the_other_layout(old: Layout, new: Layout) -> None:
    held, wanted = some(Ids(old)), some(Ids(new))

    assert Delta.between(Remark(held, old, new).elements(held), wanted) == Delta()


def test_ids_that_do_not_fit_get_others_that_are_free() -> None:
    ids = Ids(marks.DEFAULT)
    big = [LOW.ids.stop, LOW.ids.stop + 5, marks.DEFAULT.ids.stop - 1]
    for name, number in zip(("s0", "s1", "s2"), big, strict=True):
        assert ids.adopt(name, number)
    one = Frontend(Scope.NODE, None, Protocol.TCP, 22)
    taken = Ids(marks.DEFAULT)
    held = some(ids) | nft.lower(Forwarding("one", (one,), ()), taken)

    remark = Remark(held, marks.DEFAULT, LOW)
    became = [remark.number(number) for number in big]

    assert remark.number(taken.of("one")) == 1
    assert len({1, *became}) == 4
    assert all(number in LOW.ids for number in became)
    assert len(remark.elements(held)) == len(held)
    assert remark.number(LOW.ids.stop + 1) == 0


def test_elements_of_ids_for_which_there_is_no_room_are_left_out() -> None:
    small = replace(LOW, ids=range(1, 3))
    held = some(Ids(marks.DEFAULT))

    found = Remark(held, marks.DEFAULT, small).elements(held)

    assert {name for name, _ in held} == {name for name, _ in found}
    assert {small.id_of(elements.mark_of(d)) for (n, _), d in found.items() if n == "vips6"} == {
        1,
        2,
    }

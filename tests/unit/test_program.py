"""The program's text: every word filled in, both families served, recognisable when loaded."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given

from mesh.model.address import FAMILIES, Family
from mesh.model.cluster import Cluster
from mesh.rules import elements, marks, program
from mesh.rules.program import Devices, Parameters
from tests.support.layouts import ALL, layouts

if TYPE_CHECKING:
    from mesh.rules.marks import Layout

CLUSTER = Cluster(id="test", prefix6="fd00:1:2::/48", steering_port=4799)
DEVICES = Devices("over", "steer", "bridge", "02:00:00:00:00:01")
PARAMETERS = Parameters.of(CLUSTER, 3, DEVICES)


def lines(parameters: Parameters = PARAMETERS) -> list[str]:
    return [line.strip() for line in program.render(parameters).splitlines()]


@pytest.mark.parametrize("layout", ALL.values(), ids=ALL)
def test_every_word_is_filled_in(layout: Layout) -> None:
    text = program.render(replace(PARAMETERS, layout=layout))

    assert "$" not in text
    assert "#" not in text
    assert "?" not in text


def test_a_program_of_another_layout_is_another_one_whose_elements_cannot_stay() -> None:
    built = [program.build(replace(PARAMETERS, layout=layout)) for layout in ALL.values()]

    assert len({each.schema for each in built}) == len(ALL)
    assert len({each.version for each in built}) == len(ALL)
    assert len({each.bridge for each in built}) == 1


@given(layouts())
def test_only_bits_of_the_mesh_are_written(layout: Layout) -> None:
    inet = program.build(replace(PARAMETERS, layout=layout)).inet

    joined = re.findall(r"(ct|meta) mark set \1 mark \| (0x[0-9a-f]+)", inet)
    ours = {"ct": 0xFFFFFFFF, "meta": layout.packet_mark}
    assert joined
    assert all(int(bits, 16) & ~ours[mark] == 0 for mark, bits in joined)
    cleared = re.findall(r"meta mark set meta mark & (0x[0-9a-f]+)", inet)
    kept = {layout.packet_mark, 0xFFFFFFFF & ~layout.packet_mark}
    assert {int(bits, 16) for bits in cleared} == kept


def test_the_set_declarations_are_those_that_elements_are_made_for() -> None:
    declared = set(re.findall(r"^ (?:set|map) (\w+)", program.render(PARAMETERS), re.MULTILINE))

    assert declared >= set(elements.SETS)


def test_every_chain_that_is_jumped_to_exists() -> None:
    built = program.build(PARAMETERS)

    aims = set(re.findall(r"(?:jump|goto) (\w+)", built.inet))

    assert aims <= built.chains


def test_both_families_are_served_alike() -> None:
    text = program.build(PARAMETERS).inet

    def rules(family: str, other: str) -> int:
        asked = re.findall(rf"@(?!allow|grants)\w+{family}\b", text)
        return len(asked) - text.count(f"@nodes{family} notrack")

    # The tunnel's outer packets are IPv4 alone: two rules ask nodes4 about them.
    assert rules("4", "6") == rules("6", "4") + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_ranges_are_looked_up_once_per_length(family: Family) -> None:
    text = program.build(PARAMETERS).inet

    lengths = re.findall(rf"\| 0x(\w+)\) .* @allow{family.suffix} ", text)

    assert [int(length, 16) for length in lengths] == list(elements.PREFIX_LENGTHS[family])


def test_every_prefix_of_the_mesh_is_guarded() -> None:
    apart = Cluster(
        id="x", prefix6="fd00::/48", overlay4="100.64.0.0/24", containers4="172.20.0.0/16"
    )

    found = lines(Parameters.of(apart, 1, DEVICES))

    for prefix in ("100.64.0.0/24", "172.20.0.0/16", "10.1.0.0/16"):
        assert f"ip saddr {prefix} counter drop" in found
        assert f"ip daddr {prefix} return" in found
    guard = next(line for line in found if " ip saddr != 1" in line)
    assert guard.count("saddr != ") == 3
    assert "ip daddr 10.1.0.0/16 goto stray" in found


def test_the_node_knows_its_own_addresses() -> None:
    found = lines()

    assert "add element inet mesh own4 { 10.0.0.3, 10.0.3.0/24 }" in found
    assert "add element inet mesh own6 { fd00:1:2::3, fd00:1:2:3::/64 }" in found
    assert 'udp dport 4799 iifname != { "lo", "over" } counter drop' in found


def test_ports_do_not_answer_on_any_closed_address() -> None:
    found = lines(replace(PARAMETERS, closed=((), ("::1", "fd00:9::/64"))))

    assert not any(line.startswith("ip daddr 127") and "return" in line for line in found)
    for prefix in ("::1", "fd00:9::/64"):
        assert f"ip6 daddr {prefix} return" in found
        assert f"ip6 daddr {prefix} accept" in found


def test_other_contents_are_another_version_of_the_same_schema() -> None:
    one = program.build(PARAMETERS)
    other = program.build(replace(PARAMETERS, closed=((), ("::1",))))

    assert one == program.build(PARAMETERS)
    assert one.version != other.version
    assert one.schema == other.schema


@pytest.mark.parametrize("name", ['a"b', "a b", "", "sixteen-letters-", "a*", "a/b", "$x"])
def test_a_device_name_that_nft_might_misread_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="interface name"):
        Parameters.of(CLUSTER, 1, Devices("over", name, "bridge", "02:00:00:00:00:01"))


def test_a_bridge_without_a_mac_address_is_refused() -> None:
    with pytest.raises(ValueError, match="MAC address"):
        Parameters.of(CLUSTER, 1, Devices("over", "steer", "bridge", "aa"))


def test_a_size_draws_among_as_many_slots_and_is_dispatched_to() -> None:
    text = program.size_chains([300, marks.DEFAULT.hash | 251, 0], marks.DEFAULT)

    assert len(re.findall(r"numgen random mod 300 map @targets[46]$", text, re.MULTILINE)) == 6
    assert len(re.findall(r"jhash ip6? saddr mod 251 seed", text)) == 6
    assert "0x12c : jump random_300" in text
    assert "0x400fb : jump hash_251" in text
    assert "refuse" not in text


def test_no_sizes_are_no_text() -> None:
    assert program.size_chains([0], marks.DEFAULT) == ""
    assert program.size_chains([], marks.DEFAULT) == ""

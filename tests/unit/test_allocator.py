"""Which number a newcomer gets."""

from __future__ import annotations

import pytest

from mesh.model import spans
from mesh.model.address import Family
from mesh.model.cluster import Cluster
from mesh.vip import allocator

CLUSTER = Cluster(id="c", prefix6="fd00:1::/48", vips4="10.1.0.0/29", overlay4="10.0.0.0/29")


def test_next_fit_goes_on_where_the_last_choice_ended() -> None:
    assert spans.next_fit({1, 4}.__contains__, range(1, 7), 3) == 3
    assert spans.next_fit({1, 4}.__contains__, range(1, 7), 4) == 5


def test_next_fit_starts_over_at_the_end() -> None:
    assert spans.next_fit({1, 6}.__contains__, range(1, 7), 6) == 2
    assert spans.next_fit({1}.__contains__, range(1, 7), 7) == 2


def test_a_cursor_outside_the_pool_means_its_start() -> None:
    assert spans.next_fit(set[int]().__contains__, range(5, 7), 99) == 5
    assert spans.next_fit({5, 6}.__contains__, range(5, 7), 99) is None


def test_a_full_pool_gives_nothing() -> None:
    assert spans.next_fit(set(range(1, 7)).__contains__, range(1, 7), 3) is None


def test_vips_leave_out_the_network_and_the_broadcast_address() -> None:
    assert allocator.vip_indexes(CLUSTER) == range(1, 7)


def test_one_index_is_an_address_in_each_family() -> None:
    assert allocator.vip_addresses(CLUSTER, 6) == ("10.1.0.6", "fd00:1:0:f000::6")


@pytest.mark.parametrize("vip", ["10.1.0.6", "fd00:1:0:f000::6"])
def test_an_explicit_vip_has_an_index_in_either_family(vip: str) -> None:
    assert allocator.vip_index(CLUSTER, vip) == 6


@pytest.mark.parametrize(
    "vip", ["10.1.0.0", "10.1.0.7", "10.2.0.1", "9.9.9.9", "fd00:1:0:f000::7", "fd00:2::1"]
)
def test_an_explicit_vip_outside_the_range_is_refused(vip: str) -> None:
    with pytest.raises(ValueError, match="VIP range"):
        allocator.vip_index(CLUSTER, vip)


def test_every_address_of_a_pool_lies_in_its_range() -> None:
    first, last = (
        {allocator.vip_addresses(CLUSTER, i)[0] for i in allocator.vip_indexes(CLUSTER)}
        for _ in range(2)
    )

    assert first == last == {f"10.1.0.{i}" for i in range(1, 7)}
    assert CLUSTER.vips(Family.V4) == "10.1.0.0/29"


def test_node_numbers_are_as_many_as_the_cluster_has_room_for() -> None:
    assert allocator.node_numbers(CLUSTER) == range(1, 7)


def test_dynamic_ports_include_both_ends_of_the_range() -> None:
    cluster = Cluster(id="c", prefix6="fd00:1::/48", ingress_ports=(30000, 30002))

    assert list(allocator.dynamic_ports(cluster)) == [30000, 30001, 30002]

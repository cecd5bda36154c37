"""From a forwarding to elements: frontends, pools, slots, marks, ids and allow lists."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ApplyFailed
from mesh.model.address import FAMILIES, packed
from mesh.model.cluster import Cluster
from mesh.model.publish import Protocol
from mesh.model.service import Affinity, AffinityPrefix, Source
from mesh.rules import elements, marks, nft, slots
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.ids import Ids
from mesh.rules.marks import Mark

TCP, UDP = Protocol.TCP, Protocol.UDP
VIP4 = Frontend(Scope.VIP, "10.1.0.1", TCP, 80)
VIP6 = Frontend(Scope.VIP, "fd00:0:0:f000::1", TCP, 80)
INGRESS = Frontend(Scope.INGRESS, None, TCP, 30000)


def backends(*names: str, port: int = 8080) -> tuple[Backend, ...]:
    return tuple(Backend(name, port) for name in names)


def shown(forwarding: Forwarding) -> set[str]:
    return {elements.describe(key, data) for key, data in nft.lower(forwarding, Ids()).items()}


def pool_mark(forwarding: Forwarding, frontend: str = "meshports4") -> Mark:
    found = nft.lower(forwarding, Ids())
    return next(
        marks.DEFAULT.parse(elements.mark_of(data))
        for (name, _), data in found.items()
        if name == frontend
    )


def test_a_service_becomes_a_frontend_per_address_and_one_pool_per_family() -> None:
    forwarding = Forwarding(
        "web/80/tcp", (VIP4, VIP6, INGRESS), backends("10.0.1.2", "10.0.2.2", "fd00:0:0:1::2")
    )

    assert shown(forwarding) == {
        "vips4 { 10.1.0.1 . tcp . 80 : 0x10402 }",
        "vips6 { fd00:0:0:f000::1 . tcp . 80 : 0x10401 }",
        "meshports4 { tcp . 30000 : 0x10402 }",
        "meshports6 { tcp . 30000 : 0x10401 }",
        "known4 { 10.1.0.1 }",
        "known6 { fd00:0:0:f000::1 }",
        "targets4 { 0x10402 . 0 : 10.0.1.2 . 8080 }",
        "targets4 { 0x10402 . 1 : 10.0.2.2 . 8080 }",
        "targets6 { 0x10401 . 0 : fd00:0:0:1::2 . 8080 }",
    }


@pytest.mark.parametrize(
    ("frontend", "element"),
    [
        (Frontend(Scope.NODE, None, UDP, 53), "ports4 { udp . 53 : 0x10401 }"),
        (
            Frontend(Scope.HOST_IP, "192.0.2.1", TCP, 443),
            "hostips4 { 192.0.2.1 . tcp . 443 : 0x10401 }",
        ),
    ],
)
def test_host_mode_is_the_same_pool_behind_another_map(frontend: Frontend, element: str) -> None:
    assert element in shown(Forwarding("web", (frontend,), backends("10.0.1.2")))


def test_a_host_address_is_not_known_as_a_vip() -> None:
    frontend = Frontend(Scope.HOST_IP, "192.0.2.1", TCP, 443)

    assert not any(
        element.startswith("known") for element in shown(Forwarding("web", (frontend,), ()))
    )


def test_no_backend_is_a_frontend_that_refuses() -> None:
    assert shown(Forwarding("web", (INGRESS,), ())) == {
        "meshports4 { tcp . 30000 : 0x10400 }",
        "meshports6 { tcp . 30000 : 0x10400 }",
    }


def test_an_affine_pool_without_backends_refuses_too() -> None:
    forwarding = Forwarding("web", (INGRESS,), (), affinity=Affinity.CLIENT_IP)

    assert pool_mark(forwarding) == Mark(id=1, slots=0)


def test_a_masqueraded_service_never_leaves_through_the_steering_device() -> None:
    forwarding = Forwarding("web", (INGRESS,), backends("10.0.1.2"), source=Source.MASQUERADE)

    assert pool_mark(forwarding).stays
    assert not pool_mark(Forwarding("web", (INGRESS,), backends("10.0.1.2"))).stays


def test_an_allow_list_is_collapsed_and_hashed_by_length() -> None:
    allow = ("10.0.0.0/9", "10.128.0.0/9", "192.0.2.7/32", "2001:db8::/32")

    found = shown(Forwarding("web", (INGRESS,), backends("10.0.1.2"), allow=allow))

    assert {e for e in found if e.startswith(("allow", "limited"))} == {
        "limited { 0x400 }",
        "allow4 { 0x408 . 10.0.0.0 }",
        "allow4 { 0x420 . 192.0.2.7 }",
        "allow6 { 0x420 . 2001:db8:: }",
    }


def test_an_allow_list_survives_a_change_of_the_pool() -> None:
    table = Ids()

    def listed(*replicas: str) -> set[elements.ElementKey]:
        forwarding = Forwarding("web", (INGRESS,), backends(*replicas), allow=("192.0.2.0/24",))
        return {
            key for key in nft.lower(forwarding, table) if key[0] in ("limited", "allow4", "allow6")
        }

    assert listed("10.0.1.2") == listed("10.0.1.2", "10.0.1.3")


def test_a_peer_is_known_by_the_address_of_its_steering_device() -> None:
    network = Cluster(id="x", prefix6="fd00::/48").network(2)

    found = {elements.describe(*item) for item in nft.lower_peer(network, marks.DEFAULT).items()}

    assert found == {
        "via { 02:4d:45:53:00:02 : 0x230000 }",
        "zones { 02:4d:45:53:00:02 : 2 }",
    }


def test_nodes_and_hairpins_are_sorted_by_family() -> None:
    found = nft.lower_nodes(["192.0.2.1", "fd00::1"]) | nft.lower_hairpins(["10.0.1.2"])

    assert found == {
        ("nodes4", packed("192.0.2.1")): b"",
        ("nodes6", packed("fd00::1")): b"",
        ("hairpin4", packed("10.0.1.2") * 2): b"",
    }


def test_the_sizes_of_a_change_are_those_its_frontends_dispatch_on() -> None:
    table = Ids()
    plain = Forwarding("a", (INGRESS,), backends("10.0.1.2", "10.0.1.3"))
    affine = Forwarding("b", (VIP4,), backends("10.0.1.2", "10.0.1.3"), affinity=Affinity.CLIENT_IP)

    found = nft.lower(plain, table) | nft.lower(affine, table)
    assert nft.sizes(found, marks.DEFAULT) == {0, 2, marks.DEFAULT.hash | slots.HASH_SIZES[0]}


# ---- slots


def pool(*weights: int) -> list[Backend]:
    return [Backend(f"10.0.{i >> 8}.{i & 255}", 80, w) for i, w in enumerate(weights)]


def shares(chosen: list[Backend]) -> dict[str, int]:
    return dict(Counter(backend.address for backend in chosen))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 1, 1), [1, 1, 1]),
        ((5, 5), [1, 1]),
        ((3, 1), [3, 1]),
        ((6, 4), [3, 2]),
        ((2, 0), [1]),
        ((0, 0), []),
        ((), []),
    ],
)
def test_weights_are_exact_in_the_fewest_slots(
    weights: tuple[int, ...], expected: list[int]
) -> None:
    assert list(shares(slots.weighted(pool(*weights))).values()) == expected


@given(st.lists(st.integers(0, 255), max_size=40))
def test_every_backend_of_positive_weight_gets_a_slot_within_the_limit(weights: list[int]) -> None:
    backends_ = pool(*weights)

    chosen = slots.weighted(backends_)

    assert {b.address for b in chosen} == {b.address for b in backends_ if b.weight}
    assert len(chosen) <= marks.MAX_SLOTS


def test_more_backends_than_slots_still_fit() -> None:
    assert len(slots.weighted(pool(*[1] * 1500))) == marks.MAX_SLOTS
    assert len(slots.hashed(pool(*[1] * 1500))) == slots.HASH_SIZES[-1]


@given(st.permutations(range(8)))
def test_the_order_of_tasks_does_not_matter(order: list[int]) -> None:
    backends_ = pool(*[1 + i % 3 for i in range(8)])
    shuffled = [backends_[i] for i in order]

    assert slots.weighted(shuffled) == slots.weighted(backends_)
    assert slots.hashed(shuffled) == slots.hashed(backends_)


@pytest.mark.parametrize("count", [2, 4, 12, 40])
def test_losing_a_backend_moves_only_its_own_clients(count: int) -> None:
    before = pool(*[1] * count)
    lost = before[count // 2]
    after = [backend for backend in before if backend != lost]

    first, second = slots.hashed(before), slots.hashed(after)

    assert len(first) == len(second)
    assert all(a == b for a, b in zip(first, second, strict=True) if a != lost)
    assert lost not in second


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        (AffinityPrefix(), (251, 251)),
        (AffinityPrefix(ipv4=24, ipv6=64), (243, 235)),
        (AffinityPrefix(ipv4=1, ipv6=4), (220, 220)),
    ],
)
def test_the_number_of_slots_tells_how_much_of_an_address_counts(
    prefix: AffinityPrefix, expected: tuple[int, int]
) -> None:
    web = Forwarding(
        "web", (INGRESS,), backends("10.0.1.2", "fd00::2"), Affinity.CLIENT_IP, prefix=prefix
    )

    found = nft.lower(web, Ids())
    counts = tuple(sum(name == f"targets{f.suffix}" for name, _ in found) for f in FAMILIES)
    lengths = [slots.prefix_length(n, f) for n, f in zip(counts, FAMILIES, strict=True)]

    assert counts == expected
    assert lengths == [prefix.ipv4, prefix.ipv6]


def test_affine_slots_follow_the_weights() -> None:
    found = shares(slots.hashed(pool(3, 1)))

    heavy = found["10.0.0.0"] / sum(found.values())

    assert heavy == pytest.approx(0.75, abs=0.08)


# ---- ids


def test_a_pool_keeps_its_id_and_a_freed_one_rests() -> None:
    table = Ids()
    first = table.of("a")
    second = table.of("b")

    table.release("a")
    third = table.of("c")

    assert table.of("b") == second
    assert len({first, second, third}) == 3


def test_ids_of_a_former_agent_are_adopted_once() -> None:
    table = Ids()

    assert table.adopt("a", 7)
    assert not table.adopt("b", 7)
    assert not table.adopt("a", 8)
    assert not table.adopt("c", 0)
    assert table.of("a") == 7
    assert table.of("b") == 8


def test_a_restarted_agent_finds_nothing_to_write() -> None:
    one, other = (
        Forwarding("one", (VIP4, VIP6), backends("10.0.1.2")),
        Forwarding("other", (INGRESS,), backends("10.0.1.2", "10.0.1.3")),
    )
    before = Ids()
    before.of("removed since")
    actual = nft.lower(one, before) | nft.lower(other, before)

    after = Ids()
    nft.adopt([other, one], actual, after)

    assert nft.lower(one, after) | nft.lower(other, after) == actual


def test_an_exhausted_table_of_ids_says_so() -> None:
    table = Ids(replace(marks.DEFAULT, ids=range(1, 3)))
    table.of("a")
    table.of("b")

    with pytest.raises(ApplyFailed, match="c: all 2 frontend ids"):
        table.of("c")

    table.release("a")
    assert table.of("c") == 1

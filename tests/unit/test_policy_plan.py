"""What policies and the labels of tasks come to on a node."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.model.policy import labels_of
from mesh.model.publish import Protocol
from mesh.policy.plan import Labelled, plan
from mesh.rules import elements, guards
from mesh.rules.guards import Numbers
from mesh.store import schema

if TYPE_CHECKING:
    from mesh.model.policy import NetworkPolicy

WEB = Labelled("n1", ("10.0.1.2", "fd00::2"), {"service": "web", "tier": "front"})
API = Labelled("n1", ("10.0.1.3",), {"service": "api"})
FAR = Labelled("n2", ("10.0.2.4",), {"service": "web"})


def policy(name: str, select: str = "{}", ingress: str = "[]") -> NetworkPolicy:
    text = f'{{"name": "{name}", "podSelector": {select}, "ingress": {ingress}}}'
    return schema.parse_policy(f"/mesh/policies/{name}", text.encode())


def test_only_replicas_of_the_node_are_guarded() -> None:
    found = plan([policy("all")], [WEB, API, FAR], "n1")

    assert [guard.addresses for guard in found.guards] == [("10.0.1.2", "10.0.1.3", "fd00::2")]


def test_without_policies_there_is_nothing() -> None:
    assert plan([], [WEB], "n1") == guards.Guards()


def test_replicas_with_the_same_policies_share_a_guard() -> None:
    web = policy("web", '{"matchLabels": {"service": "web"}}')

    found = plan([policy("all"), web], [WEB, API, FAR], "n1")

    told = {guard.key: guard.addresses for guard in found.guards}
    assert told == {"guard all": ("10.0.1.3",), "guard all+web": ("10.0.1.2", "fd00::2")}


def test_a_rule_lets_in_the_tasks_of_all_nodes() -> None:
    rule = '[{"from": [{"podSelector": {"matchLabels": {"service": "web"}}}]}]'

    found = plan([policy("p", ingress=rule)], [WEB, API, FAR], "n1")

    assert [grant.hosts for grant in found.grants] == [("10.0.1.2", "10.0.2.4", "fd00::2")]


def test_a_block_lets_in_less_its_exceptions() -> None:
    block = '{"cidr": "10.0.0.0/8", "except": ["10.0.0.0/9", "10.192.0.0/10"]}'
    rule = f'[{{"from": [{{"ipBlock": {block}}}]}}]'

    found = plan([policy("p", ingress=rule)], [WEB], "n1")

    assert [grant.prefixes for grant in found.grants] == [("10.128.0.0/10",)]


def test_a_changed_rule_is_another_grant() -> None:
    """Or somebody would meet its new sources with its old ports for a moment."""
    keys = {
        plan([policy("p", ingress=f'[{{"ports": [{{"port": {n}}}]}}]')], [WEB], "n1").grants[0].key
        for n in (80, 81)
    }

    assert len(keys) == 2


@given(
    st.lists(
        st.tuples(st.sampled_from(Protocol), st.integers(1, 300), st.integers(0, 300)), max_size=4
    )
)
def test_doors_are_the_ports_of_the_rules(spans: list[tuple[Protocol, int, int]]) -> None:
    rules = [
        f'{{"ports": [{{"protocol": "{p.name}", "port": {first}, "endPort": {first + more}}}]}}'
        for p, first, more in spans
    ]

    (guard,) = plan([policy("p", ingress=f"[{', '.join(rules)}]")], [API], "n1").guards

    found = [(d.protocol, n) for d in guard.doors for n in range(d.first, d.last + 1)]
    assert len(found) == len(set(found))
    assert set(found) == {
        (p, n) for p, first, more in spans for n in range(first, first + more + 1)
    }


@pytest.mark.parametrize(("first", "last"), [(0, 65535), (1, 65535), (80, 80), (1000, 9999)])
def test_blocks_make_up_a_range(first: int, last: int) -> None:
    found = list(guards.blocks(first, last))

    ports = itertools.chain.from_iterable(range(n, n + (1 << 16 - bits)) for n, bits in found)
    assert list(ports) == list(range(first, last + 1))


def test_labels_of_a_task_beat_those_of_its_service_but_for_its_name() -> None:
    found = labels_of("web", {"a": "1", "b": "1"}, {"b": "2", "service": "other"})

    assert found == {"a": "1", "b": "2", "service": "web"}


def test_numbers_found_in_the_kernel_are_kept() -> None:
    found = plan([policy("all", ingress="[{}]")], [WEB, API], "n1")
    before = Numbers()
    for key in "abc":
        before.of(key)
    held = guards.lower(found, before)

    again = Numbers()
    guards.adopt(found, held, again)

    assert guards.lower(found, again) == held
    assert {name for name, _ in held} == elements.POLICIES

"""Who gets an element that several owners want, and when it goes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.delta import Delta
from mesh.rules.elements import Elements
from mesh.rules.ledger import Ledger

KNOWN = ("known4", b"\x0a\x01\x00\x01")
VIP = ("vips4", b"\x0a\x01\x00\x01" + b"\x06\0\0\0" + b"\0\x50\0\0")
TARGET = ("targets4", b"\0" * 8)


def _patched(elements: Elements, delta: Delta[tuple[str, bytes], bytes]) -> Elements:
    """What a strict kernel holds after a delta: ENOENT and EEXIST are failures."""
    result = dict(elements)
    for key, value in delta.remove.items():
        assert result.pop(key) == value
    for key, value in delta.add.items():
        assert key not in result
        result[key] = value
    return result


def test_a_shared_element_goes_with_its_last_owner() -> None:
    ledger = Ledger()
    ledger.stage({"a": {KNOWN: b""}, "b": {KNOWN: b""}})

    first = ledger.stage({"a": {}})
    second = ledger.stage({"b": {}})

    assert not first
    assert second == Delta({KNOWN: b""}, {})


def test_one_frontend_with_two_values_goes_to_the_first_by_name_and_is_passed_on() -> None:
    ledger = Ledger()
    ledger.stage({"b": {VIP: b"B"}})

    taken = ledger.stage({"a": {VIP: b"A"}})
    refused = list(ledger.refused())
    passed_on = ledger.stage({"a": {}})

    assert taken == Delta({VIP: b"B"}, {VIP: b"A"})
    assert refused == [("b", VIP, "a")]
    assert passed_on == Delta({VIP: b"A"}, {VIP: b"B"})
    assert list(ledger.refused()) == []


def test_a_frontend_that_changes_hands_in_one_stage_is_one_change() -> None:
    ledger = Ledger()
    ledger.stage({"a": {VIP: b"A"}})

    assert ledger.stage({"a": {}, "b": {VIP: b"B"}}) == Delta({VIP: b"A"}, {VIP: b"B"})


_OWNERS = st.sampled_from(["a", "b", "c"])
_WISHES = st.builds(
    lambda known, vip: ({KNOWN: b""} if known else {}) | ({VIP: vip} if vip else {}),
    st.booleans(),
    st.sampled_from([b"", b"1", b"2"]),
)


@given(st.lists(st.dictionaries(_OWNERS, _WISHES, min_size=1), max_size=12))
def test_small_steps_come_to_the_same_as_one_full_pass(steps: list[dict[str, Elements]]) -> None:
    ledger, kernel, last = Ledger(), Elements(), dict[str, Elements]()
    for number, step in enumerate(steps):
        own = {owner: wishes | {TARGET: owner.encode()} for owner, wishes in step.items()}
        named = {
            owner: {(k[0], k[1] + owner.encode()) if k == TARGET else k: v for k, v in w.items()}
            for owner, w in own.items()
        }
        if number % 3 == 2:
            named = dict.fromkeys(named, Elements())
        kernel = _patched(kernel, ledger.stage(named))
        last |= named

    full = Ledger()
    full.stage(last)

    assert kernel == full.elements() == ledger.elements()

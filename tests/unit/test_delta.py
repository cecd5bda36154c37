"""The only diff in the house."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.delta import Delta

COLLECTIONS = st.dictionaries(st.integers(0, 6), st.one_of(st.none(), st.integers(0, 2)))


@given(COLLECTIONS, COLLECTIONS)
def test_a_difference_leads_from_one_to_the_other_and_touches_nothing_else(
    actual: dict[int, int | None], desired: dict[int, int | None]
) -> None:
    delta = Delta.between(actual, desired)

    left = {key: value for key, value in actual.items() if key not in delta.remove}
    assert left | delta.add == desired
    assert delta.remove.items() <= actual.items()
    assert not left.keys() & delta.add.keys()
    assert not delta.remove.items() & delta.add.items()

"""Lists of numbers as the kernel writes them."""

from __future__ import annotations

import pytest

from mesh.model import spans


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("", set()), ("80\n", {80}), ("80,82-84", {80, 82, 83, 84}), ("1-2,3", {1, 2, 3})],
)
def test_a_list_is_read(text: str, numbers: set[int]) -> None:
    assert spans.parsed(text) == numbers


def test_a_list_is_written_with_runs_as_one() -> None:
    assert spans.shown({84, 80, 82, 83}) == "80,82-84"
    assert spans.shown(()) == ""
    with pytest.raises(ValueError, match="x"):
        spans.parsed("x")

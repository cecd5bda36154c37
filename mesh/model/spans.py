"""Numbers in a row: which is given out next, and lists of them.  Pure: knows arithmetic, not who
owns what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def next_fit(is_taken: Callable[[int], bool], span: range, cursor: int) -> int | None:
    """The first free number at or after `cursor`, then from the start; None if all are taken.

    Going on where the last choice ended lets a freed number rest for a whole round.
    """
    start = cursor if cursor in span else span.start
    for half in (range(start, span.stop), range(span.start, start)):
        for number in half:
            if not is_taken(number):
                return number
    return None


def parsed(text: str) -> set[int]:
    """The numbers of a list like "80,32000-32999", as the kernel writes it.  Raises ValueError."""
    found = set[int]()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def shown(numbers: Iterable[int]) -> str:
    """Numbers as such a list; empty for none."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)

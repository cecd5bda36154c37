"""Which number of a span is given out next.  Pure: knows arithmetic, not who owns what."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


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

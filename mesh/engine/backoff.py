"""When what the kernel refused is tried again: later each time.  Pure."""

from __future__ import annotations

from typing import Final

_FIRST: Final = 1.0
_LAST: Final = 60.0
"""Seconds.  The kernel is short of something for a moment, or for good: nobody tells which."""


def delay(tries: int) -> float:
    """Seconds from the last of so many tries to the next."""
    return min(_FIRST * 2.0 ** min(tries - 1, 16), _LAST)


def told(reason: str, tries: int) -> str:
    """Why something is refused, and what becomes of it."""
    count = "once" if tries == 1 else f"{tries} times"
    return f"{reason}; tried {count}, and again after {delay(tries):g} s"

"""Frontend ids: which 18-bit number stands for which pool in conntrack marks.  Pure, mutable.

Ids are local to a node.  A freed id rests until all others were used, so that flows which still
carry it are gone before it means something else.
"""

from __future__ import annotations

from mesh.errors import ApplyFailed
from mesh.rules.marks import IDS


class Ids:
    """The table of ids: one per pool key, handed out next-fit."""

    def __init__(self) -> None:
        self._of: dict[str, int] = {}
        self._taken: dict[int, str] = {}
        self._next = IDS.start

    def of(self, key: str) -> int:
        """The id of a pool, given on first use.  Raises ApplyFailed when all are taken."""
        known = self._of.get(key)
        if known is not None:
            return known
        if len(self._taken) >= len(IDS):
            raise ApplyFailed(f"{key}: all {len(IDS)} frontend ids are in use")
        while self._next in self._taken:
            self._advance()
        chosen = self._next
        self._advance()
        self._of[key] = chosen
        self._taken[chosen] = key
        return chosen

    def key(self, number: int) -> str | None:
        """The pool that has this id."""
        return self._taken.get(number)

    def adopt(self, key: str, number: int) -> bool:
        """Give `key` the id found in the kernel; False if either is taken."""
        if number not in IDS or number in self._taken or key in self._of:
            return False
        self._of[key] = number
        self._taken[number] = key
        if number >= self._next:
            self._next = number
            self._advance()
        return True

    def release(self, key: str) -> None:
        """Free the id of a pool that is gone."""
        number = self._of.pop(key, None)
        if number is not None:
            del self._taken[number]

    def _advance(self) -> None:
        self._next = self._next + 1 if self._next + 1 < IDS.stop else IDS.start

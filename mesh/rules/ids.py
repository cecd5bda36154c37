"""Frontend ids: which number stands for which pool in conntrack marks.  Pure, mutable.

Ids are local to a node.  A freed id rests until all others were used, so that flows which still
carry it are gone before it means something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.errors import ApplyFailed
from mesh.rules import marks

if TYPE_CHECKING:
    from mesh.rules.marks import Layout


class Ids:
    """The table of ids: one per pool key, handed out next-fit, as many as `layout` has room for."""

    def __init__(self, layout: Layout = marks.DEFAULT) -> None:
        self.layout = layout
        self._of: dict[str, int] = {}
        self._taken: dict[int, str] = {}
        self._next = layout.ids.start

    def of(self, key: str) -> int:
        """The id of a pool, given on first use.  Raises ApplyFailed when all are taken."""
        known = self._of.get(key)
        if known is not None:
            return known
        if len(self._taken) >= len(self.layout.ids):
            raise ApplyFailed(
                f"{key}: all {len(self.layout.ids)} frontend ids are in use{self._remedy()}"
            )
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
        if number not in self.layout.ids or number in self._taken or key in self._of:
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
        ids = self.layout.ids
        self._next = self._next + 1 if self._next + 1 < ids.stop else ids.start

    def _remedy(self) -> str:
        if not self.layout.foreign:
            return ""
        return f": give ct_mark (0x{self.layout.ct_mark:08x}) in agent.toml more bits"

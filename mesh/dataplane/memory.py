"""The memory driver: sets without a kernel, for dry runs and tests.

Refuses what the kernel refuses, so that a plan which works here works there.  Forwards nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mesh.dataplane.protocol import Examined, Tampering
from mesh.errors import ApplyFailed, NotFound
from mesh.rules import elements

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.dataplane.protocol import ElementDelta
    from mesh.model.report import Problem
    from mesh.rules.elements import ElementKey, Elements


class MemoryDriver:
    """Holds elements; `prepare` makes the sets exist, `remove` makes them go."""

    name = "memory"
    port = 0
    chunk = 200

    def __init__(self) -> None:
        self._elements: Elements | None = None

    async def prepare(self) -> bool:
        """Make the sets exist; what they hold stays."""
        missing = self._elements is None
        if self._elements is None:
            self._elements = {}
        return missing

    async def attach(self) -> None:
        """See Driver.attach: there are no packets."""

    async def read(self) -> Elements:
        """Every element.  Raises NotFound before `prepare` and after `remove`."""
        return dict(self._prepared())

    async def read_some(self, keys: Iterable[ElementKey]) -> Elements:
        """See Driver.read_some."""
        there = self._prepared()
        return {key: there[key] for key in keys if key in there}

    async def examine(self) -> Examined:
        """Every element; it has no program.  Raises NotFound as `read` does."""
        return Examined(await self.read(), {}, {}, ())

    async def apply(self, delta: ElementDelta) -> None:
        """Apply a change, all or nothing.  Raises ApplyFailed with the culprit element."""
        changed = dict(self._prepared())
        for key in delta.remove:
            if changed.pop(key, None) is None:
                raise _refused(key, "does not exist")
        for key, data in delta.add.items():
            if len(key[1]) != _width(key[0]) or len(data) != _data_width(key[0]):
                raise _refused(key, "has the wrong size")
            if changed.get(key, data) != data:
                raise _refused(key, "exists already with other data")
            changed[key] = data
        self._elements = changed

    async def tampered(self, settle: float) -> Tampering:
        """See Driver.tampered: nobody else can reach it."""
        await asyncio.Event().wait()
        await asyncio.sleep(settle)
        return Tampering("", "")

    async def surplus(self) -> dict[int, int]:
        """See Driver.surplus: there are no packets."""
        return {}

    def problems(self) -> tuple[Problem, ...]:
        """See Driver.problems."""
        return ()

    async def remove(self) -> None:
        """Forget the sets."""
        self._elements = None

    def close(self) -> None:
        """Nothing is held open."""

    def _prepared(self) -> Elements:
        if self._elements is None:
            raise NotFound("the sets do not exist: prepare them")
        return self._elements


def _refused(key: ElementKey, reason: str) -> ApplyFailed:
    return ApplyFailed(f"refused {elements.describe(key)}: {reason}")


def _width(name: str) -> int:
    spec = elements.SETS[name]
    return sum(part.width for part in spec.key)


def _data_width(name: str) -> int:
    return sum(part.width for part in elements.SETS[name].data)

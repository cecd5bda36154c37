"""The only diff in the house: what to remove and what to add so that `actual` becomes `desired`.

Works on plain keyed values.  Never parses, never orders by anything but the mappings given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

K = TypeVar("K", bound="Hashable")
V = TypeVar("V")

_ABSENT: Any = object()


@dataclass(frozen=True, slots=True)
class Delta(Generic[K, V]):
    """A change to a keyed collection.  A key in both `remove` and `add` changes its value."""

    remove: dict[K, V] = field(default_factory=dict)
    add: dict[K, V] = field(default_factory=dict)

    @staticmethod
    def between(actual: Mapping[K, V], desired: Mapping[K, V]) -> Delta[K, V]:
        """The smallest change that turns `actual` into `desired`; unchanged keys are untouched."""
        becomes = desired.get  # the usual change is of values: one look at each key tells of them
        remove = {key: value for key, value in actual.items() if becomes(key, _ABSENT) != value}
        add = {key: desired[key] for key in remove if key in desired}
        if len(actual) - len(remove) + len(add) < len(desired):
            add |= {key: value for key, value in desired.items() if key not in actual}
        return Delta(remove, add)

    def __bool__(self) -> bool:
        return bool(self.remove or self.add)

    def __len__(self) -> int:
        return len(self.remove) + len(self.add)

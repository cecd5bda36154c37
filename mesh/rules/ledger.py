"""Who wants which element, and what that comes to in the kernel.  Pure, mutable.

Owners (services, the set of nodes) may want the same element.  Where its value is the same for all
that is one element; where it is not, the first owner by name has it, whatever the order of events,
and the others are told.  An element goes when its last owner drops it.

Wishes are kept packed: the elements of 10 000 services take 30 MB as objects, 5 as bytes.
"""

from __future__ import annotations

import marshal
from typing import TYPE_CHECKING, Final

from mesh.delta import Delta
from mesh.rules import elements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from mesh.rules.elements import ElementKey, Elements

_SHARED: Final = frozenset(spec.name for spec in elements.SETS.values() if spec.shared)
"""Sets, without data: what several owners want is one element.  All other keys that come from
records are frontends; the rest contain an id, which is unique."""

_HEADS: Final = {name: name.encode() + b"\0" for name in elements.SETS}

_NO_WISHES: Final[Mapping[str, Elements]] = {}

_COMMON: Final = _SHARED | elements.FRONTENDS
"""Sets in which several owners may want the same key."""


class Ledger:
    """What every owner wants, and the elements that follow."""

    def __init__(self) -> None:
        self._packed: dict[str, bytes] = {}
        self._shares: dict[bytes, int] = {}
        self._claims: dict[bytes, str | list[str]] = {}
        self._unpacked: tuple[str, Elements] = ("", {})
        self.size = 0
        """How many elements the kernel should hold."""

    def stage(self, wanted: Mapping[str, Elements]) -> Delta[ElementKey, bytes]:
        """Replace what these owners want; the change to the kernel that follows from it."""
        total: Delta[ElementKey, bytes] = Delta({}, {})
        before: dict[ElementKey, bytes | None] = {}
        fresh: Elements = {}
        changes = {}
        for owner, new in wanted.items():
            known = owner in self._packed
            change = Delta.between(self._wishes(owner), new) if known else Delta({}, new)
            if change:
                changes[owner] = change
                self._sift(change, total, fresh, before)
        for owner, change in changes.items():
            self._replace(owner, wanted[owner], change)
        total.add.update(fresh)
        for key, old in before.items():
            now = self._effective(key, wanted)
            if now != old:
                if old is not None:
                    total.remove[key] = old
                if now is not None:
                    total.add[key] = now
        self.size += len(total.add) - len(total.remove)
        return total

    def _sift(
        self,
        change: Delta[ElementKey, bytes],
        total: Delta[ElementKey, bytes],
        fresh: Elements,
        before: dict[ElementKey, bytes | None],
    ) -> None:
        """Put what nobody else can want into `total`, what nobody has wanted until now but one
        owner into `fresh`, and of all else into `before` what the kernel holds of it.
        """
        for part, settled in ((change.remove, total.remove), (change.add, total.add)):
            for key, value in part.items():
                if key[0] not in _COMMON:
                    settled[key] = value
                elif key in fresh:
                    del fresh[key]
                    before[key] = None
                elif key not in before:
                    short = _HEADS[key[0]] + key[1]
                    if short in self._claims or short in self._shares:
                        before[key] = self._effective(key)
                    else:
                        fresh[key] = value

    def elements(self) -> Elements:
        """Everything the kernel should hold."""
        found: Elements = {}
        for packed in self._packed.values():
            found.update(marshal.loads(packed))
        for short, claim in self._claims.items():
            if isinstance(claim, list):
                key = _long(short)
                found[key] = self._wishes(min(claim))[key]
        return found

    def held_by(self, owner: str) -> Elements:
        """What of an owner's wishes is its own to have."""
        return {
            key: value
            for key, value in self._wishes(owner).items()
            if key[0] not in elements.FRONTENDS or self._effective(key) == value
        }

    def wanted(self, key: ElementKey, owner: str | None) -> bytes | None:
        """What the kernel should hold of one element that nobody but `owner` can want, or that is
        shared or a frontend, whoever wants it; None: nothing.
        """
        if key[0] in _COMMON:
            return self._effective(key)
        return self._wishes(owner).get(key) if owner is not None else None

    def refused(self) -> Iterable[tuple[str, ElementKey, str]]:
        """Every (owner, element, the owner who has it) of different values wanted at once."""
        claims = self._claims.items()
        contested = {_long(short): claim for short, claim in claims if isinstance(claim, list)}
        owners = {owner for claim in contested.values() for owner in claim}
        wishes = {owner: self._wishes(owner) for owner in owners}
        for key, claim in contested.items():
            winner = min(claim)
            for owner in claim:
                if wishes[owner][key] != wishes[winner][key]:
                    yield owner, key, winner

    def frontends(self) -> Callable[[], Iterator[tuple[ElementKey, str]]]:
        """Every frontend there is now, and whose it is: read later, in another thread."""
        claims = self._claims.copy()
        return lambda: (
            (_long(short), claim if isinstance(claim, str) else min(claim))
            for short, claim in claims.items()
        )

    def _effective(
        self, key: ElementKey, unpacked: Mapping[str, Elements] = _NO_WISHES
    ) -> bytes | None:
        """What the kernel is to hold of a shared element or a frontend; None: nothing.

        Some wishes may be at hand, `unpacked`.
        """
        short = _HEADS[key[0]] + key[1]
        claim = self._claims.get(short)
        if claim is None:
            return b"" if short in self._shares else None
        owner = claim if isinstance(claim, str) else min(claim)
        return (unpacked.get(owner) or self._wishes(owner))[key]

    def _wishes(self, owner: str) -> Elements:
        """What an owner wants.  The last answer is kept: a service may have a thousand ports."""
        if self._unpacked[0] != owner:
            packed = self._packed.get(owner)
            self._unpacked = owner, marshal.loads(packed) if packed is not None else {}
        return self._unpacked[1]

    def _replace(self, owner: str, new: Elements, change: Delta[ElementKey, bytes]) -> None:
        for key in change.remove:
            if key[0] in _COMMON and key not in change.add:
                self._drop(key, owner)
        for key in change.add:
            if key[0] in _COMMON and key not in change.remove:
                self._claim(key, owner)
        self._unpacked = ("", {})
        if new:
            self._packed[owner] = marshal.dumps(new)
        else:
            self._packed.pop(owner, None)

    def _claim(self, key: ElementKey, owner: str) -> None:
        short = _HEADS[key[0]] + key[1]
        if key[0] in _SHARED:
            self._shares[short] = self._shares.get(short, 0) + 1
            return
        claim = self._claims.setdefault(short, owner)
        if claim is not owner:
            self._claims[short] = [*([claim] if isinstance(claim, str) else claim), owner]

    def _drop(self, key: ElementKey, owner: str) -> None:
        short = _short(key)
        if key[0] in _SHARED:
            self._shares[short] -= 1
            if not self._shares[short]:
                del self._shares[short]
        elif key[0] in elements.FRONTENDS:
            claim = self._claims.pop(short)
            if isinstance(claim, list):
                rest = [other for other in claim if other != owner]
                self._claims[short] = rest if len(rest) > 1 else rest[0]


def _short(key: ElementKey) -> bytes:
    """A key as one object instead of three."""
    return _HEADS[key[0]] + key[1]


def _long(short: bytes) -> ElementKey:
    name, _, key = short.partition(b"\0")
    return name.decode(), key

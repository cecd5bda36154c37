"""Decisions gathered into one transaction, as many as the store takes at once.

Owns the conditions that make it safe: a key is only created where there is none, only changed or
deleted as it is known, and what belongs to nobody is only freed while its owner is really gone.
A large decision is one transaction as well, in parts: nobody ever sees half of a range given, or
half of it freed.  Pure: the loop sends it and says how it went.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Final

from mesh.controller.decide import Decision, decide
from mesh.controller.picture import Held
from mesh.model.report import Status
from mesh.store import schema
from mesh.store.protocol import MAX_BYTES, MAX_OPERATIONS, MAX_PART, Compare, Delete, Part, Put

if TYPE_CHECKING:
    from mesh.controller.picture import Owner, Picture, Record
    from mesh.controller.places import Place, Pool

    _Step = tuple[Compare, Put | Delete]

ROOM: Final = MAX_OPERATIONS - 4
"""Operations for decisions, and conditions: one of these is the leader's, one may say that an owner
is gone; four operations move cursors."""

_AROUND: Final = 32
"""Bytes of a step besides its key, twice, and its value."""

STINT: Final = 256
"""Decisions per draft: some 5 ms."""


class Draft:
    """One transaction in the making.

    Places that it gives out count as taken in the picture at once, so that the next decision
    does not give them out again; places that it frees only when it is committed.  A draft that
    fails leaves the picture wrong: take a new snapshot.
    """

    def __init__(self, picture: Picture) -> None:
        self.conditions: list[Compare] = []
        self.operations: list[Put | Delete] = []
        self.parts: tuple[Part, ...] = ()
        self.refusals = 0
        """Services that are newly told why they do not get what they want."""
        self._picture = picture
        self._steps: list[_Step] = []
        self._puts: dict[Place, tuple[Owner, Record]] = {}
        self._frees: list[Place] = []
        self._cursors: dict[Pool, int] = {}

    def fill(self) -> None:
        """Decide about marked owners, those gone and the oldest first, until there is no room.

        At most STINT of them, so that whoever shares the event loop is not held up.
        """
        picture, deferred = self._picture, []
        for _ in range(STINT):
            owner = None if self._is_full() else picture.next_marked()
            if owner is None or picture.cluster is None:
                break
            decision = decide(picture, picture.cluster, owner)
            if self._frees and self._frees_something_of(decision):
                deferred.append(owner)
            elif not self._take(owner, decision):
                deferred.append(owner)
                break
        for owner in deferred:
            picture.mark(owner)
        self._arrange()
        self._move_cursors()

    @property
    def size(self) -> int:
        """How many operations there are, in parts or not."""
        return len(self.operations) + sum(len(part.operations) for part in self.parts)

    def committed(self, revision: int) -> None:
        """Note in the picture that the store did all of it."""
        for place, (owner, record) in self._puts.items():
            self._picture.hold(place, Held(owner, record, revision))
        for place in self._frees:
            self._picture.release(place)
        parts = (part.operations for part in self.parts)
        for operation in chain(self.operations, *parts):
            self._picture.wrote(operation.key, revision)

    def _frees_something_of(self, decision: Decision) -> bool:
        """Whether the decision lacks what this very draft frees: the next draft can give it."""
        return any(p in decision.waits or p.pool in decision.waits for p in self._frees)

    def _used(self) -> int:
        """How many operations there are, or conditions if these are more."""
        return len(self._steps) + max(len(self.operations), len(self.conditions))

    def _is_full(self) -> bool:
        return self._used() >= ROOM

    def _take(self, owner: Owner, decision: Decision) -> bool:
        """Add all of a decision; False if there was no room for all of it.

        One too large for the room of many has a transaction for itself; only one too large for any
        request is split, over several.
        """
        size = len(decision.puts) + len(decision.frees) + 1
        if self._used() and size > ROOM - self._used():
            return False
        self._guard(owner, decision)
        whole = self._take_steps(owner, decision)
        if whole:
            self._picture.wait(owner, decision.waits)
            self._picture.exhausted |= {w for w in decision.waits if isinstance(w, str)}
            self._report(owner, decision)
            self._cursors |= decision.cursors
            self._picture.cursors |= decision.cursors
        return whole

    def _guard(self, owner: Owner, decision: Decision) -> None:
        """Free what nobody owns only while that is so: of one transaction, the keys are heard of
        prefix by prefix, and an allocation may come before its owner.
        """
        if decision.frees and owner not in self._picture.claimants:
            self.conditions.append(Compare(self._picture.key_of_owner(owner), 0))

    def _take_steps(self, owner: Owner, decision: Decision) -> bool:
        """What a decision does with places, as far as a request may be long; whether that is all
        of it.
        """
        room = MAX_BYTES
        for place, record in decision.puts.items():
            step = self._gift(place, record)
            if (room := room - _length(step)) < 0:
                return False
            self._give(owner, place, record, step)
        for place in decision.frees:
            step = self._release(place)
            if (room := room - _length(step)) < 0:
                return False
            self._steps.append(step)
            self._frees.append(place)
        return True

    def _gift(self, place: Place, record: Record) -> _Step:
        key, held = self._picture.key_of(place), self._picture.at(place)
        revision = held.revision if held is not None else 0
        return Compare(key, revision), Put(key, schema.encode(record))

    def _give(self, owner: Owner, place: Place, record: Record, step: _Step) -> None:
        self._steps.append(step)
        self._puts[place] = (owner, record)
        self._picture.hold(place, Held(owner, record, step[0].revision))

    def _release(self, place: Place) -> _Step:
        key, held = self._picture.key_of(place), self._picture.taken[place.pool][place.number]
        return Compare(key, held.revision), Delete(key)

    def _report(self, owner: Owner, decision: Decision) -> None:
        picture = self._picture
        wanted = Status(problems=decision.problems) if decision.problems else None
        if picture.statuses.get(owner) == wanted:
            return
        key = picture.keys.status(owner.kind, owner.name)
        if wanted is None:
            del picture.statuses[owner]
            self.operations.append(Delete(key))
        else:
            picture.statuses[owner] = wanted
            self.refusals += owner.kind == "services"
            self.operations.append(Put(key, schema.encode(wanted)))

    def _arrange(self) -> None:
        """Put the steps where the store takes them: in parts, if they are too many otherwise."""
        conditions, operations = zip(*self._steps, strict=True) if self._steps else ((), ())
        if self._used() > ROOM:
            spans = [slice(n, n + MAX_PART) for n in range(0, len(self._steps), MAX_PART)]
            self.parts = tuple(Part(conditions[span], operations[span]) for span in spans)
        else:
            self.conditions += conditions
            self.operations += operations

    def _move_cursors(self) -> None:
        for pool, cursor in self._cursors.items():
            self.operations.append(Put(self._picture.keys.cursor(pool), str(cursor).encode()))


def _length(step: _Step) -> int:
    """Bytes that a step takes in a request, at most."""
    condition, operation = step
    value = operation.value if isinstance(operation, Put) else b""
    return 2 * len(condition.key.encode()) + len(value) + _AROUND

"""Decisions gathered into one transaction, as many as the store takes at once.

Owns the conditions that make it safe: a key is only created where there is none, only changed or
deleted as it is known, and what belongs to nobody is only freed while its owner is really gone.
Pure: the loop sends it and says how it went.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from mesh.controller.decide import Decision, decide
from mesh.controller.picture import Held
from mesh.model.report import Status
from mesh.store import schema
from mesh.store.protocol import MAX_OPERATIONS, Compare, Delete, Put

if TYPE_CHECKING:
    from mesh.controller.picture import Owner, Picture, Place, Pool, Record

ROOM: Final = MAX_OPERATIONS - 4
"""Operations for decisions, and conditions: one of these is the leader's, one may say that an owner
is gone; four operations move cursors."""

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
        self.refusals = 0
        """Services that are newly told why they do not get what they want."""
        self._picture = picture
        self._puts: dict[Place, tuple[Owner, Record]] = {}
        self._frees: list[Place] = []
        self._keys: list[str] = []
        self._cursors: dict[Pool, int] = {}

    def fill(self) -> None:
        """Decide about marked owners, those gone and the oldest first, until there is no room.

        At most STINT of them, so that whoever shares the event loop is not held up.
        """
        picture, deferred = self._picture, []
        for _ in range(STINT):
            owner = picture.next_marked()
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
        self._move_cursors()

    def committed(self, revision: int) -> None:
        """Note in the picture that the store did all of it."""
        for place, (owner, record) in self._puts.items():
            self._picture.hold(place, Held(owner, record, revision))
        for place in self._frees:
            self._picture.release(place)
        for operation in self.operations:
            self._picture.wrote(operation.key, revision)

    def _frees_something_of(self, decision: Decision) -> bool:
        """Whether the decision lacks what this very draft frees: the next draft can give it."""
        return any(p in decision.waits or p.pool in decision.waits for p in self._frees)

    def _take(self, owner: Owner, decision: Decision) -> bool:
        """Add all of a decision; False if there was no room for all of it.

        Only a decision too large for any transaction is split, over several.
        """
        size = len(decision.puts) + len(decision.frees) + 1
        if size > ROOM - max(len(self.operations), len(self.conditions)):
            if not self.operations:
                self._guard(owner, decision)
                for place, record in islice(decision.puts.items(), ROOM):
                    self._give(owner, place, record)
                for place in decision.frees[: ROOM - len(self.operations)]:
                    self._free(place)
            return False
        self._guard(owner, decision)
        for place, record in decision.puts.items():
            self._give(owner, place, record)
        for place in decision.frees:
            self._free(place)
        self._picture.wait(owner, decision.waits)
        self._picture.exhausted |= {w for w in decision.waits if isinstance(w, str)}
        self._report(owner, decision)
        self._cursors |= decision.cursors
        self._picture.cursors |= decision.cursors
        return True

    def _guard(self, owner: Owner, decision: Decision) -> None:
        """Free what nobody owns only while that is so: of one transaction, the keys are heard of
        prefix by prefix, and an allocation may come before its owner.
        """
        if decision.frees and owner not in self._picture.claimants:
            self.conditions.append(Compare(self._picture.key_of_owner(owner), 0))

    def _give(self, owner: Owner, place: Place, record: Record) -> None:
        picture, key = self._picture, self._picture.key_of(place)
        held = picture.taken[place.pool].get(place.number)
        self.conditions.append(Compare(key, held.revision if held is not None else 0))
        self.operations.append(Put(key, schema.encode(record)))
        self._puts[place] = (owner, record)
        picture.hold(place, Held(owner, record, held.revision if held is not None else 0))

    def _free(self, place: Place) -> None:
        key = self._picture.key_of(place)
        self.conditions.append(Compare(key, self._picture.taken[place.pool][place.number].revision))
        self.operations.append(Delete(key))
        self._frees.append(place)

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

    def _move_cursors(self) -> None:
        for pool, cursor in self._cursors.items():
            self.operations.append(Put(self._picture.keys.cursor(pool), str(cursor).encode()))

"""The picture of some prefixes, kept in step with the store for ever: list, watch, resume.

Owns reconnecting and the proof that a resumed watch continues the same history.  Never decides
what a change means; never merges a snapshot with what was known before.
"""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.errors import StoreUnavailable
from mesh.store.protocol import Changes, Compacted, Snapshot, Store, WatchLost

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

LOG: Final = logging.getLogger(__name__)

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 3.0

CATCH_UP: Final = 0.3
"""Seconds in which etcd surely brings watches that begin in the past up to date: it does so one by
one, every 0.1 s (mvcc, syncWatchersLoop), while others already hear of newer changes."""


class _Position(NamedTuple):
    """How far a prefix is known: at `revision`, `key` had `mod_revision` (0: was not there)."""

    revision: int
    key: str
    mod_revision: int


class Follower:
    """Follows prefixes (none inside another) of a store.

    `connected` tells whether changes are arriving; `cause` says why not, in one line.
    """

    def __init__(self, store: Store, *prefixes: str) -> None:
        self._store = store
        self._prefixes = prefixes
        self.connected = False
        self.cause: str | None = "not connected yet"
        self._since = 0.0
        self._loss_told = False

    def orders_in(self) -> float:
        """Seconds until changes come in the order of their revisions, also of different prefixes.

        Until then, having heard of a revision does not mean to know all that was before it.
        """
        return max(0.0, self._since + CATCH_UP - asyncio.get_running_loop().time())

    async def updates(self) -> AsyncGenerator[Snapshot | Changes, None]:
        """A Snapshot, then Changes, and a new Snapshot whenever changes may have been missed.

        A Snapshot replaces all that was known.  Never ends by itself and raises nothing of the
        store's; close it (`contextlib.aclosing`) to stop.
        """
        positions: dict[str, _Position] = {}
        pause = FIRST_PAUSE
        while True:
            try:
                if not positions or not await self._same_history(positions):
                    snapshot = await self._store.list(*self._prefixes)
                    positions = _positions(self._prefixes, snapshot)
                    yield snapshot
                    del snapshot  # the watch may last for months
                since = {prefix: known.revision for prefix, known in positions.items()}
                async with aclosing(self._store.watch(since)) as stream:
                    async for changes in stream:
                        if changes.changes:
                            self._advance(positions, changes)
                            yield changes
                        else:
                            self._established(changes.revision, positions)
                            pause = FIRST_PAUSE
            except Compacted:
                positions = {}
            except (WatchLost, StoreUnavailable) as error:
                self._lost(str(error))
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _same_history(self, positions: dict[str, _Position]) -> bool:
        """Whether the store still remembers every position as it was.

        A store that was wiped or restored from a backup has other contents at that revision, or
        has not reached it (Compacted), even if it has long gone past it since.
        """
        for known in positions.values():
            item = await self._store.get(known.key, known.revision)
            if (item.mod_revision if item else 0) != known.mod_revision:
                return False
        return True

    def _advance(self, positions: dict[str, _Position], changes: Changes) -> None:
        last = changes.changes[-1]
        prefix = next(p for p in self._prefixes if last.key.startswith(p))
        written = last.revision if last.value else 0
        positions[prefix] = _Position(last.revision, last.key, written)

    def _established(self, revision: int, positions: dict[str, _Position]) -> None:
        if revision < max(known.revision for known in positions.values()):
            raise WatchLost("this member of the store is behind the others")
        self._since = asyncio.get_running_loop().time()
        if not self.connected:
            LOG.info("store=connected revision=%d", revision)
        self.connected, self.cause, self._loss_told = True, None, False

    def _lost(self, cause: str) -> None:
        if not self._loss_told:
            LOG.warning("store=lost cause=%r; the last known state stays in force", cause)
        self.connected, self.cause, self._loss_told = False, cause, True


def _positions(prefixes: tuple[str, ...], snapshot: Snapshot) -> dict[str, _Position]:
    """How far each prefix is known by a snapshot, in which it comes in one piece."""
    found = {prefix: _Position(snapshot.revision, prefix, 0) for prefix in prefixes}
    prefix, last = prefixes[0], 0
    for item in snapshot.items:
        if not item.key.startswith(prefix):
            prefix = next(p for p in prefixes if item.key.startswith(p))
            last = found[prefix].mod_revision
        if item.mod_revision > last:
            last = item.mod_revision
            found[prefix] = _Position(snapshot.revision, item.key, last)
    return found

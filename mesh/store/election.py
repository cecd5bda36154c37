"""One leader among the processes that campaign for a key.

Owns the office: winning it, renewing it, laying it down in time.  Never does the leader's work.
A deposed leader is cancelled before its lease can have ended; `guard` fences what slips through.
"""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from mesh.errors import StoreUnavailable
from mesh.store.protocol import Compacted, Compare, LeaseLost, Put, Store, WatchLost

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    Lead = Callable[[Compare], Coroutine[object, object, None]]

LOG: Final = logging.getLogger(__name__)

PAUSE: Final = 1.0
"""Seconds, on average, between the end of one term or failed campaign and the next."""

MARGIN: Final = 1 / 6
"""The part of the lease's time that is left for the leader to stop in."""


class Election:
    """The campaign of `name` for `key`; a leader that vanishes is replaced after `ttl` seconds."""

    def __init__(self, store: Store, key: str, name: str, ttl: int) -> None:
        self._store = store
        self._key = key
        self._name = name
        self._ttl = ttl
        self.leading = False

    async def run(self, lead: Lead) -> None:
        """Call `lead(guard)` for each term won; it is cancelled when the term ends.

        `guard` belongs into the conditions of every transaction of the leader: it fails once
        somebody else may lead.  When `lead` returns, or lets StoreUnavailable pass, the office is
        laid down and campaigned for again, as after the store's other errors; any other exception
        of it ends the run.
        """
        while True:
            try:
                await self._vacancy()
                await self._campaign(lead)
            except (StoreUnavailable, WatchLost, Compacted, LeaseLost) as error:
                LOG.debug("election key=%s: %s", self._key, error)
            await asyncio.sleep(PAUSE * random.uniform(0.5, 1.5))

    async def _vacancy(self) -> None:
        """Wait until nobody holds the office."""
        item = await self._store.get(self._key)
        if item is None:
            return
        async with aclosing(self._store.watch({self._key: item.mod_revision})) as stream:
            async for changes in stream:
                if any(c.key == self._key and c.value is None for c in changes.changes):
                    return

    async def _campaign(self, lead: Lead) -> None:
        until = _now() + self._ttl
        lease = await self._store.grant(self._ttl)
        try:
            put = Put(self._key, self._name.encode(), lease)
            result = await self._store.transact([Compare(self._key, 0)], [put])
            if result.succeeded:
                LOG.info("election key=%s leader=%s", self._key, self._name)
                await self._serve(lead, Compare(self._key, result.revision), lease, until)
        finally:
            try:
                await self._store.revoke(lease)
            except StoreUnavailable as error:
                LOG.warning("election key=%s left to expire: %s", self._key, error)

    async def _serve(self, lead: Lead, guard: Compare, lease: int, until: float) -> None:
        """One term: until the office is lost or the work ends."""
        self.leading = True
        work = asyncio.create_task(lead(guard))
        renewal = asyncio.create_task(self._renew(guard, lease, until))
        try:
            await asyncio.wait({work, renewal}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            renewal.cancel()
            outcomes = await asyncio.gather(work, renewal, return_exceptions=True)
            self.leading = False
            LOG.info("election key=%s leader=%s ended", self._key, self._name)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _renew(self, guard: Compare, lease: int, until: float) -> None:
        """Keep the office as long as possible; returns while there is time left to stop."""
        margin = self._ttl * MARGIN
        while (asked := _now()) < until - margin:
            try:
                async with asyncio.timeout_at(until - margin):
                    await asyncio.sleep(self._ttl / 3)
                    asked = _now()
                    await self._store.keep_alive(lease)
                    item = await self._store.get(self._key)
            except StoreUnavailable:
                continue
            except (LeaseLost, TimeoutError):
                return
            if item is None or item.mod_revision != guard.revision:
                return
            until = asked + self._ttl


def _now() -> float:
    return asyncio.get_running_loop().time()

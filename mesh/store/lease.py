"""Keys that live as long as this process: held under one lease, written again when it is lost.

Owns the lease's renewal and what is written under it.  Never decides what a key says.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from mesh.delta import Delta
from mesh.errors import StoreUnavailable
from mesh.store import protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.store.protocol import Store

LOG: Final = logging.getLogger(__name__)

RETRY: Final = 0.2
"""Seconds until the next attempt; one that finds no store has taken long enough already."""


class LeaseHolder:
    """A changing set of keys under one lease of `ttl` seconds.

    `alive_until` is the loop time until which the store surely keeps the keys: it counts from
    before the last successful request.
    """

    def __init__(self, store: Store, ttl: int) -> None:
        self._store = store
        self._ttl = ttl
        self._lease = 0
        self._wanted: dict[str, bytes] = {}
        self._written: dict[str, bytes] = {}
        self._writing = asyncio.Lock()
        self._wake = asyncio.Event()
        self._stopped = False
        self._answering = True
        self.alive_until = 0.0
        self._troubled_until = 0.0

    def is_doubtful(self) -> bool:
        """Whether the store may lately have ended leases of others through no fault of theirs.

        A third of the time is left to a holder that could not renew its lease when it wanted to:
        whoever wanted to at the same time may have lost it.
        """
        now = asyncio.get_running_loop().time()
        return now < self._troubled_until or now > self.alive_until - self._ttl / 3

    async def run(self) -> None:
        """Hold the keys until `stop`; cancelled, it leaves them to the lease's end."""
        while not self._stopped:
            pause = await self._renew()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            self._wake.clear()

    async def put(self, key: str, value: bytes) -> None:
        """Keep `key` at `value`.  Tries once now; `run` sees to it if the store does not answer."""
        await self.change({key: value})

    async def delete(self, key: str) -> None:
        """Keep `key` no longer; as `put`."""
        await self.change({key: None})

    async def change(self, wanted: Mapping[str, bytes | None]) -> None:
        """Keep these keys at these values, and those with None no longer; as `put`."""
        for key, value in wanted.items():
            if value is None:
                self._wanted.pop(key, None)
            else:
                self._wanted[key] = value
        await self._write_now()

    def again(self, key: str) -> None:
        """Write a key again that somebody else changed or removed."""
        self._written.pop(key, None)
        self._wake.set()

    async def stop(self) -> None:
        """Revoke the lease, so that peers see the keys go at once, and let `run` return."""
        self._stopped = True
        self._wake.set()
        async with self._writing:
            lease, self._lease = self._lease, 0
        if lease:
            try:
                await self._store.revoke(lease)
            except StoreUnavailable as error:
                LOG.warning("lease=%x left to expire in %d s: %s", lease, self._ttl, error)

    async def _renew(self) -> float:
        """Keep the lease or get a new one, write what is missing; seconds until the next time."""
        loop = asyncio.get_running_loop()
        asked = loop.time()
        try:
            if self._lease:
                await self._store.keep_alive(self._lease)
            else:
                await self._grant()
            self.alive_until = asked + self._ttl
            await self._write()
        except protocol.LeaseLost as error:
            LOG.warning("lease=lost, writing %d keys again: %s", len(self._wanted), error)
            self._lease = 0
            self._troubled_until = loop.time() + self._ttl
            return RETRY
        except StoreUnavailable as error:
            if self._answering:
                LOG.warning("lease=%x not renewed: %s", self._lease, error)
            self._answering = False
            self._troubled_until = loop.time() + self._ttl
            return RETRY
        self._answering = True
        if loop.time() - asked > self._ttl / 3:
            self._troubled_until = loop.time() + self._ttl
        return self._ttl / 3

    async def _grant(self) -> None:
        async with self._writing:
            if not self._stopped:
                self._lease = await self._store.grant(self._ttl)
                self._written = {}

    async def _write_now(self) -> None:
        if not self._lease:
            self._wake.set()
        elif self._answering:
            try:
                await self._write()
            except (protocol.LeaseLost, StoreUnavailable):
                self._wake.set()

    async def _write(self) -> None:
        """Bring the store in line with what is wanted."""
        async with self._writing:
            if not self._lease:
                return
            delta = Delta.between(self._written, self._wanted)
            operations: list[protocol.Put | protocol.Delete] = [
                protocol.Put(key, value, self._lease) for key, value in delta.add.items()
            ]
            operations += [protocol.Delete(key) for key in delta.remove if key not in delta.add]
            for start in range(0, len(operations), protocol.MAX_OPERATIONS):
                batch = operations[start : start + protocol.MAX_OPERATIONS]
                await self._store.transact([], batch)
                for operation in batch:
                    if isinstance(operation, protocol.Put):
                        self._written[operation.key] = operation.value
                    else:
                        del self._written[operation.key]

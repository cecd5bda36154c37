"""A store in this process with etcd's semantics: for tests, dry runs and clusters of one.

Owns revisions, versions, leases, history and compaction.  Its outages (`stop`, `wipe`, `expire`)
are commands, so that a test needs no waiting.  Lives on one event loop; never touches the network.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from itertools import chain, count
from typing import TYPE_CHECKING

from mesh.errors import StoreUnavailable
from mesh.store.protocol import (
    Change,
    Changes,
    Compacted,
    Compare,
    Delete,
    KeyValue,
    LeaseLost,
    Part,
    Put,
    Snapshot,
    TransactionResult,
    WatchLost,
    check_transaction,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence


class _Lease:
    """A lease of `ttl` seconds; `timer` ends it."""

    def __init__(self, ttl: int) -> None:
        self.ttl = ttl
        self.timer: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


class MemoryStore:
    """A `Store` that keeps everything, and all history since the last `compact`, in memory."""

    def __init__(self) -> None:
        self._running = True
        self._lease_ids = count(1)
        self._committed = asyncio.Event()
        self._epoch = 0
        self._reset()

    def _reset(self) -> None:
        self._revision = 1  # etcd's empty store has revision 1; the first write is 2
        self._compacted = 0
        self._items: dict[str, KeyValue] = {}
        self._history: list[Change] = []
        self._leases: dict[int, _Lease] = {}

    async def get(self, key: str, revision: int = 0) -> KeyValue | None:
        """See Store.get."""
        await self._answer()
        if not revision:
            return self._items.get(key)
        if not self._compacted <= revision <= self._revision:
            raise Compacted(revision)
        for change in reversed(self._history[: self._after(revision)]):
            if change.key == key:
                return change.value
        return None

    async def list(self, *prefixes: str) -> Snapshot:
        """See Store.list."""
        await self._answer()
        found = (item for key, item in self._items.items() if key.startswith(prefixes))
        return Snapshot(tuple(sorted(found)), self._revision)

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """See Store.put."""
        await self._answer()
        return self._commit([Put(key, value, lease)])

    async def delete(self, key: str) -> bool:
        """See Store.delete."""
        await self._answer()
        present = key in self._items
        self._commit([Delete(key)])
        return present

    async def transact(
        self,
        conditions: Sequence[Compare],
        operations: Sequence[Put | Delete],
        parts: Sequence[Part] = (),
    ) -> TransactionResult:
        """See Store.transact."""
        await self._answer()
        check_transaction(conditions, operations, parts)
        if not self._hold(conditions):
            return TransactionResult(False, self._revision)
        done = [part.operations for part in parts if self._hold(part.conditions)]
        revision = self._commit([*operations, *chain.from_iterable(done)])
        return TransactionResult(len(done) == len(parts), revision)

    async def watch(self, since: Mapping[str, int]) -> AsyncGenerator[Changes, None]:
        """See Store.watch."""
        if not self._running:
            raise WatchLost("the store is stopped")
        epoch, seen, positions = self._epoch, min(since.values()), dict(since)
        yield Changes((), self._revision)
        while True:
            committed = self._committed
            if self._epoch != epoch:
                raise WatchLost("the store was stopped")
            self._check_kept(seen)
            news, seen = self._history[self._after(seen) :], max(seen, self._revision)
            for prefix, position in positions.items():
                changes = tuple(
                    change
                    for change in news
                    if change.revision > position and change.key.startswith(prefix)
                )
                if changes:
                    positions[prefix] = changes[-1].revision
                    yield Changes(changes, changes[-1].revision)
            if committed is self._committed:
                await committed.wait()

    async def grant(self, ttl: int) -> int:
        """See Store.grant."""
        await self._answer()
        lease = next(self._lease_ids)
        self._leases[lease] = _Lease(ttl)
        self._arm(lease)
        return lease

    async def keep_alive(self, lease: int) -> int:
        """See Store.keep_alive."""
        await self._answer()
        if lease not in self._leases:
            raise LeaseLost(f"lease {lease} is unknown")
        self._arm(lease)
        return self._leases[lease].ttl

    async def revoke(self, lease: int) -> None:
        """See Store.revoke."""
        await self._answer()
        self.expire(lease)

    async def close(self) -> None:
        """Stop for good."""
        self.stop()

    def compact(self, revision: int) -> None:
        """Forget what stood before `revision`; reads and watches from there raise Compacted."""
        self._compacted = revision
        standing = {change.key: change for change in self._history if change.revision < revision}
        kept = [change for change in standing.values() if change.value is not None]
        kept.sort(key=lambda change: change.revision)
        self._history = kept + [c for c in self._history if c.revision >= revision]
        self._wake()

    def expire(self, lease: int) -> None:
        """End a lease now, as though its time had run out; an unknown one is not an error."""
        known = self._leases.pop(lease, None)
        if known is not None and self._running:
            known.cancel()
            self._commit([Delete(key) for key, item in self._items.items() if item.lease == lease])

    def stop(self) -> None:
        """Answer nothing from now on: calls raise StoreUnavailable, watches WatchLost."""
        self._running = False
        self._epoch += 1
        for lease in self._leases.values():
            lease.cancel()
        self._wake()

    def start(self) -> None:
        """Answer again; like etcd after a restart, every lease has its whole time before it."""
        self._running = True
        for lease in self._leases:
            self._arm(lease)

    def wipe(self) -> None:
        """Lose everything, leases and revisions too, as a server that lost its disk."""
        self.stop()
        self._reset()
        self._running = True

    async def _answer(self) -> None:
        await asyncio.sleep(0)  # as over a network, others get their turn in between
        if not self._running:
            raise StoreUnavailable("the in-memory store is stopped; start it again")

    def _hold(self, conditions: Sequence[Compare]) -> bool:
        """Whether conditions do."""
        items = ((self._items.get(each.key), each.revision) for each in conditions)
        return all((item.mod_revision if item else 0) == revision for item, revision in items)

    def _check_kept(self, seen: int) -> None:
        if seen + 1 < self._compacted:
            raise Compacted(seen)

    def _after(self, revision: int) -> int:
        """Where the history after `revision` begins."""
        return bisect_right(self._history, revision, key=lambda change: change.revision)

    def _arm(self, lease: int) -> None:
        known = self._leases[lease]
        known.cancel()
        known.timer = asyncio.get_running_loop().call_later(known.ttl, self.expire, lease)

    def _commit(self, operations: Sequence[Put | Delete]) -> int:
        for operation in operations:
            if isinstance(operation, Put) and operation.lease not in (0, *self._leases):
                raise LeaseLost(f"lease {operation.lease} is unknown")
        effective = [op for op in operations if isinstance(op, Put) or op.key in self._items]
        if effective:
            self._revision += 1
            self._history += [self._change(operation) for operation in effective]
            self._wake()
        return self._revision

    def _change(self, operation: Put | Delete) -> Change:
        """Do one operation at the current revision."""
        key, revision = operation.key, self._revision
        if isinstance(operation, Delete):
            del self._items[key]
            return Change(key, None, revision)
        old = self._items.get(key)
        created, version = (old.create_revision, old.version + 1) if old else (revision, 1)
        item = KeyValue(key, operation.value, created, revision, version, operation.lease)
        self._items[key] = item
        return Change(key, item, revision)

    def _wake(self) -> None:
        self._committed.set()
        self._committed = asyncio.Event()

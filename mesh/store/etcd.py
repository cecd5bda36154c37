"""etcd as the store: the v3 interface of 3.4 and newer, over gRPC.

Owns the translation between the house's operations and etcd's.  Reads are linearizable.  Never
retries a conditional transaction whose outcome is unknown.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from mesh.store import etcd_messages, etcd_watch
from mesh.store.etcd_channel import Connection, EtcdOptions
from mesh.store.etcd_messages import DELETE, GRANT, KEEP_ALIVE, PUT, RANGE, REVOKE, TXN
from mesh.store.protocol import (
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
    check_transaction,
    grouped,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence

_PAGE: Final = 1000
_LARGEST_PAGE: Final = 4000
"""Keys read at once, at first and at most."""

_QUICK: Final = 0.1
"""Seconds: after a page that took no longer the next is twice as large, for each has to be asked
for.  Over a slow link, or from a busy etcd, large ones would not come within the time limit.
"""


class EtcdStore:
    """A `Store` on an etcd cluster.  Connects when first used, and again whenever needed.

    Belongs to one event loop; gRPC wants one such loop per process.
    """

    def __init__(self, options: EtcdOptions) -> None:
        self._connection = Connection(options)

    async def get(self, key: str, revision: int = 0) -> KeyValue | None:
        """See Store.get."""
        reply = await self._send(RANGE, key=key.encode(), revision=revision)
        return etcd_messages.key_value(reply.kvs[0]) if reply.kvs else None

    async def list(self, *prefixes: str) -> Snapshot:
        """See Store.list."""
        while True:
            try:
                return await self._list(prefixes)
            except Compacted:  # between two pages
                continue

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """See Store.put."""
        reply = await self._send(PUT, key=key.encode(), value=value, lease=lease)
        return int(reply.header.revision)

    async def delete(self, key: str) -> bool:
        """See Store.delete."""
        reply = await self._send(DELETE, key=key.encode())
        return bool(reply.deleted)

    async def transact(
        self,
        conditions: Sequence[Compare],
        operations: Sequence[Put | Delete],
        parts: Sequence[Part] = (),
    ) -> TransactionResult:
        """See Store.transact."""
        check_transaction(conditions, operations, parts)
        if conditions and not self._connection.link().ready:
            # Finds an endpoint that answers, so that the transaction is not wasted on a dead one.
            await self._send(RANGE, key=conditions[0].key.encode(), keys_only=True)
        groups = [_within(_transaction((), (), map(_part, each))) for each in grouped(parts)]
        request = _transaction(conditions, operations, groups)
        repeatable = not conditions and not parts
        reply = await self._connection.send(TXN, request, repeatable=repeatable)
        return TransactionResult(_is_done(reply), reply.header.revision)

    def watch(self, since: Mapping[str, int]) -> AsyncGenerator[Changes, None]:
        """See Store.watch."""
        return etcd_watch.watch(self._connection, since)

    async def grant(self, ttl: int) -> int:
        """See Store.grant."""
        reply = await self._send(GRANT, TTL=ttl)
        return int(reply.ID)

    async def keep_alive(self, lease: int) -> int:
        """See Store.keep_alive."""
        reply = await self._send(KEEP_ALIVE, ID=lease)
        if reply.TTL <= 0:
            raise LeaseLost(f"lease {lease:x} has ended")
        return int(reply.TTL)

    async def revoke(self, lease: int) -> None:
        """See Store.revoke."""
        try:
            await self._send(REVOKE, ID=lease)
        except LeaseLost:
            return

    async def close(self) -> None:
        """See Store.close."""
        await self._connection.close()

    async def _send(self, call: etcd_messages.Call, **fields: Any) -> Any:
        return await self._connection.send(call, call.request(**fields))

    async def _list(self, prefixes: tuple[str, ...]) -> Snapshot:
        items: list[KeyValue] = []
        revision, limit = 0, _PAGE
        clock = asyncio.get_running_loop().time
        for prefix in prefixes:
            start, end = prefix.encode(), etcd_messages.prefix_end(prefix.encode())
            while True:
                asked = clock()
                page = await self._send(
                    RANGE, key=start, range_end=end, limit=limit, revision=revision
                )
                quick = clock() <= asked + _QUICK
                limit = min(2 * limit, _LARGEST_PAGE) if quick else _PAGE
                revision = revision or page.header.revision  # all pages at the first one's
                items += [etcd_messages.key_value(stored) for stored in page.kvs]
                if not page.more:
                    break
                start = page.kvs[-1].key + b"\0"
        return Snapshot(tuple(items), revision)


def _transaction(
    conditions: Iterable[Compare], operations: Iterable[Put | Delete], others: Iterable[Any] = ()
) -> Any:
    return TXN.request(
        compare=[_condition(condition) for condition in conditions],
        success=[*(_operation(operation) for operation in operations), *others],
    )


def _part(part: Part) -> Any:
    return _within(_transaction(part.conditions, part.operations))


def _within(transaction: Any) -> Any:
    return etcd_messages.RequestOp(request_txn=transaction)


def _is_done(reply: Any) -> bool:
    """Whether the conditions of a transaction held, and of all within it."""
    return reply.succeeded and all(
        _is_done(each.response_txn) for each in reply.responses if each.HasField("response_txn")
    )


def _condition(condition: Compare) -> Any:
    return etcd_messages.Compare(
        key=condition.key.encode(),
        target=etcd_messages.TARGET_MOD,
        mod_revision=condition.revision,
    )


def _operation(operation: Put | Delete) -> Any:
    key = operation.key.encode()
    if isinstance(operation, Delete):
        return etcd_messages.RequestOp(request_delete_range=DELETE.request(key=key))
    put = PUT.request(key=key, value=operation.value, lease=operation.lease)
    return etcd_messages.RequestOp(request_put=put)

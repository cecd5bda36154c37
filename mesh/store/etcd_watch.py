"""One stream that watches several prefixes of etcd, and notices when nobody is there any more.

Owns the rules of etcd's watch: fragments joined, compaction told apart from refusal, silence
probed.  Never reconnects: who follows a store resumes from the last event it has applied.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from mesh.errors import StoreUnavailable
from mesh.store import etcd_messages
from mesh.store.etcd_channel import Connection, Unreachable
from mesh.store.etcd_messages import WATCH
from mesh.store.protocol import Change, Changes, Compacted, WatchLost

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping


async def watch(connection: Connection, since: Mapping[str, int]) -> AsyncGenerator[Changes, None]:
    """See Store.watch."""
    options = connection.options
    try:
        link = connection.link()
        stream = _Stream(await link.open(WATCH, options.timeout), options.probe, options.stall)
    except (StoreUnavailable, Unreachable) as error:
        raise WatchLost(str(error)) from None
    try:
        for number, (prefix, revision) in enumerate(since.items(), start=1):
            await stream.write(create_request=_create(prefix, revision + 1, number))
        async for changes in _changes(stream, list(since.values())):
            yield changes
    except WatchLost:
        await connection.abandon(link)
        raise
    finally:
        await stream.close()


async def _changes(stream: _Stream, since: list[int]) -> AsyncGenerator[Changes, None]:
    """What the replies of the watches 1, 2, … say."""
    missing = len(since)
    parts: dict[int, list[Any]] = {}
    while True:
        reply = await stream.read()
        # Checked first: a compacted watch is cancelled while the stream stays open.
        if reply.compact_revision:
            raise Compacted(since[reply.watch_id - 1])
        if reply.canceled:
            raise WatchLost(f"etcd refuses to watch: {reply.cancel_reason or 'no reason given'}")
        if reply.created:
            missing -= 1
            if not missing:
                yield Changes((), reply.header.revision)
        elif reply.events:
            whole = parts.setdefault(reply.watch_id, [])
            whole += reply.events
            if not reply.fragment:
                changes = tuple(_change(event) for event in parts.pop(reply.watch_id))
                yield Changes(changes, changes[-1].revision)


class _Stream:
    """A watch stream that is read with one pending read, and probed when silent."""

    def __init__(self, call: Any, probe: float, stall: float) -> None:
        self._call = call
        self._probe = probe
        self._stall = stall
        self._reading: asyncio.Future[Any] | None = None

    async def write(self, **request: Any) -> None:
        """Send a request.  Raises WatchLost."""
        try:
            async with asyncio.timeout(self._probe):
                await self._call.write(WATCH.request(**request))
        except (TimeoutError, asyncio.InvalidStateError, grpc.RpcError) as error:
            raise WatchLost(_cause(error) or "etcd takes no requests") from None

    async def read(self) -> Any:
        """The next reply.  Raises WatchLost when the stream ends, or nothing comes for too long.

        Only silence after a probe counts: the reader itself may have been busy meanwhile.
        """
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
        silent = 0.0
        while not (await asyncio.wait({self._reading}, timeout=self._probe))[0]:
            silent += self._probe
            if silent >= self._stall:
                raise WatchLost(f"etcd is silent for {silent:.0f} s")
            await self.write(progress_request=etcd_messages.WatchProgressRequest())
        reading, self._reading = self._reading, None
        if reading.cancelled():
            raise WatchLost("the connection was given up")
        try:
            reply = reading.result()
        except grpc.RpcError as error:
            raise WatchLost(_cause(error)) from None
        if reply is grpc.aio.EOF:
            raise WatchLost("etcd ended the stream")
        return reply

    async def close(self) -> None:
        """End the stream; idempotent."""
        self._call.cancel()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
            if not self._reading.cancelled():
                self._reading.exception()  # retrieved: nobody waits for it any more
            self._reading = None


def _create(prefix: str, revision: int, number: int) -> Any:
    key = prefix.encode()
    return etcd_messages.WatchCreateRequest(
        key=key,
        range_end=etcd_messages.prefix_end(key),
        start_revision=revision,
        watch_id=number,
        fragment=True,
    )


def _change(event: Any) -> Change:
    key = etcd_messages.text(event.kv.key)
    deleted = event.type == etcd_messages.EVENT_DELETE
    value = None if deleted else etcd_messages.key_value(event.kv)
    return Change(key, value, event.kv.mod_revision)


def _cause(error: Exception) -> str:
    details = getattr(error, "details", None)
    return str(details()) if details else str(error)

"""What a test needs to follow a store and to wait for it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from mesh.store.etcd import EtcdStore
from mesh.store.etcd_channel import EtcdOptions
from mesh.store.protocol import Changes, Snapshot
from mesh.store.sync import Follower

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine

    from mesh.store.protocol import Store
    from tests.support.etcd import Etcd

LIMIT = 30.0
"""Seconds a store may take for anything before a test fails."""


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(LIMIT):
        while not await condition():  # noqa: ASYNC110 - a store has no event to wait for
            await asyncio.sleep(0.02)


@asynccontextmanager
async def running(work: Coroutine[object, object, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Run in the background, cancelled at the end; a failure of it is raised there."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()


class Picture:
    """What a user of a follower knows, and how many times it was replaced."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower
        self.items: dict[str, bytes] = {}
        self.events: list[tuple[str, int]] = []
        self.snapshots = 0

    async def run(self) -> None:
        async with aclosing(self.follower.updates()) as updates:
            async for update in updates:
                if isinstance(update, Snapshot):
                    self.snapshots += 1
                    self.items = {item.key: item.value for item in update.items}
                    continue
                for change in update.changes:
                    self.events.append((change.key, change.revision))
                    if change.value is None:
                        self.items.pop(change.key, None)
                    else:
                        self.items[change.key] = change.value.value

    async def shows(self, expected: dict[str, bytes]) -> None:
        async with asyncio.timeout(LIMIT):
            while self.items != expected:  # noqa: ASYNC110 - the follower has no event for this
                await asyncio.sleep(0.01)

    async def connects(self) -> None:
        async def connected() -> bool:
            return self.follower.connected

        await eventually(connected)

    async def disconnects(self) -> None:
        async def lost() -> bool:
            return not self.follower.connected

        await eventually(lost)


@asynccontextmanager
async def following(store: Store, *prefixes: str) -> AsyncIterator[Picture]:
    picture = Picture(Follower(store, *prefixes))
    async with running(picture.run()):
        await picture.connects()
        yield picture


class Watch:
    """Reads a watch; `established` is the store's revision when it began."""

    def __init__(self, stream: AsyncGenerator[Changes, None]) -> None:
        self._stream = stream
        self.seen: list[tuple[str, bytes | None]] = []
        self.batches: list[Changes] = []

    async def next(self) -> Changes:
        async with asyncio.timeout(LIMIT):
            changes = await anext(self._stream)
        if changes.changes:
            self.batches.append(changes)
        self.seen += [(c.key, c.value.value if c.value else None) for c in changes.changes]
        return changes

    async def until(self, count: int) -> list[tuple[str, bytes | None]]:
        while len(self.seen) < count:
            await self.next()
        return self.seen


@asynccontextmanager
async def connected(options: EtcdOptions) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(options)
    try:
        yield store
    finally:
        await store.close()


def to(*servers: Etcd) -> EtcdOptions:
    return EtcdOptions(tuple(server.url for server in servers), probe=0.3, stall=0.9)

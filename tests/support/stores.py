"""What a test needs to follow a store and to wait for it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from mesh.store.protocol import Snapshot
from mesh.store.sync import Follower

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    from mesh.store.protocol import Store

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

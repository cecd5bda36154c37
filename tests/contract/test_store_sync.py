"""Following a store loses nothing, whatever happens to the store meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mesh.store.memory import MemoryStore
from mesh.store.protocol import Put
from tests.support.stores import following

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def store() -> AsyncIterator[MemoryStore]:
    store = MemoryStore()
    yield store
    await store.close()


async def test_the_picture_begins_with_everything_and_then_follows(store: MemoryStore) -> None:
    await store.put("/a/1", b"1")
    await store.put("/b/1", b"1")
    await store.put("/c/1", b"not followed")

    async with following(store, "/a/", "/b/") as picture:
        await store.put("/a/2", b"2")
        await store.delete("/b/1")
        await picture.shows({"/a/1": b"1", "/a/2": b"2"})

    assert picture.snapshots == 1


async def test_an_empty_store_is_a_picture_too(store: MemoryStore) -> None:
    async with following(store, "/a/") as picture:
        assert picture.snapshots == 1
        await store.put("/a/1", b"1")
        await picture.shows({"/a/1": b"1"})


async def test_an_outage_is_caught_up_with_event_by_event(store: MemoryStore) -> None:
    await store.put("/a/1", b"1")
    async with following(store, "/a/", "/b/") as picture:
        await store.put("/a/2", b"2")
        await picture.shows({"/a/1": b"1", "/a/2": b"2"})

        store.stop()

        await picture.disconnects()
        assert picture.items == {"/a/1": b"1", "/a/2": b"2"}
        store.start()
        await store.put("/b/1", b"1")
        await store.delete("/a/1")
        await picture.shows({"/a/2": b"2", "/b/1": b"1"})
        await picture.connects()

    assert picture.snapshots == 1
    assert len(picture.events) == 3 == len(set(picture.events))


async def test_an_outage_is_told_with_its_cause(store: MemoryStore) -> None:
    async with following(store, "/a/") as picture:
        told = [picture.follower.cause]

        store.stop()
        await picture.disconnects()
        told.append(picture.follower.cause)

    assert told[0] is None
    assert "stopped" in str(told[1])


async def test_what_was_compacted_during_an_outage_is_listed_again(store: MemoryStore) -> None:
    await store.put("/a/1", b"1")
    async with following(store, "/a/") as picture:
        store.stop()
        await picture.disconnects()
        store.start()
        await store.delete("/a/1")
        revision = await store.put("/a/2", b"2")
        store.compact(revision + 1)
        await picture.shows({"/a/2": b"2"})

    assert picture.snapshots == 2


async def test_a_wiped_store_is_listed_again(store: MemoryStore) -> None:
    await store.put("/a/1", b"1")
    await store.put("/a/2", b"1")
    async with following(store, "/a/") as picture:
        store.wipe()
        await store.put("/a/3", b"3")
        await picture.shows({"/a/3": b"3"})

    assert picture.snapshots == 2


async def test_a_wiped_store_that_has_grown_past_the_old_one_is_listed_again(
    store: MemoryStore,
) -> None:
    await store.put("/a/1", b"1")
    async with following(store, "/a/", "/b/") as picture:
        await store.put("/b/1", b"1")
        await picture.shows({"/a/1": b"1", "/b/1": b"1"})

        store.wipe()
        for number in range(40):
            await store.transact([], [Put(f"/a/{number}", b"new"), Put("/c", b"")])

        await picture.shows({f"/a/{number}": b"new" for number in range(40)})

    assert picture.snapshots == 2

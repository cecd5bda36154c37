"""What every store promises: one suite, each driver."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from mesh.errors import StoreUnavailable
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_channel import EtcdOptions
from mesh.store.memory import MemoryStore
from mesh.store.protocol import (
    MAX_OPERATIONS,
    Changes,
    Compacted,
    Compare,
    Delete,
    KeyValue,
    LeaseLost,
    Put,
    Store,
)
from tests.support.etcd import Etcd, etcd
from tests.support.stores import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping


@dataclass(frozen=True)
class World:
    """A store, and what only its owner can do to it."""

    store: Store
    compact: Callable[[int], None]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.cluster)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    if request.param == "memory":
        memory = MemoryStore()
        yield World(memory, memory.compact)
        await memory.close()
    else:
        server: Etcd = request.getfixturevalue("server")
        store = EtcdStore(EtcdOptions((server.url,)))
        yield World(store, server.compact)
        await store.close()


@pytest.fixture
def store(world: World) -> Store:
    return world.store


@pytest.fixture
def top(request: pytest.FixtureRequest) -> str:
    """A prefix no other test uses: some stores serve the whole module."""
    return f"/{request.node.name}/"


def watching(store: Store, since: Mapping[str, int]) -> aclosing[AsyncGenerator[Changes, None]]:
    return aclosing(store.watch(since))


async def test_a_missing_key_is_nothing(store: Store, top: str) -> None:
    assert await store.get(f"{top}a") is None
    assert await store.delete(f"{top}a") is False


async def test_a_key_knows_when_it_was_written(store: Store, top: str) -> None:
    first = await store.put(f"{top}a", b"1")
    second = await store.put(f"{top}a", b"2")

    item = await store.get(f"{top}a")

    assert item == KeyValue(f"{top}a", b"2", first, second, 2, 0)
    assert first < second


async def test_a_key_written_again_after_its_deletion_begins_anew(store: Store, top: str) -> None:
    await store.put(f"{top}a", b"1")
    await store.put(f"{top}a", b"2")
    assert await store.delete(f"{top}a") is True
    revision = await store.put(f"{top}a", b"3")

    item = await store.get(f"{top}a")

    assert item == KeyValue(f"{top}a", b"3", revision, revision, 1, 0)


async def test_any_bytes_and_any_text_come_back(store: Store, top: str) -> None:
    key, value = f"{top}ключ/☂", bytes(range(256))

    await store.put(key, value)

    item = await store.get(key)
    assert item is not None
    assert (item.key, item.value) == (key, value)


async def test_a_list_has_what_is_under_its_prefixes_and_nothing_else(
    store: Store, top: str
) -> None:
    for name in ("b/2", "a/1", "b/1", "b", "c/1", "bb/1"):
        await store.put(top + name, name.encode())
    revision = await store.put(f"{top}d", b"")

    snapshot = await store.list(f"{top}b/", f"{top}c/")

    assert [item.key for item in snapshot.items] == [f"{top}b/1", f"{top}b/2", f"{top}c/1"]
    assert snapshot.revision == revision


async def test_a_list_of_many_pages_is_complete(store: Store, top: str) -> None:
    names = [f"{top}{number:05}" for number in range(2500)]
    for start in range(0, len(names), 100):
        await store.transact([], [Put(name, b"x") for name in names[start : start + 100]])

    snapshot = await store.list(top)

    assert [item.key for item in snapshot.items] == names


async def test_a_list_stays_at_one_revision_while_others_write(store: Store, top: str) -> None:
    keys = [f"{top}{number:05}" for number in range(1200)]
    for start in range(0, len(keys), 100):
        await store.transact([], [Put(key, b"0") for key in keys[start : start + 100]])

    async def write() -> None:
        for number in range(50):
            await store.transact([], [Put(keys[0], b"%d" % number), Put(keys[-1], b"%d" % number)])

    writer = asyncio.create_task(write())
    snapshots = []
    while not writer.done():
        snapshots.append(await store.list(top))
        await asyncio.sleep(0)
    await writer

    assert all(shot.items[0].value == shot.items[-1].value for shot in snapshots)


async def test_a_transaction_is_one_revision(store: Store, top: str) -> None:
    before = await store.put(f"{top}a", b"1")

    result = await store.transact(
        [Compare(f"{top}a", before), Compare(f"{top}new", 0)],
        [Put(f"{top}b", b"2"), Put(f"{top}new", b"3"), Delete(f"{top}a")],
    )

    snapshot = await store.list(top)
    assert result == (True, before + 1)
    assert [(item.key, item.mod_revision) for item in snapshot.items] == [
        (f"{top}b", before + 1),
        (f"{top}new", before + 1),
    ]


@pytest.mark.parametrize("wrong", ["older", "absent"])
async def test_a_transaction_whose_condition_fails_does_nothing(
    store: Store, top: str, wrong: str
) -> None:
    first = await store.put(f"{top}a", b"1")
    last = await store.put(f"{top}a", b"2")
    condition = Compare(f"{top}a", first if wrong == "older" else 0)

    result = await store.transact([condition], [Put(f"{top}a", b"3"), Delete(f"{top}b")])

    item = await store.get(f"{top}a")
    assert result == (False, last)
    assert item is not None
    assert item.value == b"2"


async def test_a_transaction_that_changes_nothing_makes_no_revision(store: Store, top: str) -> None:
    before = await store.put(f"{top}a", b"1")

    result = await store.transact([Compare(f"{top}a", before)], [Delete(f"{top}none")])

    assert result == (True, before)


async def test_a_transaction_etcd_would_refuse_is_refused(store: Store, top: str) -> None:
    largest = [Put(f"{top}{number}", b"") for number in range(MAX_OPERATIONS)]

    assert (await store.transact([], largest)).succeeded
    with pytest.raises(ValueError, match="129 operations"):
        await store.transact([], [*largest, Put(f"{top}more", b"")])
    with pytest.raises(ValueError, match="twice"):
        await store.transact([], [Put(f"{top}a", b""), Delete(f"{top}a")])


async def test_the_past_can_be_read_until_it_is_compacted(world: World, top: str) -> None:
    store = world.store
    first = await store.put(f"{top}a", b"1")
    await store.put(f"{top}a", b"2")
    gone = await store.put(f"{top}b", b"")
    await store.delete(f"{top}a")

    past = await store.get(f"{top}a", first)
    assert past is not None
    assert past.value == b"1"
    assert await store.get(f"{top}b", first) is None
    with pytest.raises(Compacted):
        await store.get(f"{top}a", gone + 1000)

    world.compact(gone)

    kept = await store.get(f"{top}a", gone)
    assert kept is not None
    assert kept.value == b"2"
    with pytest.raises(Compacted):
        await store.get(f"{top}a", first)


async def test_a_watch_sees_every_event_after_its_revision_in_order(store: Store, top: str) -> None:
    before = await store.put(f"{top}a", b"0")
    await store.put(f"{top}a", b"1")
    await store.put(f"{top}outside"[1:], b"")

    async with watching(store, {top: before}) as stream:
        watch = Watch(stream)
        await watch.until(1)
        await store.put(f"{top}b", b"2")
        await store.delete(f"{top}a")
        last = await store.put(f"{top}a", b"3")
        await watch.until(4)

    assert watch.seen == [
        (f"{top}a", b"1"),
        (f"{top}b", b"2"),
        (f"{top}a", None),
        (f"{top}a", b"3"),
    ]
    assert watch.batches[-1].revision == last == watch.batches[-1].changes[-1].revision
    assert watch.batches[-1].changes[-1].value == await store.get(f"{top}a")


async def test_a_watch_says_once_that_it_is_established(store: Store, top: str) -> None:
    revision = await store.put(f"{top}a", b"1")

    async with watching(store, {f"{top}a": revision, f"{top}b": revision}) as stream:
        established = await Watch(stream).next()
        await store.put(f"{top}b", b"2")
        news = await Watch(stream).next()

    assert established == Changes((), revision)
    assert [change.key for change in news.changes] == [f"{top}b"]


async def test_each_prefix_of_a_watch_resumes_from_its_own_revision(store: Store, top: str) -> None:
    first = await store.put(f"{top}a/1", b"")
    await store.put(f"{top}b/1", b"")
    await store.put(f"{top}a/2", b"")
    third = await store.put(f"{top}c/1", b"")
    await store.put(f"{top}b/2", b"")

    async with watching(store, {f"{top}a/": first, f"{top}b/": third}) as stream:
        watch = Watch(stream)
        await watch.until(2)
        await store.put(f"{top}c/2", b"")
        await store.put(f"{top}b/3", b"")
        await watch.until(3)

    assert sorted(watch.seen) == [(f"{top}a/2", b""), (f"{top}b/2", b""), (f"{top}b/3", b"")]


async def test_a_transaction_reaches_a_watch_in_one_piece(store: Store, top: str) -> None:
    before = await store.put(f"{top}other", b"")

    async with watching(store, {f"{top}in/": before}) as stream:
        watch = Watch(stream)
        await watch.next()
        await store.transact([], [Put(f"{top}in/{number}", b"1") for number in range(100)])
        await store.transact([], [Delete(f"{top}in/{number}") for number in range(50)])
        await watch.until(150)

    pieces = [{change.revision for change in batch.changes} for batch in watch.batches]
    assert sum(len(piece) for piece in pieces) == len(set().union(*pieces)) == 2


async def test_a_watch_far_behind_catches_up_without_tearing_a_transaction(
    store: Store, top: str
) -> None:
    before = await store.put(f"{top}other", b"")
    for turn in range(10):
        value = b"%d" % turn * 20_000
        await store.transact([], [Put(f"{top}in/{number}", value) for number in range(60)])

    async with watching(store, {f"{top}in/": before}) as stream:
        watch = Watch(stream)
        await watch.until(600)

    assert [key for key, _ in watch.seen] == [f"{top}in/{number}" for number in range(60)] * 10
    assert all(len(batch.changes) % 60 == 0 for batch in watch.batches)


async def test_a_watch_from_before_a_compaction_says_so(world: World, top: str) -> None:
    store = world.store
    first = await store.put(f"{top}a", b"0")
    for number in range(5):
        last = await store.put(f"{top}a", b"%d" % number)
    world.compact(last)

    async with watching(store, {top: first}) as stream:
        with pytest.raises(Compacted):
            await Watch(stream).until(1)

    async with watching(store, {top: last - 1}) as stream:
        assert await Watch(stream).until(1) == [(f"{top}a", b"4")]


async def test_a_lease_that_runs_out_takes_its_keys_along(store: Store, top: str) -> None:
    lease = await store.grant(1)
    before = await store.put(f"{top}a", b"1", lease)
    await store.put(f"{top}b", b"1")

    async with watching(store, {top: before + 1}) as stream:
        watch = Watch(stream)
        await watch.until(1)

    assert watch.seen == [(f"{top}a", None)]
    with pytest.raises(LeaseLost):
        await store.keep_alive(lease)


async def test_a_lease_that_is_kept_alive_stays(store: Store, top: str) -> None:
    lease = await store.grant(2)
    await store.put(f"{top}a", b"1", lease)

    for _ in range(6):
        assert 0 < await store.keep_alive(lease) <= 2
        await asyncio.sleep(0.5)

    item = await store.get(f"{top}a")
    assert item is not None
    assert item.lease == lease


async def test_a_revoked_lease_takes_its_keys_along_at_once(store: Store, top: str) -> None:
    lease = await store.grant(600)
    await store.transact([], [Put(f"{top}a", b"1", lease), Put(f"{top}b", b"1", lease)])
    await store.put(f"{top}b", b"without the lease now")

    await store.revoke(lease)
    await store.revoke(lease)

    assert [item.key for item in (await store.list(top)).items] == [f"{top}b"]


async def test_an_unknown_lease_is_refused_and_nothing_is_written(store: Store, top: str) -> None:
    lease = await store.grant(600)
    await store.revoke(lease)

    with pytest.raises(LeaseLost):
        await store.put(f"{top}a", b"1", lease)
    with pytest.raises(LeaseLost):
        await store.transact([], [Put(f"{top}b", b"1"), Put(f"{top}a", b"1", lease)])
    with pytest.raises(LeaseLost):
        await store.keep_alive(lease)

    assert (await store.list(top)).items == ()


async def test_a_closed_store_answers_no_more(store: Store, top: str) -> None:
    await store.close()
    await store.close()

    with pytest.raises(StoreUnavailable):
        await store.get(f"{top}a")

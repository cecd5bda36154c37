"""Large transactions: more operations than one list of etcd's takes, in parts; one suite, each
driver.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from mesh.store.etcd import EtcdStore
from mesh.store.etcd_channel import EtcdOptions
from mesh.store.memory import MemoryStore
from mesh.store.protocol import (
    MAX_BESIDE,
    MAX_BYTES,
    MAX_GROUP,
    MAX_PART,
    Compare,
    Delete,
    Part,
    Put,
    Store,
)
from tests.support.etcd import Etcd, etcd
from tests.support.stores import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.cluster)])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    store: Store
    if request.param == "memory":
        store = MemoryStore()
    else:
        store = EtcdStore(EtcdOptions((request.getfixturevalue("server").url,)))
    yield store
    await store.close()


@pytest.fixture
def top(request: pytest.FixtureRequest) -> str:
    """A prefix no other test uses."""
    return f"/{request.node.name}/"


def part(top: str, number: int, revision: int = 0, size: int = MAX_PART) -> Part:
    """Keys that nobody has written since `revision` are written."""
    keys = [f"{top}{number:03}/{each:02}" for each in range(size)]
    return Part(
        tuple(Compare(key, revision) for key in keys), tuple(Put(key, b"1") for key in keys)
    )


async def test_all_parts_are_one_revision_and_reach_a_watch_in_one_piece(
    store: Store, top: str
) -> None:
    before = await store.put(f"{top}leader", b"")
    parts = [part(top, number) for number in range(2 * MAX_GROUP)]
    least = [Put(f"{top}beside/{number}", b"") for number in range(MAX_BESIDE - 2)]

    async with aclosing(store.watch({top: before})) as stream:
        watch = Watch(stream)
        await watch.next()
        result = await store.transact([Compare(f"{top}leader", before)], least, parts)
        await watch.next()

    assert result == (True, before + 1)
    (piece,) = watch.batches
    assert len(piece.changes) == 2 * MAX_GROUP * MAX_PART + len(least)
    assert {change.revision for change in piece.changes} == {before + 1}


async def test_a_part_whose_condition_fails_is_left_out_and_told(store: Store, top: str) -> None:
    taken = await store.put(f"{top}001/07", b"somebody's")

    result = await store.transact([], [Put(f"{top}a", b"")], [part(top, n) for n in range(3)])

    items = (await store.list(top)).items
    assert result == (False, taken + 1)
    assert [item.value for item in items if item.key.startswith(f"{top}001/")] == [b"somebody's"]
    assert len(items) == 2 * MAX_PART + 2


async def test_without_the_transaction_s_own_condition_no_part_is_done(
    store: Store, top: str
) -> None:
    before = await store.put(f"{top}leader", b"")

    result = await store.transact([Compare(f"{top}leader", 0)], [], [part(top, 1)])

    assert result == (False, before)
    assert [item.key for item in (await store.list(top)).items] == [f"{top}leader"]


async def test_parts_delete_as_well(store: Store, top: str) -> None:
    given = await store.transact([], [], [part(top, number) for number in range(3)])
    keys = [item.key for item in (await store.list(top)).items]
    gone = [
        Part(tuple(Compare(key, given.revision) for key in some), tuple(map(Delete, some)))
        for some in (keys[:MAX_PART], keys[MAX_PART : 2 * MAX_PART])
    ]

    result = await store.transact([], [], gone)

    assert result == (True, given.revision + 1)
    assert [item.key for item in (await store.list(top)).items] == keys[2 * MAX_PART :]


async def test_as_many_bytes_are_taken_as_are_promised(store: Store, top: str) -> None:
    value = b"x" * (MAX_BYTES // (4 * MAX_PART))
    parts = [
        Part(conditions, tuple(Put(put.key, value) for put in operations if isinstance(put, Put)))
        for conditions, operations in (part(top, number) for number in range(4))
    ]

    assert (await store.transact([], [], parts)).succeeded


async def test_parts_etcd_would_refuse_are_refused(store: Store, top: str) -> None:
    one, beside = part(top, 1), [Put(f"{top}{number}", b"") for number in range(MAX_BESIDE)]

    with pytest.raises(ValueError, match="a transaction takes 32"):
        await store.transact([], beside, [one])
    with pytest.raises(ValueError, match="a transaction takes 32"):
        await store.transact([Compare(put.key, 0) for put in [*beside, *beside]], [], [one])
    with pytest.raises(ValueError, match="a part takes 64"):
        await store.transact([], [], [part(top, 2, size=MAX_PART + 1)])
    with pytest.raises(ValueError, match="twice"):
        await store.transact([], [], [one, one])

"""Keys that live as long as their process, and one leader at a time."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from mesh.store.election import Election
from mesh.store.lease import LeaseHolder
from mesh.store.memory import MemoryStore
from mesh.store.protocol import Compare, Put
from tests.support.stores import eventually, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def store() -> AsyncIterator[MemoryStore]:
    store = MemoryStore()
    yield store
    await store.close()


async def keys(store: MemoryStore) -> dict[str, bytes]:
    return {item.key: item.value for item in (await store.list("/")).items}


async def shows(store: MemoryStore, expected: dict[str, bytes]) -> None:
    async def same() -> bool:
        return await keys(store) == expected

    await eventually(same)


async def test_held_keys_appear_change_and_go(store: MemoryStore) -> None:
    holder = LeaseHolder(store, 10)
    await holder.put("/early", b"1")

    async with running(holder.run()):
        await shows(store, {"/early": b"1"})
        await holder.put("/late", b"2")
        assert await keys(store) == {"/early": b"1", "/late": b"2"}
        await holder.put("/early", b"3")
        await holder.delete("/late")
        assert await keys(store) == {"/early": b"3"}


async def test_held_keys_outlive_their_lease_time(store: MemoryStore) -> None:
    holder = LeaseHolder(store, 1)
    await holder.put("/a", b"1")

    async with running(holder.run()):
        await shows(store, {"/a": b"1"})
        written = await store.get("/a")
        await asyncio.sleep(1.5)
        assert holder.alive_until > asyncio.get_running_loop().time()
        assert await store.get("/a") == written


async def test_a_clean_stop_takes_the_keys_away_at_once(store: MemoryStore) -> None:
    holder = LeaseHolder(store, 600)
    await holder.put("/a", b"1")
    async with running(holder.run()) as run:
        await shows(store, {"/a": b"1"})

        await holder.stop()

        assert await keys(store) == {}
        await asyncio.wait_for(run, 5)


async def test_a_crash_leaves_the_keys_until_the_lease_ends(store: MemoryStore) -> None:
    holder = LeaseHolder(store, 1)
    await holder.put("/a", b"1")
    async with running(holder.run()):
        await shows(store, {"/a": b"1"})

    assert await keys(store) == {"/a": b"1"}
    await shows(store, {})


async def test_an_expired_lease_is_replaced_and_its_keys_written_again(store: MemoryStore) -> None:
    holder = LeaseHolder(store, 2)
    wanted = {f"/{number}": b"%d" % number for number in range(300)}
    for key, value in wanted.items():
        await holder.put(key, value)
    async with running(holder.run()):
        await shows(store, wanted)
        item = await store.get("/1")
        assert item is not None

        store.expire(item.lease)

        assert await keys(store) == {}
        await shows(store, wanted)


async def test_a_wiped_store_gets_the_keys_again(store: MemoryStore) -> None:
    holder = LeaseHolder(store, 2)
    await holder.put("/a", b"1")
    async with running(holder.run()):
        await shows(store, {"/a": b"1"})

        store.wipe()

        await shows(store, {"/a": b"1"})


async def test_what_changes_during_an_outage_is_written_after_it(store: MemoryStore) -> None:
    holder = LeaseHolder(store, 10)
    await holder.put("/a", b"1")
    await holder.put("/b", b"1")
    async with running(holder.run()):
        await shows(store, {"/a": b"1", "/b": b"1"})

        store.stop()
        await holder.put("/a", b"2")
        await holder.delete("/b")
        await holder.put("/c", b"2")
        store.start()

        await shows(store, {"/a": b"2", "/c": b"2"})


class Candidate:
    """Leads until cancelled, and remembers its terms."""

    def __init__(self, store: MemoryStore, name: str, ttl: int) -> None:
        self.election = Election(store, "/leader", name, ttl)
        self.terms: list[Compare] = []
        self.leading = False

    async def lead(self, guard: Compare) -> None:
        self.terms.append(guard)
        self.leading = True
        try:
            await asyncio.Event().wait()
        finally:
            self.leading = False


async def one_leads(*candidates: Candidate) -> Candidate:
    async def elected() -> bool:
        return any(candidate.leading for candidate in candidates)

    await eventually(elected)
    (leader,) = (candidate for candidate in candidates if candidate.leading)
    return leader


async def test_of_many_candidates_one_leads(store: MemoryStore) -> None:
    candidates = [Candidate(store, name, 10) for name in ("n1", "n2", "n3")]
    async with AsyncExitStack() as stack:
        for candidate in candidates:
            await stack.enter_async_context(running(candidate.election.run(candidate.lead)))

        leader = await one_leads(*candidates)

        assert leader.election.leading
        item = await store.get("/leader")
        assert item is not None
        assert item.mod_revision == leader.terms[0].revision


async def test_a_leader_stays_in_office_for_many_lease_times(store: MemoryStore) -> None:
    candidate = Candidate(store, "n1", 1)
    async with running(candidate.election.run(candidate.lead)):
        await one_leads(candidate)
        await asyncio.sleep(2.5)

        assert candidate.leading
        assert len(candidate.terms) == 1


async def test_a_leader_that_leaves_is_replaced_at_once(store: MemoryStore) -> None:
    first, second = Candidate(store, "n1", 600), Candidate(store, "n2", 600)
    async with running(second.election.run(second.lead)):
        async with running(first.election.run(first.lead)):
            leader = await one_leads(first, second)
        if leader is first:
            assert await one_leads(second) is second
        assert await keys(store) == {"/leader": b"n2"}
    assert await keys(store) == {}


async def test_a_deposed_leader_stops_and_its_writes_fail(store: MemoryStore) -> None:
    candidate = Candidate(store, "n1", 3)
    async with running(candidate.election.run(candidate.lead)):
        await one_leads(candidate)
        guard = candidate.terms[0]
        assert (await store.transact([guard], [Put("/work", b"1")])).succeeded

        await store.put("/leader", b"somebody else")

        assert not (await store.transact([guard], [Put("/work", b"2")])).succeeded

        async def stopped() -> bool:
            return not candidate.leading

        await eventually(stopped)
        await store.delete("/leader")
        await one_leads(candidate)


async def test_a_leader_cut_off_from_the_store_stops_before_its_lease_ends(
    store: MemoryStore,
) -> None:
    loop = asyncio.get_running_loop()
    candidate = Candidate(store, "n1", 2)
    async with running(candidate.election.run(candidate.lead)):
        await one_leads(candidate)

        store.stop()
        cut = loop.time()

        async def stopped() -> bool:
            return not candidate.leading

        await eventually(stopped)
        assert loop.time() - cut < 2
        store.start()
        await one_leads(candidate)


async def test_a_leader_whose_work_fails_says_so_and_resigns(store: MemoryStore) -> None:
    async def lead(_guard: Compare) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        await Election(store, "/leader", "n1", 600).run(lead)

    assert await keys(store) == {}

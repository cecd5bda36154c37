"""What an etcd cluster can do to its clients, and how little they mind."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from mesh.errors import BadUsage, StoreUnavailable
from mesh.store.election import Election
from mesh.store.etcd_channel import EtcdOptions
from mesh.store.lease import LeaseHolder
from mesh.store.protocol import Compare, Put
from tests.support.etcd import Etcd, cluster, etcd, free_port
from tests.support.stores import Picture, connected, eventually, following, running, to

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

    from mesh.store.etcd import EtcdStore

pytestmark = pytest.mark.cluster


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Etcd]:
    with etcd(tmp_path) as server:
        yield server


@pytest.fixture
def members(tmp_path: Path) -> Iterator[list[Etcd]]:
    with cluster(tmp_path, 3) as members:
        yield members


class Writer:
    """Writes numbered keys until told to stop, through endpoints of its own."""

    def __init__(self, store: EtcdStore) -> None:
        self._store = store
        self._stop = asyncio.Event()
        self.written: dict[str, bytes] = {}

    async def run(self) -> None:
        while not self._stop.is_set():
            key, value = f"/a/{len(self.written)}", b"x" * 100
            try:
                await self._store.put(key, value)
            except StoreUnavailable:
                continue
            self.written[key] = value
            await asyncio.sleep(0.002)

    async def writes(self, count: int) -> None:
        target = len(self.written) + count

        async def written() -> bool:
            return len(self.written) >= target

        await eventually(written)

    def stop(self) -> None:
        self._stop.set()


async def nothing_is_lost(picture: Picture, writer: Writer) -> None:
    writer.stop()
    await picture.shows(writer.written)
    assert picture.snapshots == 1
    revisions = [revision for _, revision in picture.events]
    assert revisions == sorted(set(revisions))


async def test_a_restarted_server_loses_no_event(server: Etcd) -> None:
    async with (
        connected(to(server)) as store,
        connected(to(server)) as other,
        following(store, "/a/") as picture,
    ):
        writer = Writer(other)
        async with running(writer.run()):
            await writer.writes(50)
            server.stop()
            await picture.disconnects()
            await asyncio.to_thread(server.start)
            await writer.writes(50)
            await nothing_is_lost(picture, writer)


async def test_a_frozen_server_is_noticed_and_taken_back(server: Etcd) -> None:
    async with connected(to(server)) as store, following(store, "/a/") as picture:
        await store.put("/a/1", b"1")
        await picture.shows({"/a/1": b"1"})

        frozen = time.monotonic()
        server.freeze()
        await picture.disconnects()
        assert time.monotonic() - frozen < 3
        server.thaw()

        await picture.connects()
        await store.put("/a/2", b"2")
        await picture.shows({"/a/1": b"1", "/a/2": b"2"})
        assert picture.snapshots == 1


async def test_a_quiet_watch_is_not_taken_for_a_frozen_server(server: Etcd) -> None:
    async with connected(to(server)) as store, following(store, "/a/", "/b/") as picture:
        for _ in range(15):
            await asyncio.sleep(0.1)
            assert picture.follower.connected


@pytest.mark.parametrize("fault", ["frozen", "killed"])
async def test_a_lost_member_is_left_for_another_and_no_event_is_lost(
    members: list[Etcd], fault: str
) -> None:
    first, *rest = members
    async with (
        connected(to(*members)) as store,
        connected(to(*rest)) as other,
        following(store, "/a/") as picture,
    ):
        writer = Writer(other)
        async with running(writer.run()):
            await writer.writes(20)
            if fault == "frozen":
                first.freeze()
            else:
                first.stop()
            began = time.monotonic()
            await store.put("/b", b"through another member")
            assert time.monotonic() - began < 5
            await writer.writes(20)
            await nothing_is_lost(picture, writer)


async def test_a_call_to_a_frozen_member_goes_on_to_the_next(members: list[Etcd]) -> None:
    async with connected(to(*members)) as store:
        await store.get("/a")
        members[0].freeze()

        assert await store.put("/a", b"1") > 0
        assert (await store.transact([Compare("/b", 0)], [Put("/b", b"1")])).succeeded


async def test_endpoints_that_are_dead_or_mute_cost_little(server: Etcd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        endpoints = (
            f"http://127.0.0.1:{free_port()}",
            f"http://127.0.0.1:{mute.getsockname()[1]}",
            server.url,
        )
        async with connected(EtcdOptions(endpoints)) as store:
            began = time.monotonic()
            await store.put("/a", b"1")
            assert time.monotonic() - began < 5

            began = time.monotonic()
            assert (await store.transact([Compare("/b", 0)], [Put("/b", b"1")])).succeeded
            async with following(store, "/") as picture:
                assert picture.items == {"/a": b"1", "/b": b"1"}
            assert time.monotonic() - began < 1


async def test_a_first_call_with_a_condition_finds_the_endpoint_that_answers(server: Etcd) -> None:
    endpoints = (f"http://127.0.0.1:{free_port()}", server.url)
    async with connected(EtcdOptions(endpoints)) as store:
        assert (await store.transact([Compare("/b", 0)], [Put("/b", b"1")])).succeeded


async def test_no_endpoint_at_all_is_an_error_that_names_them() -> None:
    endpoints = tuple(f"http://127.0.0.1:{free_port()}" for _ in range(2))
    async with connected(EtcdOptions(endpoints, timeout=0.5)) as store:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable) as failure:
            await store.get("/a")
        assert time.monotonic() - began < 2
        assert all(endpoint in str(failure.value) for endpoint in endpoints)
        assert "\n" not in str(failure.value)


def test_an_endpoint_that_is_none_is_refused_at_once() -> None:
    for endpoint in ("127.0.0.1:2379", "ftp://a:1", "http://", "http://a:b", "http://a/b"):
        with pytest.raises(BadUsage):
            EtcdOptions((endpoint,))
    with pytest.raises(BadUsage):
        EtcdOptions(())


async def test_a_condition_is_not_tried_twice_when_the_outcome_is_unknown(server: Etcd) -> None:
    options = EtcdOptions((server.url,), timeout=0.5)
    async with connected(options) as store, connected(to(server)) as other:
        await store.get("/a")
        server.freeze()
        with pytest.raises(StoreUnavailable, match="unknown"):
            await store.transact([Compare("/a", 0)], [Put("/a", b"1")])
        server.thaw()

        assert await other.put("/b", b"") > 0
        item = await store.get("/a")
        assert item is None or item.version == 1


async def test_what_was_compacted_while_the_server_was_away_is_listed_again(server: Etcd) -> None:
    async with connected(to(server)) as store, following(store, "/a/", "/b/") as picture:
        await store.put("/a/1", b"1")
        await picture.shows({"/a/1": b"1"})
        server.stop()
        await picture.disconnects()
        async with connected(to(server)) as other:
            server.launch()
            server.wait_healthy()
            await other.delete("/a/1")
            server.compact(await other.put("/b/1", b"2"))
        await picture.shows({"/b/1": b"2"})


async def test_a_server_that_lost_its_disk_gets_its_leased_keys_and_gives_a_new_picture(
    server: Etcd,
) -> None:
    async with connected(to(server)) as store:
        holder = LeaseHolder(store, 2)
        await holder.put("/a/alive", b"1")
        await store.put("/a/1", b"1")
        async with running(holder.run()), following(store, "/a/") as picture:
            await picture.shows({"/a/alive": b"1", "/a/1": b"1"})

            server.stop()
            server.wipe()
            await asyncio.to_thread(server.start)
            for number in range(30):  # the new store soon outgrows the old one
                await store.put("/b", b"%d" % number)

            await picture.shows({"/a/alive": b"1"})
            assert picture.snapshots >= 2
            await holder.stop()
            await picture.shows({})


async def test_a_leader_that_vanishes_is_replaced(server: Etcd) -> None:
    led: list[str] = []

    def candidate(store: EtcdStore, name: str) -> Election:
        return Election(store, "/leader", name, 2)

    async def elected(count: int) -> None:
        async def reached() -> bool:
            return len(led) >= count

        await eventually(reached)

    def lead(name: str) -> Callable[[Compare], Coroutine[object, object, None]]:
        async def work(_guard: Compare) -> None:
            led.append(name)
            await asyncio.Event().wait()

        return work

    async with (
        connected(to(server)) as one,
        connected(to(server)) as two,
        running(candidate(one, "n1").run(lead("n1"))),
    ):
        await elected(1)
        async with running(candidate(two, "n2").run(lead("n2"))):
            await one.close()
            await elected(2)

    assert led == ["n1", "n2"]


async def test_keys_that_are_no_text_disturb_nobody(server: Etcd) -> None:
    async with connected(to(server)) as store, following(store, "/a/") as picture:
        server.gateway("kv/put", {"key": "L2Ev//8=", "value": ""})  # /a/ and two bytes 0xff
        await store.put("/a/1", b"1")
        await picture.shows({"/a/\\xff\\xff": b"", "/a/1": b"1"})
        assert len((await store.list("/a/")).items) == 2


UVLOOP = """
import asyncio, contextlib, sys, uvloop
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_channel import EtcdOptions

async def main():
    store = EtcdStore(EtcdOptions((sys.argv[1],)))
    revision = await store.put("/a", b"1")
    async with contextlib.aclosing(store.watch({"/a": revision - 1})) as stream:
        async for changes in stream:
            if changes.changes:
                break
    assert await store.keep_alive(await store.grant(5)) == 5
    await store.close()
    print([change.key for change in changes.changes])

uvloop.run(main())
"""


def test_it_works_on_uvloop_and_leaves_no_warning(server: Etcd) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", UVLOOP, server.url],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (result.stdout, result.stderr) == ("['/a']\n", "")

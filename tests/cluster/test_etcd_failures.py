"""What an etcd cluster can do to its clients, and how little they mind."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from mesh.errors import BadUsage, StoreUnavailable
from mesh.store.election import Election
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_channel import EtcdOptions
from mesh.store.lease import LeaseHolder
from mesh.store.protocol import Compare, Put
from tests.support.certificates import Authority
from tests.support.etcd import Etcd, cluster, encoded, etcd, free_port
from tests.support.stores import Picture, eventually, following, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
    from pathlib import Path

pytestmark = pytest.mark.cluster


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Etcd]:
    with etcd(tmp_path) as server:
        yield server


@pytest.fixture
def members(tmp_path: Path) -> Iterator[list[Etcd]]:
    with cluster(tmp_path, 3) as members:
        yield members


@asynccontextmanager
async def connected(options: EtcdOptions) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(options)
    try:
        yield store
    finally:
        await store.close()


def to(*servers: Etcd) -> EtcdOptions:
    return EtcdOptions(tuple(server.url for server in servers), probe=0.3, stall=0.9)


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


async def test_everything_goes_over_tls_with_a_client_certificate(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path / "ca"), Authority(tmp_path / "stranger")
    own = authority.issue("server", "127.0.0.1")
    client = authority.issue("client")
    port = free_port()
    secure = f"https://127.0.0.1:{port}"
    server = Etcd(tmp_path)
    server.flags = (
        "--listen-client-urls", f"{server.url},{secure}", "--advertise-client-urls", secure,
        "--cert-file", own.certificate, "--key-file", own.key,
        "--trusted-ca-file", authority.certificate, "--client-cert-auth",
    )  # fmt: skip
    try:
        server.start()
        options = EtcdOptions(
            (secure,),
            cert=client.certificate,
            key=client.key,
            ca=authority.certificate,
            timeout=1.0,
        )
        async with connected(options) as store, following(store, "/a/") as picture:
            await store.put("/a/1", b"1")
            await picture.shows({"/a/1": b"1"})
        for refused in (
            EtcdOptions((secure,), ca=authority.certificate, timeout=1.0),
            EtcdOptions((secure,), ca=stranger.certificate, timeout=1.0),
            EtcdOptions((secure,), ca=str(tmp_path / "missing.pem"), timeout=1.0),
        ):
            async with connected(refused) as store:
                with pytest.raises(StoreUnavailable):
                    await store.get("/a/1")
    finally:
        server.stop()


def guard(server: Etcd) -> None:
    """Let user `node` with password `secret` touch /a/ and nothing else."""
    role = {"permType": "READWRITE", "key": encoded("/a/"), "range_end": encoded("/a0")}
    steps: tuple[tuple[str, Mapping[str, object]], ...] = (
        ("auth/user/add", {"name": "root", "password": "root"}),
        ("auth/user/grant", {"user": "root", "role": "root"}),
        ("auth/user/add", {"name": "node", "password": "secret"}),
        ("auth/role/add", {"name": "nodes"}),
        ("auth/role/grant", {"name": "nodes", "perm": role}),
        ("auth/user/grant", {"user": "node", "role": "nodes"}),
        ("auth/enable", {}),
    )
    for path, body in steps:
        server.gateway(path, body)


@pytest.fixture
def guarded(server: Etcd) -> Etcd:
    guard(server)
    return server


async def test_a_user_may_do_what_its_role_allows_and_is_told_otherwise(guarded: Etcd) -> None:
    options = EtcdOptions((guarded.url,), user="node", password="secret")
    async with connected(options) as store, following(store, "/a/") as picture:
        await store.put("/a/1", b"1")
        await picture.shows({"/a/1": b"1"})
        with pytest.raises(StoreUnavailable, match="permission"):
            await store.put("/b/1", b"1")

    for wrong in (
        EtcdOptions((guarded.url,), user="node", password="guess"),
        EtcdOptions((guarded.url,)),
    ):
        async with connected(wrong) as store:
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="user and password"):
                await store.get("/a/1")
            assert time.monotonic() - began < 2
    assert "secret" not in repr(options)


async def test_a_token_that_is_no_longer_good_is_replaced(tmp_path: Path) -> None:
    signer = Authority(tmp_path / "ca").issue("signer", kind="rsa:2048")
    tokens = f"jwt,pub-key={signer.certificate},priv-key={signer.key},sign-method=RS256,ttl=1s"
    with etcd(tmp_path, "--auth-token", tokens) as server:
        guard(server)
        options = EtcdOptions((server.url,), user="node", password="secret")
        async with connected(options) as store, following(store, "/a/") as picture:
            end = time.monotonic() + 2
            while time.monotonic() < end:
                await store.put("/a/1", b"longer than a token lives")
                await asyncio.sleep(0.1)

            root = server.gateway("auth/authenticate", {"name": "root", "password": "root"})
            server.gateway("auth/user/add", {"name": "new", "password": "x"}, str(root["token"]))
            await store.put("/a/1", b"after the users changed")

            await picture.shows({"/a/1": b"after the users changed"})
            assert picture.snapshots == 1


async def test_a_restarted_server_that_forgot_its_tokens_loses_no_event(guarded: Etcd) -> None:
    options = EtcdOptions((guarded.url,), user="node", password="secret", probe=0.3, stall=0.9)
    async with connected(options) as store, following(store, "/a/") as picture:
        await store.put("/a/1", b"1")
        guarded.stop()
        await picture.disconnects()
        await asyncio.to_thread(guarded.start)
        await store.put("/a/2", b"2")

        await picture.shows({"/a/1": b"1", "/a/2": b"2"})
        assert picture.snapshots == 1


async def test_a_user_where_nobody_asks_for_one_is_let_in(server: Etcd) -> None:
    async with connected(EtcdOptions((server.url,), user="node", password="x")) as store:
        assert await store.get("/a") is None


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

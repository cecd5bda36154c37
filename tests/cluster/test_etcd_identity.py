"""Who may talk to etcd: certificates, users and tokens."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from mesh.errors import StoreUnavailable
from mesh.store.etcd_channel import EtcdOptions
from mesh.store.protocol import Compare, Part, Put
from tests.support.certificates import Authority
from tests.support.etcd import Etcd, encoded, etcd
from tests.support.stores import connected, following

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

pytestmark = pytest.mark.cluster


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Etcd]:
    with etcd(tmp_path) as server:
        yield server


async def test_everything_goes_over_tls_with_a_client_certificate(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path / "ca"), Authority(tmp_path / "stranger")
    own = authority.issue("server", "127.0.0.1")
    client = authority.issue("client")
    server = Etcd(tmp_path)
    secure = server.secured(own, authority)
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
        part = Part((Compare("/a/2", 0),), (Put("/a/2", b"2"),))
        assert (await store.transact([Compare("/a/3", 0)], [], [part])).succeeded

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

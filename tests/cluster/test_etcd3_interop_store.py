"""The `etcd3` package and the mesh read what the other wrote, and hear of it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from mesh.store.etcd import EtcdStore
from mesh.store.etcd_channel import EtcdOptions
from mesh.store.protocol import Compare, Put
from tests.support.etcd import Etcd, etcd
from tests.support.stores import LIMIT, eventually, following

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(importlib.util.find_spec("etcd3") is None, reason="etcd3 is not installed"),
]

PEER = """
import json, sys
import etcd3

client = etcd3.client(host="127.0.0.1", port=int(sys.argv[1]), timeout=10)

def put(key, value):
    client.put(key, value)

def put_for(key, value, ttl):
    client.put(key, value, client.lease(ttl))

def swap(key, old, new):
    return client.replace(key, old, new)

def delete(key):
    return client.delete(key)

def read(prefix):
    return {meta.key.decode(): value.decode() for value, meta in client.get_prefix(prefix)}

def watch(prefix, count):
    events, _cancel = client.watch_prefix(prefix)
    print(json.dumps("watching"), flush=True)
    return [
        [type(event).__name__, event.key.decode(), event.value.decode()]
        for _, event in zip(range(count), events)
    ]

for line in sys.stdin:
    verb, *arguments = json.loads(line)
    print(json.dumps(globals()[verb](*arguments)), flush=True)
"""


class Peer:
    """A process of its own: etcd3's old generated code needs the pure-Python protobuf."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def say(self, *words: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words).encode() + b"\n")
        await self._process.stdin.drain()

    async def hear(self) -> object:
        assert self._process.stdout is not None
        async with asyncio.timeout(LIMIT):
            answer: object = json.loads(await self._process.stdout.readline())
        return answer

    async def ask(self, *words: object) -> object:
        await self.say(*words)
        return await self.hear()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
async def store(server: Etcd) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(EtcdOptions((server.url,)))
    yield store
    await store.close()


@asynccontextmanager
async def etcd3(server: Etcd, directory: Path) -> AsyncIterator[Peer]:
    script = directory / "peer.py"
    script.write_text(PEER)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(script),
        str(server.port),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"},
    )
    try:
        yield Peer(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_the_mesh_sees_what_etcd3_writes(
    server: Etcd, store: EtcdStore, tmp_path: Path
) -> None:
    async with etcd3(server, tmp_path) as peer, following(store, "/one/") as picture:
        await peer.ask("put", "/one/a", "1")
        await peer.ask("put", "/one/b", "☂")
        await picture.shows({"/one/a": b"1", "/one/b": "☂".encode()})

        assert await peer.ask("swap", "/one/a", "1", "2") is True
        assert await peer.ask("delete", "/one/b") is True
        await peer.ask("put_for", "/one/leased", "soon gone", 1)

        async def leased_came_and_went() -> bool:
            return [key for key, _ in picture.events].count("/one/leased") == 2

        await eventually(leased_came_and_went)
        await picture.shows({"/one/a": b"2"})
        item = await store.get("/one/a")
        assert item is not None
        assert (item.value, item.version) == (b"2", 2)


async def test_etcd3_sees_what_the_mesh_writes(
    server: Etcd, store: EtcdStore, tmp_path: Path
) -> None:
    async with etcd3(server, tmp_path) as peer:
        assert await peer.ask("read", "/two/") == {}
        assert await peer.ask("watch", "/two/", 4) == "watching"

        await store.put("/two/a", b"1")
        await store.transact([Compare("/two/b", 0)], [Put("/two/b", "☂".encode())])
        await store.put("/two/lease", b"held", lease := await store.grant(600))
        await store.delete("/two/a")

        assert await peer.hear() == [
            ["PutEvent", "/two/a", "1"],
            ["PutEvent", "/two/b", "☂"],
            ["PutEvent", "/two/lease", "held"],
            ["DeleteEvent", "/two/a", ""],
        ]
        assert await peer.ask("read", "/two/") == {"/two/b": "☂", "/two/lease": "held"}
        await store.revoke(lease)

        async def gone() -> bool:
            return await peer.ask("read", "/two/") == {"/two/b": "☂"}

        await eventually(gone)

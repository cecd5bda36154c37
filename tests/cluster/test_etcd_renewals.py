"""A renewal that is under way when its connection is given up ends, and does not wait for ever."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from mesh.errors import StoreUnavailable
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_channel import EtcdOptions
from tests.support.etcd import etcd
from tests.support.stores import LIMIT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.cluster


async def test_a_renewal_ends_when_its_connection_is_closed(tmp_path: Path) -> None:
    with etcd(tmp_path) as server:
        server.freeze()
        store = EtcdStore(EtcdOptions((server.url,)))
        renewal = asyncio.create_task(store.keep_alive(1))
        await asyncio.sleep(0.2)  # it waits for a connection, of which nothing tells

        await store.close()

        async with asyncio.timeout(LIMIT):
            with pytest.raises(StoreUnavailable):
                await renewal

"""Opens the store that a configuration names.  The one place where the two meet."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from mesh.store.etcd import EtcdStore
from mesh.store.etcd_channel import EtcdOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mesh.agent.config import EtcdConfig
    from mesh.store.protocol import Store


@asynccontextmanager
async def opened(config: EtcdConfig) -> AsyncIterator[Store]:
    """A connection, closed after the block.  It is first made when it is first used."""
    store = EtcdStore(options(config))
    try:
        yield store
    finally:
        await store.close()


def options(config: EtcdConfig) -> EtcdOptions:
    """How the store is reached."""
    return EtcdOptions(
        endpoints=config.endpoints,
        user=config.user,
        password=config.password,
        ca=config.ca,
        cert=config.cert,
        key=config.key,
    )

"""A lab of one machine on which nothing of the mesh runs yet; its etcd has a cluster."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mesh.lab import client, readiness
from tests.support.cluster import LIMIT, Cluster
from tests.support.gateway import Records

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def machine(name: str, backend: str = "auto") -> Iterator[Cluster]:
    """The lab `name`; `backend` is what its configuration asks for."""
    own = client.launch(name, 1, (), backend)
    try:
        yield asyncio.run(_built(own))
    finally:
        asyncio.run(own.end())


async def _built(own: client.OwnLab) -> Cluster:
    await own.built()
    status = await own.status()
    made = Cluster(own, Records(status.etcd), status)
    async with client.open_store(status.etcd) as store:
        await readiness.initialise(store, LIMIT)
    return made

"""Tells the cluster what this node's processes listen on: `/mesh/listeners/<node>`.

So that a port is refused before it is published, and no dynamic one is given out that a process
has.  Sockets that only wait for answers, and loopback's, are left out.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from mesh.errors import StoreUnavailable
from mesh.model.listener import Listening
from mesh.store import schema

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.agent.occupancy import Occupancy
    from mesh.model.listener import Listener
    from mesh.store.protocol import Store

log = logging.getLogger(__name__)

_PAUSE: Final = 2.0
"""Seconds between two records at least: every one is a write to etcd."""

_MOST: Final = 2000
"""Listeners told of one node; a record of these is some 200 kB."""


async def tell(store: Store, key: str, occupancy: Occupancy) -> None:
    """Tell for ever."""
    last = b""
    while True:
        record = schema.encode(told(occupancy.seen.lasting))
        if record != last:
            try:
                await store.put(key, record)
                last = record
            except StoreUnavailable as error:
                log.debug("listeners not written: %s", error)
        await asyncio.sleep(_PAUSE)


def told(listeners: Iterable[Listener]) -> Listening:
    """What others should know, lower ports first."""
    shown = sorted((one for one in listeners if one.meets(None)), key=_order)
    return Listening(listeners=tuple(shown[:_MOST]))


def _order(one: Listener) -> tuple[int, str, str, int]:
    return one.port, one.protocol.value, one.address, one.pid

"""The elected manager's work: follow the store, decide, write; one transaction at a time.

Thin: what to write is decided in `decide`, gathered in `draft`.  A transaction that the store
refuses means that the picture is wrong, so that a new snapshot is taken; whether this manager may
still lead is checked by the store itself, with every transaction.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from mesh.controller.draft import STINT, Draft
from mesh.controller.picture import Picture, unknown
from mesh.store.protocol import Snapshot
from mesh.store.sync import Follower

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from mesh.controller.picture import Owner
    from mesh.model.service import ServiceSpec
    from mesh.store.protocol import Changes, Compare, Store
    from mesh.store.schema import Keys

    Refused = Callable[[int], None]

LOG: Final = logging.getLogger(__name__)

PAUSE: Final = 0.2
"""Seconds before a new snapshot is taken after a refused transaction."""

_News = asyncio.Queue["Snapshot | Changes"]


async def lead(
    store: Store,
    keys: Keys,
    guard: Compare,
    refused: Refused = lambda _: None,
    known: Callable[[str], object] = unknown,
) -> None:
    """Allocate what is missing and free what is superfluous, for as long as `guard` holds.

    `refused` is told how many services were newly refused something; `known` tells what this
    process holds of a key already (Picture.known).

    Returns when somebody else may lead.  Raises StoreUnavailable when the outcome of a transaction
    is unknown; the next term finds out.  Made for `Election.run`.
    """
    specs: Mapping[Owner, ServiceSpec] = {}
    while True:
        follower = Follower(
            store,
            keys.cluster,
            *(keys.under(kind) for kind in ("services", "nodes", "allocations", "listeners")),
            *(keys.under(f"status/{kind}") for kind in ("services", "nodes")),
        )
        news: _News = asyncio.Queue()
        reader = asyncio.create_task(_read(follower.updates(), news))
        try:
            specs = await _allocate(store, Picture(keys, specs, known), guard, news, refused)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        held = await store.get(guard.key)
        if (held.mod_revision if held is not None else 0) != guard.revision:
            return
        await asyncio.sleep(PAUSE)


async def _read(updates: AsyncGenerator[Snapshot | Changes, None], news: _News) -> None:
    """Take updates as they come, so that a long transaction does not stall the watch."""
    async with aclosing(updates) as stream:
        async for update in stream:
            news.put_nowait(update)
            del update


async def _allocate(
    store: Store, picture: Picture, guard: Compare, news: _News, refused: Refused
) -> Mapping[Owner, ServiceSpec]:
    """Keep the allocations in line until the picture is known to be wrong; the specs it knew."""
    keys, told, revision = picture.keys, 0, 0
    while True:
        while not news.empty() or not picture.has_marked():
            update = await news.get()
            if isinstance(update, Snapshot):
                if update.revision < revision:
                    return picture.specs()  # older than what this loop wrote itself
                remembered = picture.specs() or picture.remembered
                picture = Picture(keys, remembered, picture.known)
                await _load(picture, update)
            else:
                picture.observe(update.changes)
            del update  # a snapshot is large, and the next news may be long in coming
            told = _tell(picture, told)
        draft = Draft(picture)
        draft.fill()
        await asyncio.sleep(0)  # a full stint of decisions may well have nothing to write
        if not draft.size:
            continue
        conditions = [guard, *draft.conditions]
        result = await store.transact(conditions, draft.operations, draft.parts)
        if not result.succeeded:
            LOG.warning("controller transaction=refused operations=%d", draft.size)
            return picture.specs()
        draft.committed(result.revision)
        refused(draft.refusals)
        revision = result.revision


async def _load(picture: Picture, snapshot: Snapshot) -> None:
    """Load a snapshot in slices, for the agent shares this event loop."""
    for start in range(0, len(snapshot.items), STINT):
        picture.load(snapshot.items[start : start + STINT])
        await asyncio.sleep(0)


def _tell(picture: Picture, told: int) -> int:
    """Log records that cannot be read, when there are more of them than before."""
    if len(picture.flaws) > told:
        for key, reason in sorted(picture.flaws.items()):
            LOG.warning("controller record=unreadable key=%s cause=%r", key, reason)
    return len(picture.flaws)

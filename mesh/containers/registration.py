"""A task's record in etcd while its container runs.

Owns the record's key: written under a lease, so that it ends with its writer, and withdrawn
before the container is stopped.  Never takes the key from another node.
"""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from mesh.errors import Conflict, InvalidRecord, StoreUnavailable
from mesh.model.report import Applied
from mesh.store import schema
from mesh.store.lease import LeaseHolder
from mesh.store.protocol import Compare, Delete

if TYPE_CHECKING:
    from mesh.model.publish import Protocol
    from mesh.model.task import Task
    from mesh.store.protocol import KeyValue, Store
    from mesh.store.schema import Keys

RETRY_SECONDS: Final = 1.0
"""How often a record is tried again while etcd does not answer; the container runs on."""

SETTLE_SECONDS: Final = 2.0
"""How long a container is kept for nodes that have yet to take it out of their pools."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Registration:
    """A task's place in etcd, where its record outlives its writer by `ttl` seconds at most.

    `gone` is the revision at which it was withdrawn last; 0: not known to be.
    """

    store: Store
    keys: Keys
    task: Task
    ttl: int
    gone: int = 0

    @property
    def key(self) -> str:
        """The record's key."""
        return self.keys.task(self.task.service, self.task.id)

    def lives_in(self, netns: str) -> None:
        """Where the container's network namespace is from now on."""
        self.task = msgspec.structs.replace(self.task, netns=netns)

    async def targets(self) -> frozenset[tuple[Protocol, int]]:
        """The ports its service sends to; none if the service is not known or not readable."""
        try:
            item = await self.store.get(self.keys.service(self.task.service))
            spec = schema.parse_service(item.key, item.value) if item is not None else None
        except (InvalidRecord, StoreUnavailable) as error:
            _log.warning("ports of service %s not known: %s", self.task.service, error)
            return frozenset()
        return (
            frozenset((port.protocol, port.target) for port in spec.ports) if spec else frozenset()
        )

    async def check_free(self) -> None:
        """Raises Conflict if another node has registered the same task."""
        node = _node_in(await self.store.get(self.key))
        if node not in (None, self.task.node):
            raise Conflict(
                f"task {self.task.id} of {self.task.service} already runs on node {node}: "
                "stop it there, or choose another --id"
            )

    async def hold(self) -> None:
        """Register the task and keep it so until cancelled; withdrawn on the way out.

        Goes on trying while etcd does not answer.  Raises Conflict if another node has the task.
        """
        await self._until_free()
        holder = LeaseHolder(self.store, self.ttl)
        try:
            await holder.put(self.key, schema.encode(self.task))
            await holder.run()
        finally:
            await self._withdraw(holder)

    async def _until_free(self) -> None:
        while True:
            try:
                return await self.check_free()
            except StoreUnavailable as error:
                _log.warning("task %s is not registered yet: %s", self.task.id, error)
                await asyncio.sleep(RETRY_SECONDS)

    async def settled(self) -> None:
        """Wait until every living node took the withdrawn task out, SETTLE_SECONDS at most."""
        deadline = asyncio.get_running_loop().time() + SETTLE_SECONDS
        while self.gone and await self._is_used():
            if asyncio.get_running_loop().time() > deadline:
                _log.warning("task %s: some node still has it in service", self.task.id)
                return
            await asyncio.sleep(0.05)

    async def _withdraw(self, holder: LeaseHolder) -> None:
        self.gone = 0
        try:
            # By then nobody has renewed the lease for as long as it lives.
            async with asyncio.timeout(self.ttl):
                self.gone = await self._delete()
                await holder.stop()
        except (StoreUnavailable, TimeoutError):
            _log.warning("task %s: its record is left to expire in %d s", self.task.id, self.ttl)

    async def _delete(self) -> int:
        """Delete the record if it is ours; the revision at which it is gone."""
        found = await self.store.get(self.key)
        if found is None or _node_in(found) != self.task.node:
            return 0
        condition = Compare(self.key, found.mod_revision)
        return (await self.store.transact((condition,), (Delete(self.key),))).revision

    async def _is_used(self) -> bool:
        """Whether a living node's kernel may still send new connections to the task."""
        alive, applied = self.keys.under("alive"), self.keys.under("applied")
        try:
            found = await self.store.list(alive, applied)
        except StoreUnavailable:
            return False
        keys = {item.key for item in found.items}
        return any(
            item.key.replace(applied, alive, 1) in keys and _revision_in(item) < self.gone
            for item in found.items
            if item.key.startswith(applied)
        )


def _node_in(found: KeyValue | None) -> str | None:
    """The node a record names; None if there is none, or nobody can read it."""
    if found is None:
        return None
    try:
        return schema.parse_task(found.key, found.value).node
    except InvalidRecord:
        return None


def _revision_in(found: KeyValue) -> float:
    """What a node's kernel has; one whose report nobody can read is not waited for."""
    try:
        return schema.decode(found.key, found.value, Applied).revision
    except InvalidRecord:
        return math.inf

"""Writes down which host ports this node publishes: `/mesh/published/<node>/<task>`.

Owns these records and the node's cursors, and has programs of the host told (writeback); what they
say is decided in mesh.hostports.  Writes only when told that the kernel has it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.agent.writeback import Writeback
from mesh.errors import InvalidRecord, StoreUnavailable
from mesh.model.mapping import Cursors
from mesh.model.report import Problem
from mesh.store import schema
from mesh.store.protocol import MAX_OPERATIONS, Delete, Put, Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mesh.agent.writeback import Outlet
    from mesh.hostports.ports import HostPorts
    from mesh.model.mapping import PortMapping
    from mesh.store.protocol import Changes, Store
    from mesh.store.schema import Keys

log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 1.0

_LARGEST: Final = 1 << 20
"""Bytes of one transaction; etcd refuses requests above 1.5 MiB."""

_Batch = list["Put | Delete"]


class _Due(NamedTuple):
    """What is published at one moment: records that are to be written, and all there is."""

    records: dict[str, tuple[PortMapping, ...]]
    cursors: Cursors
    everything: dict[str, tuple[PortMapping, ...]]


class Published:
    """The records of one node, kept in line with its host ports."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        node: str,
        ports: HostPorts,
        told: Callable[[], None],
        outlets: Iterable[Outlet] = (),
    ) -> None:
        self._writebacks = tuple(Writeback(outlet, self, told) for outlet in outlets)
        self._store = store
        self._keys = keys
        self._node = node
        self._ports = ports
        self._cursors = Cursors()
        self._planned = self._due = _Due({}, self._cursors, {})
        self._told = told
        self._wake = asyncio.Event()
        self._too_large: set[str] = set()

    @property
    def prefix(self) -> str:
        """What has to be followed, to hear what becomes of these records."""
        return self._keys.published(self._node)

    def is_echo(self, event: Snapshot | Changes) -> bool:
        """Whether an event only repeats what was written here: nothing has to be done."""
        if isinstance(event, Snapshot) or self._ports.unwritten():
            return False
        echoed = (change.key.startswith(self.prefix) for change in event.changes)
        return bool(event.changes) and all(echoed)

    def problems(self) -> Iterator[Problem]:
        """What cannot be written."""
        for task in sorted(self._too_large):
            message = "publishes too many ports to list them in etcd: they work, but are not shown"
            yield Problem(about=f"task {task}", message=message)
        for writeback in self._writebacks:
            yield from writeback.problems()

    async def load(self) -> None:
        """Go on where the agent before this one was.  The records come with the first snapshot."""
        item = await self._store.get(self._keys.cursors(self._node))
        if item is None:
            return
        try:
            self._cursors = schema.decode(item.key, item.value, Cursors)
        except InvalidRecord as error:
            log.warning("dynamic ports begin anew: %s", error)
        self._ports.resume(self._cursors)

    def look_after(self, tasks: asyncio.TaskGroup) -> None:
        """Write from now on, and at once."""
        self.wake()
        tasks.create_task(self.run(), name="published")
        for writeback in self._writebacks:
            tasks.create_task(writeback.run(), name="writeback")

    def plan(self) -> None:
        """What is granted now is what the kernel is about to get."""
        everything = self._ports.all_published() if self._writebacks else {}
        self._planned = _Due(self._ports.unwritten(), self._ports.cursors, everything)

    def all_published(self) -> dict[str, tuple[PortMapping, ...]]:
        """What every task has in the kernel, where somebody wants to be told of it."""
        return self._due.everything

    def wake(self) -> None:
        """The kernel has what was granted when `plan` was called last."""
        self._due = self._planned
        self._wake.set()
        for writeback in self._writebacks:
            writeback.wake()

    async def run(self) -> None:
        """Write for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._write()
            except StoreUnavailable as error:
                log.debug("published ports not written: %s", error)
                self._wake.set()
                await asyncio.sleep(_RETRY_SECONDS)

    async def _write(self) -> None:
        wanted, cursors = self._due.records, self._due.cursors
        operations: _Batch = []
        if cursors != self._cursors:
            operations.append(Put(self._keys.cursors(self._node), schema.encode(cursors)))
        before = frozenset(self._too_large)
        self._too_large -= wanted.keys()
        for task, mappings in wanted.items():
            key, record = self._keys.published(self._node, task), schema.encode(mappings)
            if len(record) > _LARGEST:
                self._too_large.add(task)
            else:
                operations.append(Put(key, record) if mappings else Delete(key))
        for batch in _batches(operations):
            await self._store.transact((), batch)
        self._cursors = cursors
        for task, mappings in wanted.items():
            self._ports.recorded(task, mappings)
        if self._too_large != before:
            self._told()


def _batches(operations: _Batch) -> Iterator[_Batch]:
    """As many at once as etcd takes, in order: cursors first, so that no number is given early."""
    batch: _Batch = []
    size = 0
    for operation in operations:
        more = len(operation.value) if isinstance(operation, Put) else 0
        if batch and (len(batch) == MAX_OPERATIONS or size + more > _LARGEST):
            yield batch
            batch, size = [], 0
        batch.append(operation)
        size += more
    if batch:
        yield batch

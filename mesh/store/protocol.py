"""What the house needs of a store: etcd's v3 semantics, no more.

Revisions count every committed transaction; a watch from a revision misses nothing after it, or
says `Compacted`.  Implementations raise StoreUnavailable when no endpoint answers in time.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

MAX_OPERATIONS: Final = 128
"""The most operations of one transaction: etcd's default `--max-txn-ops`."""

MAX_BESIDE: Final = 32
"""The most operations, or conditions, of a transaction that has parts, a group of parts among them.

etcd takes transactions within transactions, and counts along a path: the longest list of each level
is added up, and may be MAX_OPERATIONS together.
"""

MAX_GROUP: Final = 32
"""Parts that travel as one group."""

MAX_PART: Final = MAX_OPERATIONS - MAX_BESIDE - MAX_GROUP
"""The most operations, or conditions, of a part."""

MAX_BYTES: Final = 1_400_000
"""Bytes of keys and values that one transaction surely takes: etcd's default `--max-request-bytes`
is 1.5 MiB.
"""


class KeyValue(msgspec.Struct, frozen=True, order=True, gc=False):
    """A key as it stood at a revision; `version` 0 never occurs in a stored key."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int


class Change(msgspec.Struct, frozen=True, gc=False):
    """One event of a watch: `value` None means the key was deleted at `revision`."""

    key: str
    value: KeyValue | None
    revision: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every key under the watched prefixes at one revision: replaces what was known before."""

    items: tuple[KeyValue, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Changes:
    """Events in order; `revision` is the last one's, or the store's when there are none."""

    changes: tuple[Change, ...]
    revision: int


class Compare(NamedTuple):
    """A transaction's condition: the key's `mod_revision` equals `revision` (0: no such key)."""

    key: str
    revision: int


class Put(NamedTuple):
    """Write a key; `lease` 0 means for good."""

    key: str
    value: bytes
    lease: int = 0


class Delete(NamedTuple):
    """Remove a key; a missing key is not an error."""

    key: str


class Part(NamedTuple):
    """Some of a large transaction's operations: done with it if their own conditions hold."""

    conditions: tuple[Compare, ...]
    operations: tuple[Put | Delete, ...]


class TransactionResult(NamedTuple):
    """Whether every condition held and all operations were done, and the store's revision."""

    succeeded: bool
    revision: int


class Compacted(Exception):
    """The `revision` asked for is not kept: compacted, or newer than the store.  List again."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"revision {revision} is not kept by the store")
        self.revision = revision


class WatchLost(Exception):
    """The watch ended (server gone, stalled, refused); list again or resume."""


class LeaseLost(Exception):
    """The lease expired or was revoked; grant another and write its keys again."""


class Store(Protocol):
    """An open connection to a store."""

    async def get(self, key: str, revision: int = 0) -> KeyValue | None:
        """The key now (linearizable), or as it stood at `revision`; None if there is none.

        Raises Compacted for a revision that is not kept.
        """
        ...

    async def list(self, *prefixes: str) -> Snapshot:
        """Every key under the prefixes (at least one, none inside another), at one revision."""
        ...

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Write a key; returns the new revision.  Raises LeaseLost for an unknown lease."""
        ...

    async def delete(self, key: str) -> bool:
        """Remove a key; whether it was there."""
        ...

    async def transact(
        self,
        conditions: Sequence[Compare],
        operations: Sequence[Put | Delete],
        parts: Sequence[Part] = (),
    ) -> TransactionResult:
        """Do all `operations` at one revision if every condition holds, else nothing.

        At the same revision each of `parts` is done whose own conditions hold as well: so much
        more fits, and only where somebody else wrote meanwhile a part is missing, as the result
        says then.

        At most MAX_OPERATIONS, or MAX_BESIDE next to parts of MAX_PART, on different keys
        (ValueError).  Raises LeaseLost for an unknown lease, and StoreUnavailable when the outcome
        is unknown: read before trying again.
        """
        ...

    def watch(self, since: Mapping[str, int]) -> AsyncGenerator[Changes, None]:
        """Events under each prefix after its revision, in order per prefix, without gaps.

        The events of one transaction under one prefix come in one `Changes`.  An empty `Changes`
        is yielded once, when all prefixes are watched.  Ends only by raising Compacted or
        WatchLost, or when closed.
        """
        ...

    async def grant(self, ttl: int) -> int:
        """A new lease of at least `ttl` seconds."""
        ...

    async def keep_alive(self, lease: int) -> int:
        """Renew a lease; its remaining seconds.  Raises LeaseLost."""
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys; an unknown lease is not an error."""
        ...

    async def close(self) -> None:
        """Release the connection; idempotent."""
        ...


def grouped(parts: Sequence[Part]) -> list[Sequence[Part]]:
    """Parts as they travel."""
    return [parts[start : start + MAX_GROUP] for start in range(0, len(parts), MAX_GROUP)]


def check_transaction(
    conditions: Sequence[Compare], operations: Sequence[Put | Delete], parts: Sequence[Part] = ()
) -> None:
    """Raises ValueError for a transaction that etcd would refuse."""
    groups = len(grouped(parts))
    most = MAX_BESIDE if groups else MAX_OPERATIONS
    if max(len(conditions), len(operations) + groups) > most:
        raise ValueError(
            f"{len(operations) + groups} operations, {len(conditions)} conditions; "
            f"a transaction takes {most}"
        )
    for part in parts:
        if max(map(len, part)) > MAX_PART:
            raise ValueError(f"{len(part.operations)} operations; a part takes {MAX_PART}")
    keys = [each.key for each in chain(operations, *(part.operations for part in parts))]
    if len(set(keys)) != len(keys):
        raise ValueError("a transaction names a key twice")

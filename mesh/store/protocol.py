"""What the house needs of a store: etcd's v3 semantics, no more.

Revisions count every committed transaction; a watch from a revision misses nothing after it, or
says `Compacted`.  Implementations raise StoreUnavailable when no endpoint answers in time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


class KeyValue(NamedTuple):
    """A key as it stood at a revision; `version` 0 never occurs in a stored key."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int


class Change(NamedTuple):
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
    """Events in order; `revision` is the last one's."""

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


class TransactionResult(NamedTuple):
    """Whether every condition held and the operations were done, and the store's revision."""

    succeeded: bool
    revision: int


class Compacted(Exception):
    """The revision asked for is no longer kept; list again."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"revisions before {revision} are compacted")
        self.revision = revision


class WatchLost(Exception):
    """The watch ended (server gone, stalled, refused); list again or resume."""


class LeaseLost(Exception):
    """The lease expired or was revoked; grant another and write its keys again."""


class Store(Protocol):
    """An open connection to a store."""

    async def get(self, key: str) -> KeyValue | None:
        """The key now (linearizable), or None."""
        ...

    async def list(self, *prefixes: str) -> Snapshot:
        """Every key under the prefixes, all at the same revision."""
        ...

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Write a key; returns the new revision.  Raises LeaseLost for an unknown lease."""
        ...

    async def delete(self, key: str) -> bool:
        """Remove a key; whether it was there."""
        ...

    async def transact(
        self, conditions: Sequence[Compare], operations: Sequence[Put | Delete]
    ) -> TransactionResult:
        """Do all `operations` at one revision if every condition holds, else nothing."""
        ...

    def watch(self, prefixes: Sequence[str], revision: int) -> AsyncIterator[Changes]:
        """Events under the prefixes after `revision`, in order per prefix, without gaps.

        An empty `Changes` is yielded once when the watch is established.  Ends only by raising
        Compacted or WatchLost, or when closed.
        """
        ...

    async def grant(self, ttl: int) -> int:
        """A new lease of `ttl` seconds."""
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

"""What etcd says about the lab's nodes: which addresses they got, and how far they are.

`of` and `served_by` are pure; the rest waits, with limits.  Writes only the cluster's settings.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from mesh.errors import InvalidRecord, MeshError, StoreUnavailable
from mesh.lab.wire import Network
from mesh.model.address import FAMILIES
from mesh.model.allocation import NodeAllocation
from mesh.model.cluster import Cluster
from mesh.model.report import Applied
from mesh.store import schema
from mesh.store.protocol import Compare, Put

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from mesh.model.cluster import NodeNetwork
    from mesh.store.protocol import KeyValue, Snapshot, Store

POLL_SECONDS: Final = 0.05

KEYS: Final = schema.Keys()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Progress:
    """What every node, by name, has reached; `agreed` is the revision at which all were known."""

    networks: dict[str, NodeNetwork]
    applied: dict[str, Applied]
    reported: dict[str, int]
    alive: frozenset[str]
    agreed: int

    def lacking(self, nodes: Iterable[str]) -> dict[str, str]:
        """What each node that is not ready still lacks."""
        found = {}
        for node in nodes:
            if node not in self.alive:
                found[node] = "its agent has not registered"
            elif node not in self.networks:
                found[node] = "no manager has given it a number"
            elif node not in self.applied:
                found[node] = "its agent has reported nothing"
            elif self.applied[node].revision < self.agreed:
                found[node] = f"its kernel lacks revision {self.agreed}"
        return found

    def addresses(self) -> dict[str, Network]:
        """The nodes' addresses as the lab tells them."""
        return {
            node: Network(
                overlay=_pair(network.overlay_address(f) for f in FAMILIES),
                subnets=_pair(network.subnet(f) for f in FAMILIES),
            )
            for node, network in self.networks.items()
        }

    def behind(self, revision: int) -> frozenset[str]:
        """Living nodes whose kernel lacks `revision`."""
        return frozenset(
            node
            for node in self.alive
            if node not in self.applied or self.applied[node].revision < revision
        )


def of(snapshot: Snapshot, cluster: Cluster) -> Progress:
    """The progress a snapshot of everything shows; what cannot be read says nothing."""
    allocations = _under(snapshot, KEYS.under("allocations/nodes"))
    reports = _under(snapshot, KEYS.under("applied"))
    nodes = _under(snapshot, KEYS.under("nodes"))
    applied = {node: _read(item, Applied) for node, item in reports.items()}
    agreed = (item.mod_revision for item in (*nodes.values(), *allocations.values()))
    return Progress(
        networks=dict(filter(None, (_network(item, cluster) for item in allocations.values()))),
        applied={node: report for node, report in applied.items() if report is not None},
        reported={node: item.mod_revision for node, item in reports.items()},
        alive=frozenset(_under(snapshot, KEYS.under("alive"))),
        agreed=max(agreed, default=0),
    )


def _network(item: KeyValue, cluster: Cluster) -> tuple[str, NodeNetwork] | None:
    owner = _read(item, NodeAllocation)
    try:
        return (owner.node, cluster.network(schema.parse_index(item.key))) if owner else None
    except (InvalidRecord, ValueError):
        return None


def _read(item: KeyValue, kind: type[T]) -> T | None:
    try:
        return schema.decode(item.key, item.value, kind)
    except InvalidRecord:
        return None


async def initialise(store: Store, seconds: float) -> None:
    """Write the settings of a new cluster, as `mesh cluster init` does, once etcd answers."""
    settings = Cluster(id=secrets.token_hex(8), prefix6=_random_prefix6())
    put = Put(KEYS.cluster, schema.encode(settings))

    async def written() -> bool:
        try:
            await store.transact([Compare(KEYS.cluster, 0)], [put])
        except StoreUnavailable:
            return False
        return True

    await until(written, seconds, lambda: "etcd does not answer")


async def read(store: Store) -> Progress:
    """The progress now.  Raises MeshError if there are no settings."""
    snapshot = await store.list(f"{KEYS.prefix}/")
    for item in snapshot.items:
        if item.key == KEYS.cluster:
            return of(snapshot, schema.decode(item.key, item.value, Cluster))
    raise MeshError(f"{KEYS.cluster} is missing in the lab's etcd: was it deleted?")


async def until(
    reached: Callable[[], Awaitable[bool]], seconds: float, lacking: Callable[[], str]
) -> None:
    """Wait for a condition.  Raises MeshError with what is lacking after `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            while True:
                if await reached():
                    return
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise MeshError(f"not ready after {seconds:g} s: {lacking()}") from None


def _under(snapshot: Snapshot, prefix: str) -> dict[str, KeyValue]:
    return {
        item.key.removeprefix(prefix): item
        for item in snapshot.items
        if item.key.startswith(prefix)
    }


def _pair(texts: Iterable[str]) -> tuple[str, str]:
    first, second = texts
    return first, second


def _random_prefix6() -> str:
    """A /48 of RFC 4193: fd and 40 random bits."""
    digits = f"fd{secrets.token_hex(5)}"
    return f"{digits[:4]}:{digits[4:8]}:{digits[8:]}::/48"

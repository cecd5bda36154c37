"""What the controller knows: the cluster, who wants allocations, who holds what.

Owns the indexes that make one decision cost the same in a cluster of ten and of ten thousand
services.  Changes only by what the store said or accepted.  Never decides, never does I/O.

There are tens of thousands of each: structs take half of what named tuples do.
"""

from __future__ import annotations

import heapq
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import msgspec

from mesh.controller import places
from mesh.controller.places import POOLS, PORT_POOLS, Place, Pool
from mesh.errors import InvalidRecord
from mesh.model.allocation import NodeAllocation, PortAllocation, VipAllocation
from mesh.model.cluster import Cluster
from mesh.model.listener import Listening
from mesh.model.report import Status
from mesh.model.service import ServiceSpec
from mesh.store import schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from mesh.store.protocol import Change, KeyValue
    from mesh.store.schema import Keys

Record = NodeAllocation | VipAllocation | PortAllocation


class Owner(msgspec.Struct, frozen=True, order=True, gc=False):
    """Who may hold places: `kind` is "nodes" or "services", as in the keys."""

    kind: Literal["nodes", "services"]
    name: str


class Held(msgspec.Struct, frozen=True, gc=False):
    """An allocated place.  `owner` None: its record cannot be read, so nobody else may have it.

    `revision` is the key's mod_revision, 0 while the allocation is being written.
    """

    owner: Owner | None
    record: Record | None
    revision: int


class Claimant(msgspec.Struct, frozen=True, gc=False):
    """A node or service that exists.  `spec` is its last good one, None for a node or if it never
    was readable; `flaw` says what is wrong with the present record.
    """

    created: int
    spec: ServiceSpec | None
    flaw: str | None


T = TypeVar("T")


def unknown(_key: str) -> object:
    """What a process that keeps no records itself holds of a key."""
    return None


UNREADABLE: Final = Status(problems=())
"""A status record of no use; differs from every one that is ever wanted."""

LONGEST_REASON: Final = 400
"""Characters of a reason that are kept; etcd refuses requests above 1.5 MiB."""


@dataclass
class Picture:
    """The store as the controller sees it, and which owners are to be decided about."""

    keys: Keys
    remembered: Mapping[Owner, ServiceSpec]
    """Specs known before, to stand in for records that cannot be read when they are first seen."""
    known: Callable[[str], object] = unknown
    """What this process holds of a key already: an equal record is not kept twice."""
    cluster: Cluster | None = None
    claimants: dict[Owner, Claimant] = field(default_factory=dict)
    taken: dict[Pool, dict[int, Held]] = field(default_factory=lambda: {p: {} for p in POOLS})
    """Who holds what: of each pool, and of each share that there is."""
    held: defaultdict[Owner, set[Place]] = field(default_factory=lambda: defaultdict(set))
    cursors: dict[Pool, int] = field(default_factory=dict)
    statuses: dict[Owner, Status] = field(default_factory=dict)
    listened: dict[str, frozenset[Place]] = field(default_factory=dict)
    """The ports on which processes of a node listen, by node."""
    occupied: Counter[Place] = field(default_factory=Counter)
    """On how many nodes some process listens on a port, and of how many services shares of it are.
    """
    exhausted: set[Pool] = field(default_factory=set)
    """Pools found to be full, until a place of theirs is freed or the cluster changes."""
    flaws: dict[str, str] = field(default_factory=dict)
    """Why a record that has no status of its own cannot be read, by key."""
    _waiting: defaultdict[Place | Pool, set[Owner]] = field(
        default_factory=lambda: defaultdict(set)
    )
    _waits: dict[Owner, frozenset[Place | Pool]] = field(default_factory=dict)
    _dirty: set[Owner] = field(default_factory=set)
    _queue: list[tuple[int, Owner]] = field(default_factory=list)
    _written: dict[str, int] = field(default_factory=dict)
    """Own writes that the watch has not repeated yet; what it says of earlier ones is stale."""

    def load(self, items: Iterable[KeyValue]) -> None:
        """Take in a part of the first snapshot."""
        for item in items:
            self._put(item)

    def specs(self) -> dict[Owner, ServiceSpec]:
        """The last good spec of every service, to survive a new snapshot."""
        return {o: c.spec for o, c in self.claimants.items() if c.spec is not None}

    def observe(self, changes: Iterable[Change]) -> None:
        """Take in what happened since the snapshot, in order."""
        for change in changes:
            written = self._written.get(change.key, 0)
            if change.revision >= written:
                self._written.pop(change.key, None)
            if change.revision <= written:
                continue
            if change.value is None:
                self._delete(change.key)
            else:
                self._put(change.value)

    def wrote(self, key: str, revision: int) -> None:
        """Note that the store accepted a write of ours whose effect is noted already."""
        self._written[key] = revision

    def at(self, place: Place) -> Held | None:
        """Who holds a place, if anybody does."""
        return self.taken.get(place.pool, {}).get(place.number)

    def hold(self, place: Place, held: Held) -> None:
        """Note who holds a place."""
        before = self.at(place)
        if before is not None and before.owner != held.owner:
            self.release(place)
            before = None
        if before is None and places.whole(place.pool) != place.pool:
            self.occupied[Place(places.whole(place.pool), place.number)] += 1
        self.taken.setdefault(place.pool, {})[place.number] = held
        if held.owner is not None:
            self.held[held.owner].add(place)

    def release(self, place: Place) -> None:
        """Note that a place is free, and wake those who wait for it."""
        before = self.at(place)
        if before is None:
            return
        del self.taken[place.pool][place.number]
        if before.owner is not None:
            self.held[before.owner].discard(place)
            if not self.held[before.owner]:
                del self.held[before.owner]
        pool = places.whole(place.pool)
        if pool != place.pool:
            self._unoccupied(Place(pool, place.number))
            if not self.taken[place.pool]:
                del self.taken[place.pool]
        self.exhausted.discard(pool)
        for resource in (place, pool):
            for owner in tuple(self._waiting.get(resource, ())):
                self.mark(owner)

    def wait(self, owner: Owner, resources: frozenset[Place | Pool]) -> None:
        """Replace what an owner waits for: to be decided about again when one of it is freed."""
        for resource in self._waits.pop(owner, ()):
            self._waiting[resource].discard(owner)
            if not self._waiting[resource]:
                del self._waiting[resource]
        if resources:
            self._waits[owner] = resources
        for resource in resources:
            self._waiting[resource].add(owner)

    def mark(self, owner: Owner) -> None:
        """Have an owner decided about: those that are gone first, then the oldest."""
        if owner not in self._dirty:
            claimant = self.claimants.get(owner)
            self._dirty.add(owner)
            heapq.heappush(self._queue, (claimant.created if claimant else -1, owner))

    def has_marked(self) -> bool:
        """Whether there is anything to decide, and a cluster to decide it for."""
        return self.cluster is not None and bool(self._queue)

    def next_marked(self) -> Owner | None:
        """Take the next owner to be decided about; None if there is none, or no cluster yet."""
        if not self.has_marked():
            return None
        _, owner = heapq.heappop(self._queue)
        self._dirty.discard(owner)
        return owner

    def key_of(self, place: Place) -> str:
        """The etcd key of an allocation."""
        return places.key(self.keys, place)

    def key_of_owner(self, owner: Owner) -> str:
        """The etcd key of a node's or a service's own record."""
        return self.keys.under(owner.kind) + owner.name

    # ---- records

    def _put(self, item: KeyValue) -> None:
        key = item.key
        match _parts(self.keys, key):
            case ["cluster"]:
                self._put_cluster(item)
            case ["services" | "nodes" as kind, *name]:
                self._put_claimant(Owner(kind, "/".join(name)), item)
            case ["allocations", "cursors", pool] if pool in POOLS:
                self.cursors[pool] = places.number(item.value.decode(errors="replace")) or 0
            case ["allocations", *rest]:
                place = places.parse(rest)
                if place is not None:
                    self._put_allocation(place, item)
            case ["status", "services" | "nodes" as kind, *name]:
                self._put_status(Owner(kind, "/".join(name)), item)
            case ["listeners", node]:
                self._put_listeners(node, item)
            case _:
                pass

    def _delete(self, key: str) -> None:
        self.flaws.pop(key, None)
        match _parts(self.keys, key):
            case ["cluster"]:
                self.cluster = None
            case ["services" | "nodes" as kind, *name]:
                owner = Owner(kind, "/".join(name))
                self.claimants.pop(owner, None)
                self.mark(owner)
            case ["allocations", "cursors", pool] if pool in POOLS:
                self.cursors.pop(pool, None)
            case ["allocations", *rest]:
                place = places.parse(rest)
                if place is not None:
                    self._mark_holder(place)
                    self.release(place)
            case ["status", "services" | "nodes" as kind, *name]:
                owner = Owner(kind, "/".join(name))
                self.statuses.pop(owner, None)
                self.mark(owner)
            case ["listeners", node]:
                self._listen(node, frozenset())
            case _:
                pass

    def _put_cluster(self, item: KeyValue) -> None:
        try:
            cluster = schema.decode(item.key, item.value, Cluster)
        except InvalidRecord as error:
            self.flaws[item.key] = _clipped(error.reason)
            return
        self.flaws.pop(item.key, None)
        if cluster == self.cluster:
            return
        if self.cluster is not None and cluster.plan != self.cluster.plan:
            # Agents hold what is in force then, and would follow what is allocated anew.
            self.flaws[item.key] = "other addresses or ports than before: start every agent again"
            return
        self.cluster = cluster
        self.exhausted.clear()
        for owner in (*self.claimants, *self.held, *self.statuses):
            self.mark(owner)

    def _put_claimant(self, owner: Owner, item: KeyValue) -> None:
        before = self.claimants.get(owner)
        spec = before.spec if before is not None else self.remembered.get(owner)
        flaw = None
        try:
            if owner.kind == "services":
                spec = self._same(item.key, schema.parse_service(item.key, item.value))
            else:
                schema.parse_node(item.key, item.value)
        except InvalidRecord as error:
            flaw = _clipped(error.reason)
        self.claimants[owner] = Claimant(item.create_revision, spec, flaw)
        self.mark(owner)

    def _put_allocation(self, place: Place, item: KeyValue) -> None:
        owner: Owner | None = None
        record: Record | None = None
        try:
            match place.pool:
                case "nodes":
                    record = self._same(
                        item.key, schema.decode(item.key, item.value, NodeAllocation)
                    )
                    owner = Owner("nodes", record.node)
                case "vips":
                    record = self._same(
                        item.key, schema.decode(item.key, item.value, VipAllocation)
                    )
                    owner = Owner("services", record.service)
                case _:
                    record = self._same(
                        item.key, schema.decode(item.key, item.value, PortAllocation)
                    )
                    owner = Owner("services", record.service)
            self.flaws.pop(item.key, None)
        except InvalidRecord as error:
            self.flaws[item.key] = _clipped(error.reason)
        self._mark_holder(place)
        self.hold(place, Held(owner, record, item.mod_revision))
        self._mark_holder(place)

    def _put_status(self, owner: Owner, item: KeyValue) -> None:
        try:
            self.statuses[owner] = schema.decode(item.key, item.value, Status)
        except InvalidRecord:
            self.statuses[owner] = UNREADABLE
        self.mark(owner)

    def _decoded(self, item: KeyValue, kind: type[T]) -> T:
        return self._same(item.key, schema.decode(item.key, item.value, kind))

    def _same(self, key: str, record: T) -> T:
        known: Any = self.known(key)
        return known if known == record else record

    def _put_listeners(self, node: str, item: KeyValue) -> None:
        try:
            listeners = schema.decode(item.key, item.value, Listening).listeners
        except InvalidRecord as error:
            self.flaws[item.key] = _clipped(error.reason)
            return
        self.flaws.pop(item.key, None)
        places = (Place(PORT_POOLS[one.protocol], one.port) for one in listeners)
        self._listen(node, frozenset(places))

    def _listen(self, node: str, places: frozenset[Place]) -> None:
        """Note who listens where; what ends may let those have a port who found none."""
        before = self.listened.pop(node, frozenset())
        if places:
            self.listened[node] = places
        self.occupied.update(places - before)
        for place in before - places:
            self._unoccupied(place)
        for pool in {place.pool for place in before - places}:
            self.exhausted.discard(pool)
            for owner in tuple(self._waiting.get(pool, ())):
                self.mark(owner)

    def _unoccupied(self, place: Place) -> None:
        self.occupied[place] -= 1
        if not self.occupied[place]:
            del self.occupied[place]

    def _mark_holder(self, place: Place) -> None:
        held = self.at(place)
        if held is not None and held.owner is not None:
            self.mark(held.owner)


def _parts(keys: Keys, key: str) -> list[str]:
    """What a key says below the prefix; names and pools are one text wherever they are kept."""
    return [sys.intern(part) for part in key.removeprefix(keys.prefix + "/").split("/")]


def _clipped(reason: str) -> str:
    """A reason that fits into a record: it may quote whatever somebody wrote."""
    return reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}…"

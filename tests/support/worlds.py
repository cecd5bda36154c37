"""Whole clusters as states, and the histories that lead from one to the next.

n1 n2 n3   192.0.2.N, overlay 10.0.0.N, containers 10.0.N.0/24
web        ingress 8080 -> 80, VIP 10.1.0.1     tasks a, b, c on n1, n2, n3
api        ingress 8080 or 8090 -> 81, VIP 10.1.0.2     task d on n2
db         host mode 5432 -> 5432     task e on n1
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, TypeAlias

from mesh.delta import Delta
from mesh.rules.trace import Verdict
from mesh.store.protocol import Change, Snapshot
from tests.support import records
from tests.support.records import KEYS, Record

WEB: Final = {"target": 80, "published": 8080, "mode": "ingress"}
API: Final = {"target": 81, "published": 8090, "mode": "ingress"}
DB: Final = {"target": 5432, "published": 5432, "mode": "host"}
WEB_VIP, API_VIP = "10.1.0.1", "10.1.0.2"
A, B, C, D, E = "10.0.1.2:80", "10.0.2.2:80", "10.0.3.2:80", "10.0.2.3:81", "10.0.1.4:5432"

Answer: TypeAlias = Mapping[str, Fraction] | Verdict
Records: TypeAlias = Mapping[str, Record]


@dataclass(frozen=True)
class World:
    """Everything in etcd, and what a packet to each target then meets.

    `db` is asked at n1 alone; at any other node nothing answers there.
    """

    name: str
    records: Records
    port: Answer = Verdict.PASSED  # 8080 at the node, from outside
    vip: Answer = Verdict.DROPPED  # port 80 of the first VIP, from a container
    other: Answer = Verdict.DROPPED  # port 81 of the second
    db: Answer = Verdict.PASSED


def parts(**shares: int) -> dict[str, Fraction]:
    """Backends by their name, with the parts each has of the whole."""
    named = {"a": A, "b": B, "c": C, "d": D, "e": E}
    return {named[name]: Fraction(n, sum(shares.values())) for name, n in shares.items()}


def _join(*more: Records) -> dict[str, Record]:
    found = dict(records.cluster())
    for each in more:
        found |= each
    return found


def _web(**more: object) -> dict[str, Record]:
    spec = records.service("web", WEB, **more)
    return spec | records.vip("web", 1) | records.ingress("web", 8080, 80)


def _api(port: int) -> dict[str, Record]:
    spec = records.service("api", {**API, "published": port})
    return spec | records.vip("api", 2) | records.ingress("api", port, 81)


TASK_A = records.task("web", "a", 1, 2)
TASK_B = records.task("web", "b", 2, 2)
TASK_C = records.task("web", "c", 3, 2, weight=2)
TASK_D = records.task("api", "d", 2, 3)
TASK_E = records.task("db", "e", 1, 4)
DATABASE = records.service("db", DB) | TASK_E
DRAINING_A = records.task("web", "a", 1, 2, state="draining")
HEALTH: Final = records.health("web", "b", 2, 2) | records.health("web", "c", 3, 2, healthy=False)


def _without(world: dict[str, Record], *keys: str) -> dict[str, Record]:
    return {key: value for key, value in world.items() if key not in keys}


WORLDS: Final = (
    World("nothing", _join()),
    World("no replica", _join(_web()), port=Verdict.REFUSED, vip=Verdict.REFUSED),
    World("two replicas", _join(_web(), TASK_A, TASK_B), port=parts(a=1, b=1), vip=parts(a=1, b=1)),
    World(
        "three, weighted, and a database",
        _join(_web(), TASK_A, TASK_B, TASK_C, DATABASE),
        port=parts(a=1, b=1, c=2),
        vip=parts(a=1, b=1, c=2),
        db=parts(e=1),
    ),
    World(
        "n3 died",
        _without(_join(_web(), TASK_A, TASK_B, TASK_C, DATABASE), KEYS.alive("n3")),
        port=parts(a=1, b=1),
        vip=parts(a=1, b=1),
        db=parts(e=1),
    ),
    World(
        "one drains, one is unwell",
        _join(_web(health={"type": "tcp"}), DRAINING_A, TASK_B, TASK_C, HEALTH),
        port=parts(b=1),
        vip=parts(b=1),
    ),
    World(
        "two services",
        _join(_web(), TASK_A, _api(8090), TASK_D),
        port=parts(a=1),
        vip=parts(a=1),
        other=parts(d=1),
    ),
    World(
        "the other service has the port now",
        _join(_api(8080), TASK_D, DATABASE),
        port=parts(d=1),
        other=parts(d=1),
        db=parts(e=1),
    ),
    World(
        "allowed to others",
        _join(_web(allow=["198.51.100.0/24", "10.0.0.0/16"]), TASK_A, TASK_C),
        port=Verdict.DROPPED,
        vip=parts(a=1, c=2),
    ),
    World(
        "a spec that cannot be read",
        _join(_web(), TASK_B, {KEYS.service("odd"): b"{"}),
        port=parts(b=1),
        vip=parts(b=1),
    ),
    World(
        "the database drains",
        _join(_web(), TASK_A, DATABASE, records.task("db", "e", 1, 4, state="draining")),
        port=parts(a=1),
        vip=parts(a=1),
        db=Verdict.REFUSED,
    ),
    World(
        "the first node drains, and its database goes on",
        _join(_web(), TASK_A, TASK_B, DATABASE, {KEYS.maintenance("n1"): {"state": "draining"}}),
        port=parts(b=1),
        vip=parts(b=1),
        db=parts(e=1),
    ),
    World(
        "another drains, and nobody else serves",
        _join(_web(), TASK_B, {KEYS.maintenance("n2"): b'"draining"'}),
        port=Verdict.REFUSED,
        vip=Verdict.REFUSED,
    ),
    World(
        "it takes part again",
        _join(_web(), TASK_A, TASK_B, {KEYS.maintenance("n2"): {"state": "active"}}),
        port=parts(a=1, b=1),
        vip=parts(a=1, b=1),
    ),
)


# ---- etcd


class Etcd:
    """Moves from world to world by events; a key's creation is as old as its name, so that the
    order of worlds is not what decides about claims.
    """

    def __init__(self) -> None:
        # An agent starts only where its node has a number.
        self.held: Records = records.cluster()
        self.revision = 0

    def become(self, wanted: Records) -> list[Change]:
        """The changes that lead there."""
        delta = Delta.between(self.held, wanted)
        changes = []
        for key in sorted({*delta.remove, *delta.add}):
            self.revision += 1
            if key in delta.add:
                value = records.item(key, delta.add[key], self.revision, created=1)
                changes.append(Change(key, value, self.revision))
            else:
                changes.append(Change(key, None, self.revision))
        self.held = wanted
        return changes

    def snapshot(self) -> Snapshot:
        items = (records.item(k, v, self.revision, created=1) for k, v in self.held.items())
        return Snapshot(tuple(items), self.revision)


# ---- expanders: other histories that end in the same world

History: TypeAlias = list[tuple[World, list[list[Change]]]]
"""For each world, the portions in which its changes arrive."""


def _history(worlds: Iterable[World]) -> History:
    etcd = Etcd()
    return [(world, [etcd.become(world.records)]) for world in worlds]


def as_they_are(worlds: list[World]) -> History:
    return _history(worlds)


def backwards_first(worlds: list[World]) -> History:
    return _history([*reversed(worlds), *worlds])


def with_nothing_between(worlds: list[World]) -> History:
    return _history(each for world in worlds for each in (WORLDS[0], world))


def split(worlds: list[World]) -> History:
    return [
        (world, [[change] for portion in portions for change in portion])
        for world, portions in _history(worlds)
    ]


def split_backwards(worlds: list[World]) -> History:
    """Keys of one world in another order: services after their tasks, nodes after services."""
    return [(world, list(reversed(portions))) for world, portions in split(worlds)]


def squashed(worlds: list[World]) -> History:
    history = _history(worlds)
    return [(worlds[-1], [[c for _, portions in history for p in portions for c in p]])]


def twice(worlds: list[World]) -> History:
    return [(world, [*portions, *portions]) for world, portions in _history(worlds)]


EXPANDERS: Final = (
    as_they_are,
    backwards_first,
    with_nothing_between,
    split,
    split_backwards,
    squashed,
    twice,
)

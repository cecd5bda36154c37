"""Random clusters as values, what etcd holds of them, and the packets worth asking about.

Three nodes; the first is asked.  Service s has VIP 10.1.0.s; its replica r on node n is
10.0.n.(10 s + r); ports never collide between services: 30000 + 100 s, 32000 + 100 s and upwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Final

from hypothesis import strategies as st

from mesh.model.address import FAMILIES, Family
from mesh.model.cluster import Cluster
from mesh.model.health import Fallback
from mesh.model.publish import Protocol, PublishMode
from mesh.model.service import WHOLE_ADDRESS, Affinity, AffinityPrefix, Prefer, Source
from mesh.rules.trace import Entry, Packet
from mesh.store.protocol import Snapshot
from tests.support import records
from tests.support.records import KEYS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.records import Record

CLUSTER: Final = Cluster(id="test", prefix6="fd12:3456:789a::/48")
NODES: Final = (1, 2, 3)
HERE: Final = 1
PREFIX6: Final = "fd12:3456:789a"
OUTSIDERS: Final = (
    ("203.0.113.9", "2001:db8:9::9"),
    ("198.51.100.7", "2001:db8:7::7"),
)
NOBODYS: Final = ("10.1.0.250", f"{PREFIX6}:f000::250")
LISTS: Final = (
    ("198.51.100.0/24",),
    ("10.0.0.0/16", f"{PREFIX6}::/48"),
    ("0.0.0.0/0",),
    ("203.0.113.8/30", "2001:db8:7::/64", "192.0.2.1/32"),
    ("::/0", "203.0.112.0/21", "203.0.113.0/24"),
)
BLOCKS: Final = (
    ("203.0.113.0/24", ()),
    ("0.0.0.0/0", ("203.0.113.8/30", "10.0.0.0/9")),
    ("2001:db8::/32", ("2001:db8:9::/48",)),
    ("::/0", ()),
    ("10.0.0.0/16", ("10.0.1.250/32",)),
)
_TARGETS: Final = (80, 81)


def underlay(node: int) -> tuple[str, str]:
    return f"192.0.2.{node}", f"2001:db8::{node:x}"


def container(node: int, host: int) -> tuple[str, str]:
    return f"10.0.{node}.{host}", f"{PREFIX6}:{node}::{host:x}"


@dataclass(frozen=True)
class Port:
    """A published port; `published` None asks for one from the dynamic range."""

    target: int
    protocol: Protocol
    mode: PublishMode
    published: int | None
    host_ip: str | None = None


@dataclass(frozen=True)
class Replica:
    """A task; `families` are those it has addresses of."""

    node: int
    weight: int
    draining: bool
    unhealthy: bool
    families: tuple[Family, ...]


@dataclass(frozen=True)
class Service:
    """A service with everything that belongs to it.

    `fallback` is that of its health check; without one it has none, whatever nodes tell.
    """

    number: int
    vip: bool
    affinity: Affinity
    source: Source
    prefer: Prefer
    allow: tuple[str, ...]
    limit: int
    ports: tuple[Port, ...]
    replicas: tuple[Replica, ...]
    fallback: Fallback | None = None
    prefix: AffinityPrefix = WHOLE_ADDRESS

    @property
    def name(self) -> str:
        return f"s{self.number}"

    def vips(self) -> tuple[str, ...]:
        if not self.vip:
            return ()
        return f"10.1.0.{self.number}", f"{PREFIX6}:f000::{self.number:x}"

    def addresses(self, index: int) -> tuple[str, ...]:
        """The addresses of a replica."""
        one = self.replicas[index]
        both = container(one.node, 10 * self.number + index)
        return tuple(both[FAMILIES.index(family)] for family in one.families)

    def given(self, index: int) -> int | None:
        """The number under which a port answers, if it was given any."""
        port = self.ports[index]
        if port.published is None and port.mode is PublishMode.INGRESS:
            return 32000 + 100 * self.number + index
        return port.published


@dataclass(frozen=True)
class Rule:
    """Who may connect where: everybody without blocks and services, anywhere without ports."""

    blocks: tuple[tuple[str, tuple[str, ...]], ...] = ()
    services: tuple[str, ...] = ()
    ports: tuple[tuple[Protocol, int, int], ...] = ()


@dataclass(frozen=True)
class Policy:
    """A network policy for the tasks of one service; without one, for all."""

    service: str | None
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class World:
    """A cluster as it is at one moment."""

    services: tuple[Service, ...]
    dead: frozenset[int]
    policies: tuple[Policy, ...] = ()

    def snapshot(self) -> Snapshot:
        """Everything in etcd; tasks are created in their order."""
        found = dict(records.cluster())
        for node in NODES:
            key = KEYS.node(f"n{node}")
            found[key] = {**found[key], "addresses": underlay(node)}  # type: ignore[dict-item]
        for node in self.dead:
            del found[KEYS.alive(f"n{node}")]
        for service in self.services:
            found |= _records(service)
        for number, policy in enumerate(self.policies):
            found[KEYS.policy(f"p{number}")] = _policy(f"p{number}", policy)
        items = enumerate(found.items(), 1)
        return Snapshot(tuple(records.item(k, v, created) for created, (k, v) in items), 1000)


def _prefix(service: Service) -> dict[str, object]:
    if service.affinity is Affinity.NONE or service.prefix == WHOLE_ADDRESS:
        return {}
    return {"affinityPrefix": {"ipv4": service.prefix.ipv4, "ipv6": service.prefix.ipv6}}


def _records(service: Service) -> Iterator[tuple[str, Record]]:
    name = service.name
    yield from records.service(
        name,
        *({"target": p.target, "published": p.published, "protocol": p.protocol.value,
           "mode": p.mode.value, "hostIP": p.host_ip} for p in service.ports),
        vip="auto" if service.vip else "none", affinity=service.affinity.value,
        source=service.source.value, prefer=service.prefer.value, allow=service.allow,
        limitConnections=service.limit, health=_check(service), **_prefix(service),
    ).items()  # fmt: skip
    if service.vip:
        yield from records.vip(name, service.number).items()
    for index, port in enumerate(service.ports):
        number = service.given(index)
        if port.mode is PublishMode.INGRESS and number is not None:
            key = KEYS.port_allocation(port.protocol.value, number)
            yield key, {"service": name, "target": port.target}
    for index, one in enumerate(service.replicas):
        task = f"{name}-{index}"
        state = "draining" if one.draining else "running"
        more = {"addresses": service.addresses(index), "weight": one.weight, "state": state}
        yield from records.task(name, task, one.node, 0, **more).items()
        told = {"healthy": not one.unhealthy, "address": service.addresses(index)[0]}
        yield from records.health(name, task, one.node, 0, **told).items()  # type: ignore[arg-type]


def _policy(name: str, policy: Policy) -> Record:
    return {"name": name, "podSelector": _selector(policy.service), "ingress": [
        {"from": [*({"ipBlock": {"cidr": cidr, "except": less}} for cidr, less in rule.blocks),
                  *({"podSelector": _selector(name)} for name in rule.services)],
         "ports": [{"protocol": protocol.name, "port": first, "endPort": last}
                   for protocol, first, last in rule.ports]}
        for rule in policy.rules
    ]}  # fmt: skip


def _selector(service: str | None) -> Record:
    return {} if service is None else {"matchLabels": {"service": service}}


def _check(service: Service) -> Record | None:
    if service.fallback is None:
        return None
    return {"type": "tcp", "port": 80, "fallback": service.fallback.value}


# ---- drawing

_SOME: Final = st.sampled_from((False, False, False, True))


def _replicas() -> st.SearchStrategy[Replica]:
    return st.builds(
        Replica,
        node=st.sampled_from(NODES),
        weight=st.sampled_from((1, 1, 1, 2, 3, 0, 7, 200)),
        draining=_SOME,
        unhealthy=_SOME,
        families=st.sampled_from((FAMILIES, FAMILIES, FAMILIES[:1], FAMILIES[1:])),
    )


def _all_replicas() -> st.SearchStrategy[tuple[Replica, ...]]:
    return st.lists(_replicas(), max_size=6).map(tuple)


def _allowed() -> st.SearchStrategy[tuple[str, ...]]:
    return st.sampled_from(((), (), (), *LISTS))


def _dead() -> st.SearchStrategy[frozenset[int]]:
    return st.frozensets(st.sampled_from(NODES[1:]))


@st.composite
def _ports(draw: st.DrawFn, service: int) -> tuple[Port, ...]:
    found = []
    for index in range(draw(st.integers(0, 4))):
        mode = draw(st.sampled_from(PublishMode))
        named = mode is PublishMode.HOST or draw(st.integers(0, 3)) > 0
        host_ip = None
        if mode is PublishMode.HOST:
            host_ip = draw(st.sampled_from((None, None, *underlay(HERE))))
        found.append(
            Port(
                draw(st.sampled_from(_TARGETS)),
                draw(st.sampled_from(Protocol)),
                mode,
                30000 + 100 * service + index if named else None,
                host_ip,
            )
        )
    return tuple(found)


@st.composite
def services(draw: st.DrawFn, number: int) -> Service:
    return Service(
        number=number,
        vip=draw(st.integers(0, 4)) > 0,
        affinity=draw(st.sampled_from((Affinity.NONE, Affinity.NONE, Affinity.CLIENT_IP))),
        source=draw(st.sampled_from((Source.PRESERVE, Source.PRESERVE, Source.MASQUERADE))),
        prefer=draw(st.sampled_from((Prefer.ANY, Prefer.ANY, *Prefer))),
        allow=draw(_allowed()),
        limit=draw(st.sampled_from((0, 0, 1, 20))),
        ports=draw(_ports(number)),
        replicas=draw(_all_replicas()),
        fallback=draw(st.sampled_from((None, *Fallback))),
        prefix=draw(st.sampled_from((WHOLE_ADDRESS, AffinityPrefix(ipv4=20, ipv6=56)))),
    )


def _rules() -> st.SearchStrategy[Rule]:
    return st.builds(
        Rule,
        blocks=st.lists(st.sampled_from(BLOCKS), max_size=2).map(tuple),
        services=st.lists(st.sampled_from(("s1", "s2")), max_size=1).map(tuple),
        ports=st.lists(
            st.tuples(st.sampled_from(Protocol), st.sampled_from((1, 79, 80)),
                      st.sampled_from((80, 81, 4711))),
            max_size=2,
        ).map(tuple),
    )  # fmt: skip


def _policies() -> st.SearchStrategy[tuple[Policy, ...]]:
    """Often none at all."""
    each = st.builds(
        Policy,
        service=st.sampled_from(("s1", "s1", "s2", None)),
        rules=st.lists(_rules(), max_size=2).map(tuple),
    )
    return st.one_of(st.just(()), st.lists(each, max_size=3).map(tuple))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    count = draw(st.integers(1, 4))
    found = tuple(draw(services(number)) for number in range(1, count + 1))
    return World(found, draw(_dead()), draw(_policies()))


@st.composite
def changes(draw: st.DrawFn) -> tuple[World, World]:
    """A world and what becomes of it: other replicas and nodes, allow lists, or policies."""
    before = draw(worlds())
    what = draw(st.sampled_from(("lists", "policies", "scale", "scale")))
    if what == "policies":
        return before, replace(before, policies=draw(_policies()))
    if what == "lists":
        lists = tuple(replace(each, allow=draw(_allowed())) for each in before.services)
        return before, replace(before, services=lists)
    scaled = tuple(replace(each, replicas=draw(_all_replicas())) for each in before.services)
    return before, replace(before, services=scaled, dead=draw(_dead()))


# ---- packets


def questions(world: World) -> list[Packet]:
    """Packets of every kind that a node meets, to whatever may have an answer here."""
    return [each for family in FAMILIES for each in _questions(world, FAMILIES.index(family))]


def _questions(world: World, family: int) -> Iterator[Packet]:
    ports = {9, *_TARGETS}
    ports |= {n for s in world.services for i in range(len(s.ports)) if (n := s.given(i))}
    network = CLUSTER.network(HERE)
    own = (underlay(HERE)[family], network.overlay[family])
    vips = [s.vips()[family] for s in world.services if s.vip]
    vips.append(NOBODYS[family])
    replicas = [
        host
        for s in world.services
        for index in range(len(s.replicas))
        for host in s.addresses(index)
        if (":" in host) == bool(family)
    ]
    local = [host for host in replicas if host.startswith(container(HERE, 0)[family][:-1])]
    peers = (underlay(2)[family], CLUSTER.network(2).overlay[family])
    loopback = ("127.0.0.1", "::1")[family]
    here = (*own, network.gateway(FAMILIES[family]))
    outsiders = [each[family] for each in OUTSIDERS]
    ether = CLUSTER.network(2).mac
    for protocol, port in product(Protocol, sorted(ports)):
        for entry, sources, targets in (
            (Entry.OUTSIDE, outsiders, (*here, *peers, *vips, *replicas[:2])),
            (
                Entry.CONTAINER,
                (container(HERE, 250)[family], *local[:2]),
                (*here, *peers, *vips, *local[:1]),
            ),
            (Entry.NODE, (*own, loopback), (*here, *peers, *vips, loopback)),
            (Entry.OVERLAY, (container(2, 250)[family], peers[1]), (*here, *vips, *local[:1])),
            (Entry.STEERING, (*outsiders, container(2, 250)[family]), (*replicas[:3], own[0])),
        ):
            for source, target in product(sources, targets):
                if (source == loopback) is (target == loopback):
                    via = ether if entry is Entry.STEERING else ""
                    yield Packet(source, target, protocol, port, entry, via)

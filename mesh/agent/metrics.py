"""What the agent knows about itself and its node, as metrics; docs/metrics.md tells all of them.

Reads at the moment it is asked, and owns the names.  Counts nothing itself (tally, engine.traffic).
prometheus-client writes all but the families of published ports: of these there may be tens of
thousands of samples, and it takes 6 microseconds for each, with the interpreter's lock held.
"""

from __future__ import annotations

import asyncio
import platform
from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh import __version__
from mesh.agent import ports
from mesh.agent.http import Reply
from mesh.model.publish import Protocol
from mesh.reach.judge import Reach
from mesh.rules.traffic import NOTHING, Port, Volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client.core import Metric

    from mesh.agent.reach import Reachability
    from mesh.agent.reporter import Reporter
    from mesh.agent.rules import Installed, Rules
    from mesh.agent.state import State
    from mesh.agent.tally import Durations, Tally
    from mesh.dataplane.cttraffic import Statistics
    from mesh.model.report import Problem
    from mesh.reach.judge import Standing
    from mesh.store.sync import Follower

    Values = Mapping[tuple[str, ...], float]

CONNECTIONS: Final = "network_published_port_connections"
BYTES: Final = "network_published_port_bytes"
PORTS: Final = {
    CONNECTIONS: "Connections that came in through a published port of this node.",
    BYTES: "Bytes of IP packets that went through a published port of this node.",
}
"""What is counted by port.  Counters, but OpenMetrics wants those to end in _total."""


class Facts(NamedTuple):
    """All that metrics are made from, as it was at one moment."""

    tally: Tally
    etcd_connected: bool
    etcd_revision: int
    applied_revision: int
    is_leader: bool
    is_forwarding: bool
    services: int
    nodes: int
    live_nodes: int
    problems: tuple[Problem, ...]
    installed: Installed | None
    published: set[Port]
    volumes: Mapping[Port, Volume]
    statistics: Statistics | None
    lost: int
    surplus: Mapping[str, int]
    peers: Mapping[str, Standing]


class Metrics:
    """The metrics of one agent; `leads` tells whether it allocates for the cluster."""

    def __init__(
        self,
        tally: Tally,
        state: State,
        follower: Follower,
        reach: Reachability,
        leads: Callable[[], bool],
    ) -> None:
        self._tally = tally
        self._state = state
        self._follower = follower
        self._reach = reach
        self._leads = leads
        self._rules: Rules | None = None
        self._reporter: Reporter | None = None
        self._problems: Callable[[], Iterable[Problem]] = lambda: ()

    def look_at(
        self, rules: Rules, reporter: Reporter, problems: Callable[[], Iterable[Problem]]
    ) -> None:
        """There are rules now."""
        self._rules, self._reporter, self._problems = rules, reporter, problems

    async def page(self, accept: str) -> Reply:
        """All of them, in the format that is accepted."""
        facts = await self._facts()
        return await asyncio.to_thread(rendered, facts, accept)

    async def _facts(self) -> Facts:
        published: set[Port] = set()
        volumes: Mapping[Port, Volume] = {}
        surplus: Mapping[str, int] = {}
        installed, statistics, lost = None, None, 0
        if self._rules is not None:
            installed, local = self._rules.installed(), self._state.local_ingress()
            published = await asyncio.to_thread(ports.published, installed.frontends, local)
            traffic = self._rules.traffic
            volumes = await traffic.read(published)
            statistics, lost = await traffic.statistics(), traffic.lost
            surplus = await self._rules.surplus()
        state, node = self._state, self._state.node_view()
        peers = state.peers()
        return Facts(
            tally=self._tally,
            etcd_connected=self._follower.connected,
            etcd_revision=state.revision,
            applied_revision=self._reporter.revision if self._reporter is not None else 0,
            is_leader=self._leads(),
            is_forwarding=self._rules is not None,
            services=len(state.services()),
            nodes=len(peers),
            live_nodes=len(node.live & peers.keys()) if node is not None else 0,
            problems=tuple(self._problems()),
            installed=installed,
            published=published,
            volumes=dict(volumes),
            statistics=statistics,
            lost=lost,
            surplus=surplus,
            peers=dict(self._reach.standings()),
        )


def rendered(facts: Facts, accept: str) -> Reply:
    """The facts as text.  prometheus-client is loaded when it is first asked for."""
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(facts))
    ProcessCollector(registry=registry)
    encode, kind = choose_encoder(accept)
    text, end, body = encode(registry), b"# EOF\n", _of_ports(facts, "counter")
    if "openmetrics" in kind:
        body = _of_ports(facts, "unknown")
        return Reply(text.removesuffix(end) + body + end, kind)
    return Reply(text + body, kind)


class _Collected:
    """What prometheus-client asks for metrics."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        """All families but those by port."""
        facts, tally = self._facts, self._facts.tally
        yield from _build(facts.installed)
        yield from _publishing(facts)
        yield from _rules(facts.installed, tally)
        yield from _surplus(facts)
        yield from _cluster(facts)
        yield from _peers(facts)
        yield from _troubles(facts)
        yield from _conntrack(facts)


def _of_ports(facts: Facts, kind: str) -> bytes:
    """The families by port: all that are published, and VIPs that had traffic."""
    found = sorted(facts.published | facts.volumes.keys())
    volumes = [facts.volumes.get(port, NOTHING) for port in found]
    # Names of services need no escapes (mesh.model.names).
    labels = [f'{{service="{p[0]}",mode="{p[1]}",protocol="{p[2]}",port="{p[3]}"' for p in found]
    connections = [
        f"{CONNECTIONS}{label}}} {volume.connections}\n"
        for label, volume in zip(labels, volumes, strict=True)
    ]
    carried = [
        f'{BYTES}{label},direction="in"}} {volume.sent}\n'
        f'{BYTES}{label},direction="out"}} {volume.received}\n'
        for label, volume in zip(labels, volumes, strict=True)
    ]
    text = ""
    for name, lines in ((CONNECTIONS, connections), (BYTES, carried)):
        text += f"# HELP {name} {PORTS[name]}\n# TYPE {name} {kind}\n" + "".join(lines)
    return text.encode()


# ---- families: name, what it means, values


def _gauge(name: str, meaning: str, value: float) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(name, meaning, value)


def _gauges(name: str, meaning: str, labels: str, values: Values) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(name, meaning, labels=labels.split())
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, meaning: str, label: str, values: Mapping[str, int]) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(name, meaning, labels=(label,))
    for key, value in sorted(values.items()):
        family.add_metric((key,), value)
    return family


def _histogram(name: str, meaning: str, durations: Durations) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    return HistogramMetricFamily(name, meaning, list(durations.buckets()), durations.total)


def _build(installed: Installed | None) -> Iterator[Metric]:
    from prometheus_client.core import InfoMetricFamily

    told = {"version": __version__, "python": platform.python_version()}
    told["backend"] = installed.backend if installed is not None else ""
    yield InfoMetricFamily("mesh_build", "Which agent this is, and what drives its rules.", told)


def _publishing(facts: Facts) -> Iterator[Metric]:
    tally = facts.tally
    count = Counter((port.mode, port.protocol) for port in facts.published)
    values: Values = {
        (mode, protocol.value): count[mode, protocol.value]
        for mode in (ports.INGRESS, ports.HOST)
        for protocol in Protocol
    }
    yield _gauges(
        "network_ports_published_total",
        "Ports that are published on this node now.",
        "mode protocol",
        values,
    )
    yield _histogram(
        "network_publish_duration",
        "Seconds from hearing of a change of services until the kernel had it.",
        tally.publishing,
    )
    yield _counter(
        "network_publish_errors_total",
        "Failures to publish: refused, or a change that the kernel did not take at first.",
        "reason",
        tally.publish_errors,
    )
    yield _counter(
        "network_unpublish_errors_total",
        "Failures to clean up: a removal or flows that the kernel did not let go of at first.",
        "reason",
        tally.unpublish_errors,
    )


def _rules(installed: Installed | None, tally: Tally) -> Iterator[Metric]:
    values: Values = {(installed.backend,): installed.elements} if installed is not None else {}
    yield _gauges(
        "network_iptables_rules_total",
        "Elements of services and nodes in the kernel's rules.",
        "backend",
        values,
    )
    yield _counter(
        "network_iptables_commands_total",
        "Programs run on rules, and netlink transactions sent.",
        "program",
        tally.commands,
    )
    yield _counter(
        "network_iptables_errors_total",
        "Those of them that failed.",
        "program",
        tally.command_errors,
    )
    yield _histogram(
        "mesh_reconcile_duration_seconds",
        "Seconds from planning touched services until the kernel had it.",
        tally.reconciling,
    )
    yield _counter(
        "mesh_elements_changed_total", "Elements written to the rules.", "change", tally.elements
    )


def _surplus(facts: Facts) -> Iterator[Metric]:
    yield _counter(
        "mesh_connections_over_limit_total",
        "Connections refused because their client had as many as the service lets it have.",
        "service",
        facts.surplus,
    )


def _cluster(facts: Facts) -> Iterator[Metric]:
    behind = max(0, facts.etcd_revision - facts.applied_revision)
    yield _gauge("mesh_forwarding", "Whether the rules are in force.", facts.is_forwarding)
    yield _gauge("mesh_leader", "Whether this node allocates for the cluster.", facts.is_leader)
    yield _gauge("mesh_services", "Services with a readable record.", facts.services)
    yield _gauge("mesh_nodes", "Nodes that have a number, this one included.", facts.nodes)
    yield _gauge("mesh_nodes_alive", "Those of them that are alive.", facts.live_nodes)
    yield _gauge("mesh_etcd_connected", "Whether etcd's changes arrive.", facts.etcd_connected)
    yield _gauge("mesh_etcd_revision", "The last revision heard of.", facts.etcd_revision)
    yield _gauge("mesh_applied_revision", "The one the kernel has.", facts.applied_revision)
    yield _gauge("mesh_revisions_behind", "How far the kernel is behind.", behind)


def _peers(facts: Facts) -> Iterator[Metric]:
    known = {name: s for name, s in facts.peers.items() if s.reach is not Reach.UNKNOWN}
    yield _gauges(
        "mesh_peer_reachable",
        "Whether a node can be reached over the overlay.",
        "peer",
        {(name,): standing.reach is Reach.REACHABLE for name, standing in known.items()},
    )
    yield _gauges(
        "mesh_peer_rtt_seconds",
        "How long it takes there and back, smoothed.",
        "peer",
        {(name,): s.trip for name, s in facts.peers.items() if s.trip is not None},
    )
    from prometheus_client.core import CounterMetricFamily

    changes = CounterMetricFamily(
        "mesh_peer_changes_total", "How often a node became what it is.", labels=("peer", "to")
    )
    for key, count in sorted(facts.tally.peer_changes.items()):
        changes.add_metric(key, count)
    yield changes


def _troubles(facts: Facts) -> Iterator[Metric]:
    healings = facts.installed.healings if facts.installed is not None else None
    kinds = ("elements", "program", "firewall")
    values = {kind: getattr(healings, kind, 0) for kind in kinds}
    yield _counter(
        "mesh_healings_total", "How often what others changed was put right.", "kind", values
    )
    own = sum(not each.is_of_record for each in facts.problems)
    yield _gauges(
        "mesh_problems",
        "Problems there are now: of the node itself, and of records it was given.",
        "of",
        {("node",): own, ("record",): len(facts.problems) - own},
    )
    refused = {_service(each.about) for each in facts.problems} - {None}
    yield _gauge("mesh_services_refused", "Services that lack something here.", len(refused))


def _service(about: str) -> str | None:
    """The service that a problem is about: "service web", "task web-1 of service web"."""
    _, found, name = about.rpartition("service ")
    return name if found else None


def _conntrack(facts: Facts) -> Iterator[Metric]:
    told = facts.statistics
    entries, most = (told.entries, told.most) if told is not None else (0, 0)
    yield _gauge("mesh_conntrack_entries", "Flows in the kernel's table, of anybody.", entries)
    yield _gauge("mesh_conntrack_entries_max", "How many there may be.", most)
    yield _counter(
        "mesh_conntrack_lost_total",
        "Flows that found no place, or had to make place, since the host started.",
        "reason",
        told.lost if told is not None else {},
    )
    from prometheus_client.core import CounterMetricFamily

    yield CounterMetricFamily(
        "mesh_traffic_uncounted_total",
        "Flows that ended without being counted: too many at once.",
        facts.lost,
    )

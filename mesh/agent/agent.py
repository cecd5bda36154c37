"""One node's agent: follows etcd, and keeps the rules and the network as it says.

Owns the loops and what they wait for.  Never decides what a record means (state, planner), and
never touches the kernel itself (reconciler, network).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from mesh.agent import listeners, remark, systemd, writeback
from mesh.agent.admin import Admin
from mesh.agent.health import HealthChecks
from mesh.agent.localhealth import LocalHealth
from mesh.agent.metrics import Metrics
from mesh.agent.network import Network
from mesh.agent.occupancy import Occupancy
from mesh.agent.published import Published
from mesh.agent.reach import Reachability
from mesh.agent.reporter import Reporter
from mesh.agent.rules import Rules
from mesh.agent.state import KINDS, State
from mesh.agent.tally import Tally
from mesh.controller import lead
from mesh.dataplane import observe
from mesh.dataplane.firewall import Mode
from mesh.dataplane.linkwatch import LinkWatch
from mesh.engine import backend
from mesh.engine.desired import Touched
from mesh.errors import HostNotReady, StoreUnavailable
from mesh.model.cluster import Cluster, NodeNetwork
from mesh.model.node import Role
from mesh.model.report import Problem
from mesh.rules.program import Devices, Parameters
from mesh.store import schema
from mesh.store.election import Election
from mesh.store.lease import LeaseHolder
from mesh.store.protocol import Changes
from mesh.store.sync import CATCH_UP, Follower

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.agent.config import AgentConfig
    from mesh.model.view import NodeView
    from mesh.store.protocol import Store

log = logging.getLogger(__name__)

_CHECK_SECONDS: Final = 5.0
"""How often links and WireGuard are looked at without being told that they changed."""

_ASK_SECONDS: Final = 1.0
"""An etcd that has just told of a change answers in a millisecond."""

_SETTLE_SECONDS: Final = 0.05
"""Link notifications come in bursts; one pass answers a whole burst."""

_NOTHING: Final = Touched(frozenset(), nodes=False)


class Agent:
    """The loops of one node, over one store."""

    def __init__(self, config: AgentConfig, store: Store) -> None:
        self._config = config
        self._store = store
        self._keys = schema.Keys(config.etcd.prefix)
        self._state = State(self._keys, config.node, loopback=config.loopback_ports)
        prefixes = (f"{self._keys.prefix}/{kind}" for kind in KINDS)
        self._changed = asyncio.Event()
        self._published = Published(
            *(store, self._keys, config.node, self._state.hostports, self._changed.set),
            writeback.outlets(config),
        )
        self._follower = Follower(store, *prefixes, self._published.prefix)
        self._network = Network(config, self._state)
        self._health = HealthChecks(self._state, config, self._touch)
        self._tally = Tally()
        self._reach = Reachability(config, self._state, self._network, self._touch, self._tally)
        self._election: Election | None = None
        self._metrics = Metrics(self._tally, self._state, self._follower, self._reach, self._leads)
        pages = {"/metrics": self._metrics.page, "/peers": self._reach.page}
        self._admin = Admin(config.admin, pages, self._unready, self._changed.set)
        self._local_health = LocalHealth(self._state, self._changed.set)
        own_sockets = self._local_health.inodes
        self._occupancy = Occupancy(self._state, Path(config.state_dir), self._touch, own_sockets)
        self._pending = _NOTHING
        self._heard = 0.0
        self._nodes_changed = asyncio.Event()
        self._first_picture = asyncio.Event()
        self._forwarding = asyncio.Event()
        self._lease: LeaseHolder | None = None
        self._cluster: Cluster | None = None
        self._held: NodeNetwork | None = None
        self._deleted = False
        self._problem: Problem | None = None

    async def run(self) -> None:
        """Run until cancelled.  Raises MeshError if the node cannot take part."""
        gc.disable()  # nothing is garbage until all is loaded; looking for it costs a third of that
        cluster = await self._find_cluster()
        self._cluster = cluster
        self._lease = lease = LeaseHolder(self._store, cluster.liveness_ttl)
        try:
            with observe.observed(self._tally.ran):
                await self._take_part(cluster, lease)
        finally:
            await self._health.close()
            await self._network.close()

    async def _take_part(self, cluster: Cluster, lease: LeaseHolder) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow(), name="follow")  # etcd lists all meanwhile
            await self._register(cluster)
            await self._published.load()
            tasks.create_task(self._admin.run(), name="admin")
            if self._config.role is Role.MANAGER:
                tasks.create_task(self._control(cluster), name="controller")
            node = await self._numbered()
            self._held = node.network
            parameters = self._parameters(cluster, node.network)
            mode, start = Mode(self._config.firewall), self._network.start
            await remark.settle(self._config.backend, parameters, start, mode)
            tasks.create_task(self._keep_network(), name="network")
            await self._keep_rules(parameters, node.name, lease, tasks)

    async def _find_cluster(self) -> Cluster:
        item = await self._store.get(self._keys.cluster)
        if item is None:
            raise HostNotReady(
                f"no cluster under {self._keys.cluster} in etcd: run `mesh cluster init` first"
            )
        return schema.decode(item.key, item.value, Cluster)

    async def _register(self, cluster: Cluster) -> None:
        """Write this node's record, if it differs.  Raises HostNotReady if it cannot take part."""
        backend.check(self._config.backend)
        record = schema.encode(await self._network.identify(cluster))
        key = self._keys.node(self._config.node)
        item = await self._store.get(key)
        if item is None or item.value != record:
            await self._store.put(key, record)
            log.info("registered node=%s", self._config.node)

    async def _control(self, cluster: Cluster) -> None:
        """Stand for election, and allocate while elected.

        Forwarding comes first: only a node that needs a number itself cannot wait for it.
        """
        await self._first_picture.wait()
        if self._state.node_view() is not None:
            await self._forwarding.wait()
        store, keys, refused = self._store, self._keys, self._tally.not_allocated
        election = Election(store, keys.leader, self._config.node, cluster.liveness_ttl)
        self._election = election
        known = self._state.record
        await election.run(lambda guard: lead.lead(store, keys, guard, refused, known))

    def _leads(self) -> bool:
        return self._election is not None and self._election.leading

    # ---- etcd

    async def _follow(self) -> None:
        async with aclosing(self._follower.updates()) as updates:
            async for event in updates:
                self._state.doubting = self._lease is None or self._lease.is_doubtful()
                touched = self._state.apply(event)
                if self._published.is_echo(event):
                    continue
                if isinstance(event, Changes):
                    self._deleted |= any(change.value is None for change in event.changes)
                del event  # a snapshot is large, and the next event may be long in coming
                self._touch(touched)
                self._first_picture.set()

    def _touch(self, touched: Touched) -> None:
        """Have it planned again."""
        if touched.services and not self._pending.services:
            self._heard = time.monotonic()
        self._pending = Touched(
            self._pending.services | touched.services,
            self._pending.nodes | touched.nodes,
            self._pending.policies | touched.policies,
        )
        self._changed.set()
        if touched.nodes:
            self._nodes_changed.set()

    def _settle_doubts(self) -> None:
        """Take for gone what did not come back after etcd had ended its leases."""
        if self._state.doubted and self._lease is not None and not self._lease.is_doubtful():
            log.warning("gone since etcd was away: %s", " ".join(sorted(self._state.doubted)))
            self._touch(self._state.believe())

    async def _numbered(self) -> NodeView:
        """Wait for the controller to give this node its number."""
        told = False
        while (node := self._state.node_view()) is None or (
            self._config.node not in self._state.peers()
        ):
            self._changed.clear()
            try:
                async with asyncio.timeout(_CHECK_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                if not told:
                    log.warning("waiting for a manager to give node %s a number", self._config.node)
                told = True
        return node

    def _in_sync(self) -> bool:
        """Whether etcd holds the cluster and the number this agent began with; if not, nothing is
        changed.
        """
        strange = self._strange()
        if strange is None:
            self._problem = None
        elif self._problem is None or self._problem.message != strange:
            self._problem = Problem(about="cluster", message=strange)
            log.error("%s", strange)
        return strange is None

    def _strange(self) -> str | None:
        now = self._state.cluster
        if now is None or self._cluster is None or now.id != self._cluster.id:
            return (
                f"{self._keys.cluster} is missing or another cluster's: forwarding is held as it "
                "was; restore etcd, or run `mesh agent --cleanup` and join again"
            )
        if now.plan != self._cluster.plan:
            return (
                f"{self._keys.cluster} has other addresses or ports than at the start: forwarding "
                "is held as it was; put them back, or start every agent again"
            )
        held, network = self._held, self._state.nodes.network(self._config.node)
        if held is not None and network != held:
            number = "none" if network is None else network.number
            return (
                f"this node was given number {held.number} and now has {number}: forwarding is "
                "held as it was; start its agent again"
            )
        return None

    async def _is_wiped(self) -> bool:
        """Whether what was deleted went with the settings: of one transaction, the prefixes are
        heard of one by one.
        """
        if not self._deleted:
            return False
        self._deleted = False
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                return await self._store.get(self._keys.cluster) is None
        except (StoreUnavailable, TimeoutError):
            return False

    # ---- rules

    def _parameters(self, cluster: Cluster, network: NodeNetwork) -> Parameters:
        devices = Devices(*self._network.names, network.bridge_mac)
        return Parameters.of(cluster, network.number, devices, self._config.marks.layout)

    async def _keep_rules(
        self, parameters: Parameters, own: str, lease: LeaseHolder, tasks: asyncio.TaskGroup
    ) -> None:
        chosen = await backend.choose(self._config.backend, parameters)
        log.info("backend=%s reason=%r", chosen.driver.name, chosen.reason)
        mode = Mode(self._config.firewall)
        rules = Rules(self._state, chosen, parameters, mode, self._changed.set, self._tally)
        try:
            await self._health.adopt()
            self._reach.adopt()
            revision = await self._start(rules, parameters)
            rules.drain.applied(revision)
            key = self._keys.applied(own)
            reporter = Reporter(self._store, key, chosen, rules, self._reach)
            reporter.applied(revision)
            self._metrics.look_at(rules, reporter, lambda: self._problems(rules))
            await self._health.begin(lease, tasks)
            await lease.put(self._keys.alive(own), b"{}")
            tasks.create_task(lease.run(), name="lease")
            reports = reporter.run(
                lambda: self._tally.refused(self._problems(rules)), self._follower.orders_in
            )
            tasks.create_task(reports, name="reporter")
            self._published.look_after(tasks)
            tasks.create_task(self._occupancy.run(), name="occupancy")
            self._local_health.look(self._state.services())
            tasks.create_task(self._local_health.run(), name="local health")
            told = listeners.tell(self._store, self._keys.listeners(own), self._occupancy)
            tasks.create_task(told, name="listeners")
            rules.look_after(parameters, tasks)
            self._reach.look_after(tasks)
            log.info("forwarding node=%s number=%d", own, parameters.network.number)
            await self._keep_reconciled(rules, reporter)
        finally:
            rules.close()

    async def _start(self, rules: Rules, parameters: Parameters) -> int:
        """Have the kernel forward all that is known; the revision that it has then."""
        self._pending = _NOTHING
        revision = self._state.revision
        begun = await self._occupancy.begin(rules.read_some)
        self._published.plan()
        await rules.start(parameters)
        self._occupancy.secured(begun)
        self._begin_forwarding()
        systemd.notify("READY=1")
        gc.freeze()  # what was loaded stays, with little garbage in it: no collection walks it
        gc.enable()
        return revision

    async def _keep_reconciled(self, rules: Rules, reporter: Reporter) -> NoReturn:
        """Have the kernel follow, as long as etcd holds the truth."""
        held = False
        while True:
            await self._changed.wait()
            self._changed.clear()
            if not self._in_sync() or await self._is_wiped():
                held = True
                reporter.wake()
                continue
            if held:
                held = False
                await asyncio.sleep(CATCH_UP)  # what came back with the settings
            touched, self._pending = self._pending, _NOTHING
            heard = self._heard
            revision = self._state.revision
            self._local_health.look(touched.services)
            touched = await self._occupancy.secure(touched)
            self._published.plan()
            await rules.reconcile(touched)
            self._occupancy.secured(touched)
            self._health.look(touched.services)
            rules.drain.applied(revision)
            reporter.applied(revision)
            if touched.services:
                self._tally.publishing.add(time.monotonic() - heard)
            self._published.wake()

    def _begin_forwarding(self) -> None:
        """The rules are in force."""
        self._forwarding.set()
        self._network.guarded = True
        self._nodes_changed.set()

    def _problems(self, rules: Rules) -> Iterable[Problem]:
        if self._problem is not None:
            yield self._problem
        yield from self._network.problems
        yield from self._admin.problems
        yield from self._local_health.problems()
        yield from self._reach.problems
        yield from rules.problems()
        yield from self._published.problems()
        yield from self._occupancy.problems()
        yield from self._state.problems()

    def _unready(self) -> str | None:
        """Why packets are not yet forwarded as etcd says; None if they are."""
        if not self._forwarding.is_set():
            return f"node {self._config.node} does not forward yet: its agent is starting"
        return self._problem.message if self._problem is not None else None

    # ---- network

    async def _keep_network(self) -> None:
        """Mend the network when nodes or links changed, and look after it now and then."""
        watch = LinkWatch(self._nodes_changed.set)
        try:
            while True:
                try:
                    async with asyncio.timeout(_CHECK_SECONDS):
                        await self._nodes_changed.wait()
                except TimeoutError:
                    pass
                await asyncio.sleep(_SETTLE_SECONDS)
                self._nodes_changed.clear()
                self._settle_doubts()
                if self._lease is not None and not self._state.is_announced:
                    self._lease.again(self._keys.alive(self._config.node))
                if self._in_sync():
                    await self._sync_network()
        finally:
            watch.close()

    async def _sync_network(self) -> None:
        before = self._network.problems
        await self._network.sync()
        if self._network.problems != before:
            self._changed.set()  # so that they are reported

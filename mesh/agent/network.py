"""This node's network as the set of nodes asks for, and its own place in that set.

Level-triggered: each pass reads what is there, plans from the whole state and writes the
difference, so foreign changes and a dead wireguard-go are mended by the same code that starts up.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mesh.dataplane import host, sysctl
from mesh.dataplane.link import LinkDriver
from mesh.dataplane.sysctl import SysctlDriver
from mesh.errors import ApplyFailed, CommandFailed, HostNotReady
from mesh.model import address, link
from mesh.model.node import Node, split_endpoint
from mesh.model.report import Problem
from mesh.wg import keys, network
from mesh.wg.device import Overlay
from mesh.wg.links import Local

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.agent.config import AgentConfig
    from mesh.agent.state import State
    from mesh.model.cluster import Cluster
    from mesh.model.view import PeerNode

log = logging.getLogger(__name__)


class Network:
    """Everything of the node's network that is not a rule."""

    def __init__(self, config: AgentConfig, state: State) -> None:
        self._config = config
        self._state = state
        self._state_dir = Path(config.state_dir)
        self._layout = config.marks.layout
        self.names = link.DeviceNames(config.overlay_device, config.steering_device, config.bridge)
        self._links = LinkDriver(self.names)
        self.overlay = Overlay(self._links)
        settings = SysctlDriver(Path("/proc/sys"))
        self._network = network.Network(self.overlay, self._links, settings)
        self.nodes: Mapping[str, PeerNode] = {}
        """The nodes that are peers, and this one."""
        self.problems: tuple[Problem, ...] = ()
        self.guarded = False
        """Whether the rules are in force that keep containers from 127.0.0.1 of the node."""

    async def identify(self, cluster: Cluster) -> Node:
        """This node's record, from its key, its configuration and the host's addresses.

        Raises HostNotReady if the host cannot take part.
        """
        underlay = await self._links.underlay()
        await network.check_host(underlay, cluster, self._layout)
        if await self._links.overlay_kind() is None:
            host.check_port(cluster.wireguard_port)
        key = await keys.load(self._state_dir)
        chosen = self._config.endpoints or underlay.endpoints
        return Node(
            name=self._config.node,
            role=self._config.role,
            public_key=key.public,
            endpoints=tuple(_endpoint(text, cluster.wireguard_port) for text in chosen),
            addresses=underlay.addresses,
            labels=self._config.labels,
        )

    async def start(self) -> None:
        """The first pass.  Raises HostNotReady where no later one could do better."""
        if (lacking := await self._sync()) is not None:
            raise lacking

    async def sync(self) -> None:
        """One pass over everything.  What cannot be done is in `problems`, and tried again."""
        await self._sync()

    async def _sync(self) -> HostNotReady | None:
        own, cluster, nodes = self._config.node, self._state.cluster, self._state.peers()
        if cluster is None or own not in nodes:
            return None
        lacking = None
        underlay = await self._links.underlay()
        key = await keys.load(self._state_dir)
        mtu = underlay.mtu(split_endpoint(e)[0] for e in nodes[own].node.endpoints)
        local = Local(self.names, mtu, self._layout, loopback=self._config.loopback_ports)
        wanted = network.Wanted.of(local, cluster, nodes, own)
        self.nodes = wanted.nodes
        problems = list(wanted.problems)
        try:
            settings = sysctl.desired(self.names, loopback=self._loopback())
            port = cluster.wireguard_port
            problems += await self._network.reconcile(key, port, wanted, underlay, settings)
        except (ApplyFailed, CommandFailed, HostNotReady) as error:
            lacking = error if isinstance(error, HostNotReady) else None
            problems.append(Problem(about="network", message=str(error)))
        for problem in problems:
            if problem not in self.problems:
                log.warning("%s: %s", problem.about, problem.message)
        self.problems = tuple(problems)
        return lacking

    def _loopback(self) -> bool | None:
        """None: as it is, for the rules of an agent before this one may guard it."""
        if self._config.loopback_ports and not self.guarded:
            return None
        return self._config.loopback_ports

    async def remove(self) -> None:
        """Take everything of ours off the host."""
        await self._network.remove()

    async def close(self) -> None:
        """Release sockets and threads; the network stays as it is."""
        await self._links.close()


def _endpoint(text: str, port: int) -> str:
    """A bare address with the cluster's port, or an endpoint as it is given."""
    try:
        found = address.parse_address(text)
    except ValueError:
        return text
    return f"[{found}]:{port}" if ":" in found else f"{found}:{port}"

"""The node's overlay, links, routes and kernel settings, kept as the set of nodes asks for.

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
from mesh.delta import Delta
from mesh.errors import ApplyFailed, CommandFailed, HostNotReady
from mesh.model import address, link
from mesh.model.node import Node, split_endpoint
from mesh.model.report import Problem
from mesh.wg import keys, links, plan
from mesh.wg.device import Overlay

if TYPE_CHECKING:
    from mesh.agent.config import AgentConfig
    from mesh.agent.state import State
    from mesh.dataplane.underlay import Underlay
    from mesh.model.cluster import Cluster

log = logging.getLogger(__name__)


class Network:
    """Everything of the node's network that is not a rule."""

    def __init__(self, config: AgentConfig, state: State) -> None:
        self._config = config
        self._state = state
        self.names = link.DeviceNames(config.overlay_device, config.steering_device, config.bridge)
        self._links = LinkDriver(self.names)
        self._overlay = Overlay(self._links, Path(config.state_dir))
        self._sysctls = SysctlDriver(Path("/proc/sys"))
        self.problems: tuple[Problem, ...] = ()

    async def identify(self, cluster: Cluster) -> Node:
        """This node's record, from its key, its configuration and the host's addresses.

        Raises HostNotReady if the host cannot take part.
        """
        host.check_rights()
        host.check_program("wg", "wireguard-tools")
        underlay = await self._links.underlay()
        underlay.check(cluster)
        if await self._links.overlay_kind() is None:
            host.check_port(cluster.wireguard_port)
        key = await keys.load(Path(self._config.state_dir))
        port = cluster.wireguard_port
        chosen = self._config.endpoints or underlay.endpoints
        return Node(
            name=self._config.node,
            role=self._config.role,
            public_key=key.public,
            endpoints=tuple(_endpoint(text, port) for text in chosen),
            addresses=underlay.addresses,
            labels=self._config.labels,
        )

    async def sync(self) -> None:
        """One pass over everything.  What cannot be done is in `problems`, and tried again."""
        cluster, own = self._state.cluster, self._state.network(self._config.node)
        nodes = self._state.peers()
        if cluster is None or own is None or self._config.node not in nodes:
            return
        admitted, refused = plan.admit(nodes, self._config.node)
        peers, unreachable = plan.peers(admitted, self._config.node, cluster)
        problems = [*refused, *unreachable]
        underlay = await self._links.underlay()
        key = await keys.load(Path(self._config.state_dir))
        try:
            await self._overlay.bring_up(key, cluster.wireguard_port, peers)
        except (ApplyFailed, CommandFailed, HostNotReady) as error:
            problems.append(Problem(about="overlay", message=str(error)))
        others = [p.network for name, p in admitted.items() if name != self._config.node]
        mtu = underlay.mtu(split_endpoint(e)[0] for e in nodes[self._config.node].node.endpoints)
        desired = links.plan(self.names, cluster, own, others, mtu)
        delta = link.changes(await self._links.read(), desired)
        try:
            await self._links.apply(delta)
        except ApplyFailed as error:
            problems.append(Problem(about="links", message=str(error)))
        problems += await self._set_sysctls(underlay)
        self._tell(problems, len(delta))

    async def _set_sysctls(self, underlay: Underlay) -> tuple[Problem, ...]:
        desired = sysctl.desired(self.names) | sysctl.accept_advertisements(underlay.advertised)
        actual = await self._sysctls.read(desired)
        return await self._sysctls.apply(Delta.between(actual, desired))

    def _tell(self, problems: list[Problem], written: int) -> None:
        if written:
            log.info("links changed count=%d", written)
        for problem in problems:
            if problem not in self.problems:
                log.warning("%s: %s", problem.about, problem.message)
        self.problems = tuple(problems)

    async def remove(self) -> None:
        """Take everything of ours off the host."""
        await self._overlay.remove()
        await self._links.remove()

    async def close(self) -> None:
        """Release sockets and threads; the network stays as it is."""
        await self._links.close()


def _endpoint(text: str, port: int) -> str:
    """ "192.0.2.1" with the cluster's port, or an endpoint as it is given."""
    try:
        host_address = address.parse_address(text)
    except ValueError:
        return text
    return f"[{host_address}]:{port}" if ":" in host_address else f"{host_address}:{port}"

"""The node's whole network of the mesh: overlay, links, routes, rules and kernel settings.

Owns the order in which the drivers are called.  Decides nothing: `wanted` is planned, pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh.dataplane import foreign, host, sysctl
from mesh.delta import Delta
from mesh.model import link
from mesh.wg import device, links, plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.dataplane.link import LinkDriver
    from mesh.dataplane.sysctl import SysctlDriver
    from mesh.dataplane.underlay import Underlay
    from mesh.model.cluster import Cluster
    from mesh.model.link import Links
    from mesh.model.report import Problem
    from mesh.model.view import PeerNode
    from mesh.rules.marks import Layout
    from mesh.wg.device import Overlay
    from mesh.wg.keys import PrivateKey
    from mesh.wg.links import Local
    from mesh.wg.plan import Peer


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a node's network is to be, and which nodes have no part in it.

    `nodes` are those that have, by name; `peers` are theirs by public key.
    """

    nodes: Mapping[str, PeerNode]
    peers: Mapping[str, Peer]
    links: Links
    problems: tuple[Problem, ...]

    @staticmethod
    def of(local: Local, cluster: Cluster, nodes: Mapping[str, PeerNode], own: str) -> Wanted:
        """The network of node `own`, which is one of `nodes`.  Pure."""
        admitted, refused = plan.admit(nodes, own)
        peers, silent = plan.peers(admitted, own, cluster)
        others = (peer.network for name, peer in admitted.items() if name != own)
        desired = links.plan(local, cluster, admitted[own].network, others)
        return Wanted(admitted, peers, desired, refused + silent)


async def check_host(underlay: Underlay, cluster: Cluster, layout: Layout) -> None:
    """Raise HostNotReady if this host cannot carry the mesh."""
    host.check_rights()
    host.check_program("wg", "wireguard-tools")
    underlay.check(cluster)
    foreign.check_marks(layout, await foreign.routing_rules(), await device.fwmarks())


class Network:
    """Brings the overlay, the links and the kernel settings in line, in that order."""

    def __init__(self, overlay: Overlay, driver: LinkDriver, sysctls: SysctlDriver) -> None:
        self._overlay = overlay
        self._driver = driver
        self._sysctls = sysctls

    async def reconcile(
        self,
        key: PrivateKey,
        port: int,
        wanted: Wanted,
        underlay: Underlay,
        settings: Mapping[str, str],
    ) -> tuple[Problem, ...]:
        """Read everything, write what differs; returns the kernel `settings` that were refused.

        Keeps sessions and connections; does nothing when nothing differs.  Raises HostNotReady,
        ApplyFailed or CommandFailed; what could be applied then is.
        """
        await self._overlay.bring_up(key, port, wanted.peers)
        delta = link.changes(await self._driver.read(), wanted.links)
        devices, rest = _split(delta)
        await self._driver.apply(devices)
        problems = await self._set(underlay, settings)
        await self._driver.apply(rest)
        return problems

    async def update(self, before: Wanted, after: Wanted) -> None:
        """Write what differs between two plans, without reading: for a node that came or changed.

        An endpoint that was announced anew is used at once.  Raises ApplyFailed; then, and when
        anything else touched the network, `reconcile`.
        """
        await self._overlay.apply(Delta.between(before.peers, after.peers))
        await self._driver.apply(link.changes(before.links, after.links))

    async def remove(self) -> None:
        """Delete all of it; kernel settings stay as they are."""
        await self._driver.remove()
        self._overlay.remove_socket()

    async def _set(self, underlay: Underlay, settings: Mapping[str, str]) -> tuple[Problem, ...]:
        """Settings come between: those of a device need it, IPv6 addresses may need them."""
        accept = sysctl.accept_advertisements(underlay.advertised)
        before = await self._sysctls.read(accept)
        # 0 says that a daemon, not the kernel, listens there; it must stay so.
        needed = {key: accept[key] for key, value in before.items() if value == "1"}
        needed |= settings
        actual = await self._sysctls.read(needed)
        return await self._sysctls.apply(Delta.between(actual, needed))


def _split(delta: link.LinkDelta) -> tuple[link.LinkDelta, link.LinkDelta]:
    """The changes of devices, and all others."""

    def part(*, devices: bool) -> link.LinkDelta:
        return Delta(
            {k: v for k, v in delta.remove.items() if isinstance(k, link.Device) is devices},
            {k: v for k, v in delta.add.items() if isinstance(k, link.Device) is devices},
        )

    return part(devices=True), part(devices=False)

"""The host's own addresses and routes, and what follows from them for the overlay.

Pure: the link driver reads, this decides.  The mesh's own devices are never among them.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.errors import HostNotReady
from mesh.model import address
from mesh.model.address import FAMILIES, Family

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.model.cluster import Cluster

ETHERNET_MTU: Final = 1500

ROUTER_ADVERTISEMENT: Final = 9
"""RTPROT_RA: the kernel made the route from a router advertisement."""

_DEFAULT_LENGTH: Final = 1
"""VPN clients cut the default route in two: 0.0.0.0/1 and 128.0.0.0/1 are default routes too."""


class HostAddress(NamedTuple):
    """An address of the host, and the device that has it."""

    address: str
    device: str
    mtu: int


class HostRoute(NamedTuple):
    """A unicast route of the main table that is not ours."""

    prefix: str
    device: str
    metric: int
    source: str | None
    protocol: int


@dataclass(frozen=True, slots=True)
class Underlay:
    """What the host has without the mesh."""

    hosts: tuple[HostAddress, ...]
    routes: tuple[HostRoute, ...]

    @property
    def addresses(self) -> tuple[str, ...]:
        """All addresses another host could use: no loopback, no link-local ones."""
        return tuple(host.address for host in self.hosts if _is_reachable(host.address))

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Addresses to announce for WireGuard, best first: those of the default routes' devices.

        Without a default route: all of them.
        """
        found: list[str] = []
        for family in FAMILIES:
            route = self._default(family)
            if route is not None:
                found += [route.source] if route.source is not None else []
                found += (h.address for h in self.hosts if h.device == route.device)
        usable = set(self.addresses)
        best = sorted(found, key=lambda a: address.family_of(a).value)
        return tuple(dict.fromkeys(a for a in best if a in usable)) or self.addresses

    def mtu(self, endpoints: Iterable[str]) -> int:
        """The smallest MTU of the devices that have `endpoints`; Ethernet's if none is known."""
        wanted = set(endpoints)
        return min((h.mtu for h in self.hosts if h.address in wanted), default=ETHERNET_MTU)

    @property
    def advertised(self) -> tuple[str, ...]:
        """Devices whose default route came by router advertisement: forwarding must not end it."""
        return tuple(sorted({r.device for r in self.routes if r.protocol == ROUTER_ADVERTISEMENT}))

    def check(self, cluster: Cluster) -> None:
        """Raise HostNotReady if a route of the host overlaps one of the mesh's prefixes."""
        for route in self.routes:
            if address.prefix_length(route.prefix) <= _DEFAULT_LENGTH:
                continue
            for name, prefix in _pools(cluster):
                if address.overlaps(prefix, route.prefix):
                    raise HostNotReady(
                        f"route {route.prefix} dev {route.device} overlaps the mesh's {name} "
                        f"{prefix}: choose other prefixes at `mesh cluster init` or remove the "
                        "route"
                    )

    def _default(self, family: Family) -> HostRoute | None:
        routes = (
            r
            for r in self.routes
            if address.family_of(r.prefix) is family and address.prefix_length(r.prefix) == 0
        )
        return min(routes, key=lambda r: r.metric, default=None)


def _pools(cluster: Cluster) -> tuple[tuple[str, str], ...]:
    return (
        ("overlay4", cluster.overlay4),
        ("containers4", cluster.containers4),
        ("vips4", cluster.vips4),
        ("prefix6", cluster.prefix6),
    )


def _is_reachable(text: str) -> bool:
    value = ipaddress.ip_address(text)
    return not (value.is_loopback or value.is_link_local or value.is_multicast)

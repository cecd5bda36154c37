"""A host in no cluster, as the rule engine sees it: its program, and what its ports come to.  Pure.

The program is that of a node whose devices and addresses nobody has: of all its lines only those
for published ports ever meet a packet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from mesh.engine.desired import NOTHING, Lowered
from mesh.hostports import plan
from mesh.model import address
from mesh.model.address import FAMILIES
from mesh.model.cluster import Cluster
from mesh.model.view import HostClaim
from mesh.rules import nft
from mesh.rules.guards import Guards
from mesh.rules.program import Devices, Parameters

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from mesh.hostports.publications import Publication, Publications
    from mesh.rules.elements import Elements
    from mesh.rules.forwarding import Forwarding
    from mesh.rules.ids import Ids
    from mesh.rules.marks import Layout

_NOBODYS: Final = Cluster(
    id="none",
    overlay4="0.1.0.0/24",
    containers4="0.2.0.0/16",
    vips4="0.3.0.0/16",
    prefix6="100::/48",
)
"""No host has an address of 0.0.0.0/8 (RFC 1122, 3.2.1.3; 0.0.0.0 itself, which DHCP clients send
from, is not among these) or around the discard prefix 100::/64 (RFC 6666)."""

DEVICES: Final = Devices("warren0", "warren-x0", "warren-br0", "02:4d:45:42:00:01")
"""An agent's, which there is none of beside."""


def parameters(owner: int, segments: Iterable[str]) -> Parameters:
    """What the program of such a host is made from; `segments` are the networks of its containers.

    Port 0 is nobody's either: no UDP port is kept for steering.
    """
    networks = sorted(segments)
    return replace(
        Parameters.of(_NOBODYS, 1, DEVICES),
        steering_port=0,
        owner=owner,
        segments=tuple(address.of_family(tuple(networks), family) for family in FAMILIES),
    )


class Published:
    """What the publications of a host come to, for the engine: a task is a service."""

    def __init__(self, publications: Publications) -> None:
        self._publications = publications

    def services(self) -> Collection[str]:
        """The tasks that have ports."""
        return self._publications.names()

    def forwardings(self, service: str) -> tuple[Forwarding, ...]:
        """Where the ports of a task lead."""
        found = self._publications.get(service)
        return plan.lead(found.addresses, _claims(found)) if found is not None else ()

    def lower(self, service: str, ids: Ids) -> Lowered:
        """The same as elements; a container may call itself through its port."""
        found = self._publications.get(service)
        if found is None:
            return NOTHING
        lowered = nft.lower_hairpins(found.addresses)
        forwardings = plan.lead(found.addresses, _claims(found))
        for forwarding in forwardings:
            lowered |= nft.lower(forwarding, ids)
        return Lowered(lowered, tuple(forwarding.key for forwarding in forwardings))

    def lower_nodes(self, layout: Layout) -> Elements:
        """There are no nodes."""
        del layout
        return {}

    def guards(self) -> Guards:
        """Nor policies."""
        return Guards()


def _claims(publication: Publication) -> Iterable[HostClaim]:
    task = publication.task
    for port in publication.ports:
        if port.published is not None:
            place = (port.protocol, port.published, port.target, port.host_ip)
            yield HostClaim(task, task, *place, revision=0)

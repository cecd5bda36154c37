"""Which WireGuard peers a node has, and which nodes are refused, from what the nodes say.

Pure: same nodes, same answer on every node.  A refused node is reported, never applied.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from mesh.delta import Delta
from mesh.model import address
from mesh.model.address import FAMILIES, Family
from mesh.model.node import split_endpoint
from mesh.model.report import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mesh.model.cluster import Cluster
    from mesh.model.view import PeerNode

    Nodes = Mapping[str, PeerNode]

SESSION_SECONDS: Final = 180
"""WireGuard's REJECT_AFTER_TIME: a session whose handshake is older carries nothing."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One peer of the overlay device.  `endpoint` None means: wait until the peer speaks first."""

    endpoint: str | None
    allowed: tuple[str, ...]
    keepalive: int


@dataclass(frozen=True, slots=True)
class Session:
    """What WireGuard says about a peer: seconds since the epoch (0: never), and bytes."""

    handshake: int
    received: int
    sent: int

    def is_live(self, now: float) -> bool:
        """Whether the peer could be reached lately; `now` in seconds since the epoch."""
        return now - self.handshake < SESSION_SECONDS


def admit(nodes: Nodes, own: str) -> tuple[dict[str, PeerNode], tuple[Problem, ...]]:
    """The nodes that may be peers of `own`, itself among them, and why the others may not.

    Of nodes that share a public key or an address, the one with the lowest number keeps it.  Only
    a node itself sees it otherwise: it cannot be its own peer, so the other one goes.
    """
    claims = _Claims()
    admitted: dict[str, PeerNode] = {}
    problems: list[Problem] = []
    order = sorted(nodes, key=lambda name: (name != own, nodes[name].network.number, name))
    for name in order:
        holder, what = claims.holder(nodes[name])
        if holder is None:
            claims.add(name, nodes[name])
            admitted[name] = nodes[name]
        else:
            problems.append(_refusal(nodes, name, holder, what))
    return admitted, tuple(problems)


def peers(
    admitted: Nodes, own: str, cluster: Cluster
) -> tuple[dict[str, Peer], tuple[Problem, ...]]:
    """The peers of `own` by public key, and which nodes gave no endpoint that can be used."""
    found: dict[str, Peer] = {}
    problems = []
    for name, peer in admitted.items():
        if name == own:
            continue
        endpoint, faults = _endpoint(peer, admitted[own], cluster)
        if endpoint is None:
            reason = "; ".join(faults) or "it has none"
            message = f"no usable WireGuard endpoint ({reason}): set endpoints in its agent.toml"
            problems.append(Problem(about=f"node {name}", message=message))
        allowed = tuple(sorted((*_hosts(peer), *peer.network.subnets)))
        found[peer.node.public_key] = Peer(endpoint, allowed, cluster.keepalive)
    return found, tuple(problems)


def changes(
    actual: Mapping[str, Peer], desired: Mapping[str, Peer], live: frozenset[str]
) -> Delta[str, Peer]:
    """The delta of peers, leaving alone the endpoints of the peers in `live`.

    WireGuard follows a peer that roams or sits behind NAT; the endpoint of a living session is
    better than the one the node announced.
    """
    settled = {
        key: replace(peer, endpoint=actual[key].endpoint)
        if key in actual and (key in live or peer.endpoint is None)
        else peer
        for key, peer in desired.items()
    }
    return Delta.between(actual, settled)


def _hosts(peer: PeerNode) -> Iterator[str]:
    for family in FAMILIES:
        yield f"{peer.network.overlay_address(family)}/{family.bits}"


def _endpoint(
    peer: PeerNode, own: PeerNode, cluster: Cluster
) -> tuple[str | None, tuple[str, ...]]:
    """The first endpoint `own` can use, and what is wrong with those before it."""
    usable = {address.family_of(a) for a in own.node.addresses} or set(FAMILIES)
    faults: list[str] = []
    for endpoint in peer.node.endpoints:
        fault = _fault(endpoint, own, usable, cluster)
        if fault is None:
            return endpoint, tuple(faults)
        faults.append(f"{endpoint} {fault}")
    return None, tuple(faults)


def _fault(endpoint: str, own: PeerNode, usable: set[Family], cluster: Cluster) -> str | None:
    host, port = split_endpoint(endpoint)
    family = address.family_of(host)
    if any(address.contains(prefix, host) for prefix in cluster.prefixes(family)):
        return "lies inside the mesh itself"  # the tunnel would be routed into the tunnel
    if not _is_reachable(host):
        return "is not reachable from another host"
    if family not in usable:
        return f"is IPv{family.value}, which this node does not have"
    if host in own.node.addresses and port == cluster.wireguard_port:
        return "is this node itself"  # every Vagrant machine has the address 10.0.2.15
    return None


def _is_reachable(host: str) -> bool:
    value = ipaddress.ip_address(host)
    return not (
        value.is_unspecified or value.is_loopback or value.is_link_local or value.is_multicast
    )


def _refusal(nodes: Nodes, name: str, holder: str, what: str) -> Problem:
    """Blames the node with the higher number, whichever of the two was refused here."""
    first, second = sorted((name, holder), key=lambda n: (nodes[n].network.number, n))
    remedy = "delete its key file and restart its agent" if what == "public key" else "remove it"
    return Problem(
        about=f"node {second}",
        message=f"its {what} belongs to node {first} (number {nodes[first].network.number}): "
        f"not a peer; {remedy}",
    )


class _Claims:
    """Who holds which key and which addresses; look-ups are logarithmic in the nodes."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}
        self._ranges: dict[Family, list[tuple[int, int, str]]] = {f: [] for f in FAMILIES}

    def holder(self, peer: PeerNode) -> tuple[str | None, str]:
        """Who already holds something of `peer`, and what."""
        if peer.node.public_key in self._keys:
            return self._keys[peer.node.public_key], "public key"
        for family, first, last, prefix in _ranges(peer):
            taken = self._ranges[family]
            index = bisect_right(taken, (last, 1 << 129, ""))
            if index and taken[index - 1][1] >= first:
                return taken[index - 1][2], f"address {prefix}"
        return None, ""

    def add(self, name: str, peer: PeerNode) -> None:
        """Record everything that `peer` holds; none of it may be held already."""
        self._keys[peer.node.public_key] = name
        for family, first, last, _ in _ranges(peer):
            taken = self._ranges[family]
            taken.insert(bisect_right(taken, (first, last, name)), (first, last, name))


def _ranges(peer: PeerNode) -> Iterator[tuple[Family, int, int, str]]:
    for prefix in (*_hosts(peer), *peer.network.subnets):
        network = ipaddress.ip_network(prefix)
        yield address.family_of(prefix), int(network[0]), int(network[-1]), prefix

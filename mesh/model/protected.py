"""Ports that nothing is published on: what the mesh needs itself, and what the cluster protects.

Pure.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model.publish import PORTS, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.model.cluster import Cluster

DEFAULT: Final = ("22/tcp", "2379-2380/tcp")
"""What every host needs to stay in reach: ssh, and etcd's clients and peers."""

_ENTRY: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/([A-Za-z]+))?", re.ASCII)


class Protection(NamedTuple):
    """Why a port is not published; `forcible` if whoever insists gets it."""

    reason: str
    forcible: bool


def parse_entry(text: str) -> tuple[range, tuple[Protocol, ...]]:
    """The ports and protocols of "22/tcp", "6000-6063" or the like.  Raises ValueError."""
    match = _ENTRY.fullmatch(text)
    if match is not None:
        low, high = int(match[1]), int(match[2] or match[1])
        try:
            protocols = (Protocol(match[3]),) if match[3] else tuple(Protocol)
        except ValueError:
            protocols = ()
        if protocols and low in PORTS and high in PORTS and low <= high:
            return range(low, high + 1), protocols
    raise ValueError(f"protected port {text!r}: write PORT[-END][/tcp|udp|sctp] with 1-65535")


def protection(cluster: Cluster, protocol: Protocol, port: int) -> Protection | None:
    """What speaks against publishing a port on nodes' addresses, if anything does."""
    if port in _own(cluster, protocol):
        return Protection("carries the overlay itself: publish another port", forcible=False)
    entry = listed(cluster.protected_ports, protocol, port)
    if entry is None:
        return None
    reason = f"is protected ({entry} in the cluster's protectedPorts): publish another port"
    return Protection(f"{reason}, or force it", forcible=True)


def listed(entries: tuple[str, ...], protocol: Protocol, port: int) -> str | None:
    """The entry that protects a port, if any does."""
    return _listed(entries)[protocol].get(port)


def numbers(entries: tuple[str, ...], protocol: Protocol) -> frozenset[int]:
    """Every port of a protocol that some entry protects."""
    return frozenset(_listed(entries)[protocol])


def barred(cluster: Cluster, protocol: Protocol) -> frozenset[int]:
    """Every such port: none of them is given out."""
    return _own(cluster, protocol) | _listed(cluster.protected_ports)[protocol].keys()


def _own(cluster: Cluster, protocol: Protocol) -> frozenset[int]:
    if protocol is Protocol.UDP:
        return frozenset((cluster.wireguard_port, cluster.steering_port))
    return frozenset()


@lru_cache(maxsize=16)
def _listed(entries: tuple[str, ...]) -> Mapping[Protocol, Mapping[int, str]]:
    """The entry that protects each port."""
    found: dict[Protocol, dict[int, str]] = {protocol: {} for protocol in Protocol}
    for entry in entries:
        ports, protocols = parse_entry(entry)
        for protocol in protocols:
            found[protocol] |= dict.fromkeys(ports, entry)
    return found

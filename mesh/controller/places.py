"""What can be allocated: one number of one pool, and the key under which that is written.  Pure."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from mesh.model.publish import Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.store.schema import Keys

PortPool = Literal["tcp", "udp", "sctp"]
Pool = str
"""One of POOLS, or the share of one service: see `share`."""

PORT_POOLS: Final[Mapping[Protocol, PortPool]] = {
    Protocol.TCP: "tcp",
    Protocol.UDP: "udp",
    Protocol.SCTP: "sctp",
}
POOLS: Final[tuple[Pool, ...]] = ("nodes", "vips", *PORT_POOLS.values())

_CANONICAL: Final = re.compile(r"0|[1-9][0-9]{0,9}")
_OF: Final = " of "


class Place(msgspec.Struct, frozen=True, order=True, gc=False):
    """One number of one pool: what can be allocated once."""

    pool: Pool
    number: int


def share(pool: PortPool, service: str) -> Pool:
    """The ports that a service has on the nodes that it selects: others may have them, too."""
    return sys.intern(f"{pool}{_OF}{service}")


def whole(pool: Pool) -> Pool:
    """The pool that this is a share of, or itself."""
    return pool.partition(_OF)[0]


def key(keys: Keys, place: Place) -> str:
    """The etcd key of an allocation."""
    match place.pool:
        case "nodes":
            return keys.node_allocation(place.number)
        case "vips":
            return keys.vip_allocation(place.number)
    protocol, _, service = place.pool.partition(_OF)
    if service:
        return keys.port_share(protocol, place.number, service)
    return keys.port_allocation(protocol, place.number)


def parse(parts: list[str]) -> Place | None:
    """The place that an allocation's key names; None for a key that is none of ours."""
    match parts:
        case ["nodes" | "vips" as pool, text]:
            return _place(pool, text)
        case ["ports", "tcp" | "udp" | "sctp" as pool, text]:
            return _place(pool, text)
        case ["shares", "tcp" | "udp" | "sctp" as pool, text, service]:
            return _place(share(pool, service), text)
    return None


def _place(pool: Pool, text: str) -> Place | None:
    found = number(text)
    return None if found is None else Place(pool, found)


def number(text: str) -> int | None:
    """The number that is written so, and in no other way."""
    return int(text) if _CANONICAL.fullmatch(text) else None

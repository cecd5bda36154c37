"""What a node's kernel holds of the mesh's links and routes, as keyed values.

A driver reads and writes these; `mesh.wg.links` plans them.  Pure.  Ours are recognised without
memory: devices by name and kind, addresses, neighbours and tunnels by device, routes and rules by
the routing protocol number `PROTOCOL`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.delta import Delta

if TYPE_CHECKING:
    from mesh.model.address import Family

PROTOCOL: Final = 77
"""Marks our routes and rules; rtnetlink(7) leaves numbers above RTPROT_STATIC to programs."""

MAIN_TABLE: Final = 254


class DeviceNames(NamedTuple):
    """The names of the node's own devices."""

    overlay: str
    steering: str
    bridge: str


@dataclass(frozen=True, slots=True)
class Device:
    """Key of a device."""

    name: str

    def __str__(self) -> str:
        return f"device {self.name}"


@dataclass(frozen=True, slots=True)
class Tunnel:
    """What a vxlan device is made with; none of it can be changed afterwards."""

    vni: int
    local: str
    port: int
    learning: bool = False
    ttl: int = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """How a device is to be; None means that the mesh does not care."""

    mtu: int | None = None
    mac: str | None = None
    tunnel: Tunnel | None = None
    up: bool = True


@dataclass(frozen=True, slots=True)
class Address:
    """Key of an address on one of our devices; it has no value.  `prefix` is "10.0.0.1/32"."""

    device: str
    prefix: str

    def __str__(self) -> str:
        return f"address {self.prefix} on {self.device}"


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Key of a permanent neighbour; its value is the MAC address."""

    device: str
    address: str

    def __str__(self) -> str:
        return f"neighbour {self.address} on {self.device}"


@dataclass(frozen=True, slots=True)
class TunnelEnd:
    """Key of a vxlan forwarding entry; its value is the outer address that has the MAC address."""

    device: str
    mac: str

    def __str__(self) -> str:
        return f"tunnel end {self.mac} on {self.device}"


@dataclass(frozen=True, slots=True)
class Route:
    """Key of a route."""

    table: int
    prefix: str

    def __str__(self) -> str:
        return f"route {self.prefix} in table {self.table}"


@dataclass(frozen=True, slots=True)
class Via:
    """Where a route leads: out of a device, perhaps by a gateway, with a preferred source.

    A gateway that is not link-local is taken to be on the link (`onlink`).
    """

    device: str
    gateway: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Local:
    """A route to the node itself, for what comes in by a device."""

    device: str


@dataclass(frozen=True, slots=True)
class Throw:
    """A route that ends the look-up in its table: the next rule decides."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Key of a routing rule: matches packets whose `mark` equals, within `mask`."""

    family: Family
    priority: int
    mark: int
    mask: int

    def __str__(self) -> str:
        return (
            f"rule {self.priority} fwmark {self.mark:#x}/{self.mask:#x} of IPv{self.family.value}"
        )


@dataclass(frozen=True, slots=True)
class Lookup:
    """The rule looks in a table."""

    table: int


@dataclass(frozen=True, slots=True)
class Goto:
    """The rule jumps to the rule of a higher priority number."""

    priority: int


@dataclass(frozen=True, slots=True)
class Nop:
    """The rule does nothing; it is there to be jumped to."""


LinkKey = Device | Address | Neighbour | TunnelEnd | Route | Rule
LinkValue = Settings | Via | Local | Throw | Lookup | Goto | Nop | str | None
Links = Mapping[LinkKey, LinkValue]
LinkDelta = Delta[LinkKey, LinkValue]


ORDER: Final = (Device, Address, Neighbour, TunnelEnd, Route, Rule)
"""The order in which kinds are added: what a thing needs comes first.  Removal goes backwards."""


def is_recreated(actual: LinkValue, desired: LinkValue) -> bool:
    """Whether a device with the settings `actual` can become `desired` only by being made anew."""
    if not isinstance(actual, Settings):
        return False
    return not isinstance(desired, Settings) or actual.tunnel != desired.tunnel


def changes(actual: Links, desired: Links) -> LinkDelta:
    """The delta from `actual` to `desired`.

    A device that is made anew takes everything on it along, so all of that is added again.
    """
    lost = {
        key.name
        for key, value in actual.items()
        if isinstance(key, Device) and is_recreated(value, desired.get(key))
    }
    if not lost:
        return Delta.between(actual, desired)
    kept = {k: v for k, v in actual.items() if isinstance(k, Device) or _device(k, v) not in lost}
    return Delta.between(kept, desired)


def _device(key: LinkKey, value: LinkValue) -> str | None:
    """The device that `key` cannot outlive."""
    if isinstance(key, Address | Neighbour | TunnelEnd):
        return key.device
    return value.device if isinstance(value, Via | Local) else None

"""Who listens on a node's ports, and which addresses that is about.  Pure.

A process of the host that listens where the mesh publishes would hear nothing any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from mesh.model import address as addresses
from mesh.model.address import Family
from mesh.model.publish import Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

Port = tuple[Protocol, int]

_EVERY: Final = {Family.V4: "0.0.0.0", Family.V6: "::"}


class Binding(NamedTuple):
    """A published port as a socket would be bound to it; `address` None means every address."""

    protocol: Protocol
    port: int
    address: str | None


class Listener(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True, gc=False
):
    """One port that a process of a node listens on.

    `address` is empty where that is every address of both families, "0.0.0.0" or "::" where it is
    every one of one.  `process` is its name, `pid` its number; both are empty where nobody can
    tell, and the number alone is 0 for the kernel.
    """

    protocol: Protocol
    port: int
    address: str = ""
    process: str = ""
    pid: int = 0

    @property
    def owner(self) -> str:
        """Who it is, in words."""
        if not self.process:
            return "a process that this agent cannot see"
        return f"{self.process} (pid {self.pid})" if self.pid else self.process

    def meets(self, address: str | None) -> bool:
        """Whether some packet to a port published on `address`, or on every one, was for it.

        Ports do not answer on the node's loopback addresses, unless published there by name.
        """
        if not self.address or self.address == address:
            return True
        family = addresses.family_of(self.address)
        if address is None:
            return not addresses.contains(addresses.LOOPBACK[family], self.address)
        return self.address == _EVERY[family] and addresses.family_of(address) is family


class Listening(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What the processes of a node listen on, as its agent tells the others."""

    listeners: tuple[Listener, ...]


def by_port(listeners: Iterable[Listener]) -> dict[Port, tuple[Listener, ...]]:
    """Listeners by the port, in a fixed order."""
    found: dict[Port, tuple[Listener, ...]] = {}
    for one in sorted(listeners, key=lambda each: (each.address, each.pid, each.process)):
        port = (one.protocol, one.port)
        found[port] = (*found.get(port, ()), one)
    return found


def refusal(port: Port, node: str, listener: Listener) -> str:
    """Why a port that somebody listens on is not published there."""
    protocol, number = port
    return (
        f"port {number}/{protocol.value} on node {node} is used by {listener.owner}: stop it, "
        "choose another port, or publish with --force"
    )

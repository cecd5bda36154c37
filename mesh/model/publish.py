"""Published ports: what a user asks for with `--publish`, as a record."""

from __future__ import annotations

import enum
from typing import Final

import msgspec
from msgspec import UNSET, UnsetType

from mesh.model.address import parse_address
from mesh.model.names import check_name

PORTS: Final = range(1, 65536)


class Protocol(enum.Enum):
    """A transport protocol; read in any case, written in lower case."""

    TCP = "tcp"
    UDP = "udp"
    SCTP = "sctp"

    __hash__ = object.__hash__  # a member is one object; Enum's own hash is a Python call

    @classmethod
    def _missing_(cls, value: object) -> Protocol | None:
        if isinstance(value, str) and value != value.lower():
            return cls._value2member_map_.get(value.lower())  # type: ignore[return-value]
        return None

    @property
    def number(self) -> int:
        """The IANA protocol number, as it stands in an IP header."""
        return _NUMBERS[self]


_NUMBERS: Final = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}
PROTOCOLS: Final = {protocol.number: protocol for protocol in Protocol}


class PublishMode(enum.Enum):
    """Where a published port answers: on the task's node, or on every node."""

    HOST = "host"
    INGRESS = "ingress"


class PublishedPort(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True, gc=False
):
    """One published port, in the words of Compose's long syntax.

    `published` None (0 on Swarm's wire) asks for a port from the dynamic range, in turn or, if
    `random`, at random; `host_ip` None means every address.  `force` publishes a port that the
    cluster protects; one that the mesh needs itself is never published.
    """

    target: int
    published: int | None = None
    protocol: Protocol = Protocol.TCP
    mode: PublishMode = PublishMode.HOST
    host_ip: str | None = msgspec.field(default=None, name="hostIP")
    name: str | UnsetType | None = UNSET
    random: bool | UnsetType = UNSET
    force: bool | UnsetType = UNSET

    def __post_init__(self) -> None:
        for field in ("name", "random", "force"):  # what says nothing is not written
            if not getattr(self, field):
                msgspec.structs.force_setattr(self, field, UNSET)
        if self.target not in PORTS:
            raise ValueError(f"target port {self.target} is not in 1-65535")
        if self.published == 0:
            msgspec.structs.force_setattr(self, "published", None)
        if self.published is not None and self.published not in PORTS:
            raise ValueError(f"published port {self.published} is not in 1-65535")
        if self.host_ip is not None and parse_address(self.host_ip) != self.host_ip:
            raise ValueError(f"hostIP {self.host_ip!r}: write {parse_address(self.host_ip)!r}")
        if self.host_ip is not None and self.mode is PublishMode.INGRESS:
            raise ValueError("hostIP needs mode host: an ingress port answers on every node")
        if self.random and self.published is not None:
            raise ValueError(f"published port {self.published} cannot be random as well")
        if self.random and self.mode is PublishMode.INGRESS:
            raise ValueError("a random port needs mode host: ingress ports are given in turn")
        if self.name:
            check_name(self.name, "port name")

    def __str__(self) -> str:
        published = "*" if self.published is None else str(self.published)
        address = "*" if self.host_ip is None else bracketed(self.host_ip)
        return f"{address}:{published}->{self.target}/{self.protocol.value}"


def bracketed(address: str) -> str:
    """An address as it stands before a port."""
    return f"[{address}]" if ":" in address else address

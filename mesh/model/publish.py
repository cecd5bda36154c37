"""Published ports: what a user asks for with `--publish`, and the short syntax it is written in."""

from __future__ import annotations

import enum
import re
from typing import Final

import msgspec

from mesh.model.address import parse_address

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
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """One published port, in the words of Compose's long syntax.

    `published` None asks for a port from the dynamic range; `host_ip` None means every address.
    """

    target: int
    published: int | None = None
    protocol: Protocol = Protocol.TCP
    mode: PublishMode = PublishMode.HOST
    host_ip: str | None = msgspec.field(default=None, name="hostIP")

    def __post_init__(self) -> None:
        if self.target not in PORTS:
            raise ValueError(f"target port {self.target} is not in 1-65535")
        if self.published is not None and self.published not in PORTS:
            raise ValueError(f"published port {self.published} is not in 1-65535")
        if self.host_ip is not None and parse_address(self.host_ip) != self.host_ip:
            raise ValueError(f"hostIP {self.host_ip!r}: write {parse_address(self.host_ip)!r}")
        if self.host_ip is not None and self.mode is PublishMode.INGRESS:
            raise ValueError("hostIP needs mode host: an ingress port answers on every node")

    def __str__(self) -> str:
        published = "*" if self.published is None else str(self.published)
        address = "*" if self.host_ip is None else self.host_ip
        return f"{address}:{published}->{self.target}/{self.protocol.value}"


_SHORT: Final = re.compile(r"(?P<published>[^:/]*):(?P<target>[^:/]*)(?:/(?P<protocol>.*))?")


def _port(text: str, part: str, spec: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) in PORTS):
        raise ValueError(f"invalid {part} port {text!r} in {spec!r}: must be 1-65535")
    return int(text)


def parse_publish(spec: str, mode: PublishMode) -> PublishedPort:
    """A port from the short syntax `HOST:CONTAINER[/tcp|udp]`.  Raises ValueError.

    The grammar is the one Warren and Swarm share (docker service create, --publish).
    """
    match = _SHORT.fullmatch(spec)
    if match is None:
        raise ValueError(f"invalid port {spec!r}: the format is HOST:CONTAINER[/tcp|udp]")
    name = match["protocol"] if match["protocol"] is not None else "tcp"
    try:
        protocol = Protocol(name)
    except ValueError:
        raise ValueError(f"invalid protocol {name!r} in {spec!r}: must be tcp or udp") from None
    return PublishedPort(
        target=_port(match["target"], "container", spec),
        published=_port(match["published"], "host", spec),
        protocol=protocol,
        mode=mode,
    )

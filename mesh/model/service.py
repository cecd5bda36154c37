"""A service: a name, its published ports and the policies of its traffic."""

from __future__ import annotations

import enum
import sys
from typing import Final

import msgspec

from mesh.model.address import parse_address, parse_prefix
from mesh.model.names import NO_LABELS, check_name, parse_duration
from mesh.model.publish import PublishedPort, PublishMode

MOST_PORTS: Final = 10_240
"""Published ports of one service: with more, its record is beyond the 1.5 MiB that etcd takes."""


class Affinity(enum.Enum):
    """How a client is tied to a backend."""

    NONE = "none"
    CLIENT_IP = "client-ip"


class Source(enum.Enum):
    """What address a replica on another node sees: the client's, or the ingress node's."""

    PRESERVE = "preserve"
    MASQUERADE = "masquerade"


class Prefer(enum.Enum):
    """Which replicas a node balances over."""

    ANY = "any"
    LOCAL = "local"
    LOCAL_ONLY = "local-only"


class HealthCheck(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """How a task proves that it may be given new connections."""

    type: str = "none"
    port: int | None = None
    path: str = "/"
    interval: str = "5s"
    timeout: str = "2s"
    rise: int = 2
    fall: int = 3

    def __post_init__(self) -> None:
        if self.type not in ("none", "tcp", "http", "exec"):
            raise ValueError(f"health type {self.type!r} is not one of none, tcp, http, exec")
        parse_duration(self.interval)
        parse_duration(self.timeout)
        if self.rise < 1 or self.fall < 1:
            raise ValueError("rise and fall must be at least 1")


class ServiceSpec(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True, gc=False
):
    """What a user or an automation asks for, as it stands in etcd.

    `vip` is "auto", "none" or an IPv4 address of the VIP range.
    """

    name: str
    ports: tuple[PublishedPort, ...] = ()
    vip: str = "auto"
    affinity: Affinity = Affinity.NONE
    source: Source = Source.PRESERVE
    prefer: Prefer = Prefer.ANY
    health: HealthCheck | None = None
    allow: tuple[str, ...] = ()
    drain: str = "10s"
    labels: dict[str, str] = {}

    def __post_init__(self) -> None:
        check_name(self.name, "service")
        if self.vip not in ("auto", "none"):
            parse_address(self.vip)
        for prefix in self.allow:
            parse_prefix(prefix)
        parse_duration(self.drain)
        self._check_ports()
        for field in ("name", "vip", "drain"):  # one text for all records that say it
            msgspec.structs.force_setattr(self, field, sys.intern(getattr(self, field)))
        if not self.labels:
            msgspec.structs.force_setattr(self, "labels", NO_LABELS)

    def _check_ports(self) -> None:
        if len(self.ports) > MOST_PORTS:
            raise ValueError(
                f"{len(self.ports)} published ports: a service may have {MOST_PORTS}, so make "
                "several of it"
            )
        taken: dict[tuple[object, ...], PublishedPort] = {}
        for port in self.ports:
            if port.published is None:
                continue
            key = (port.published, port.protocol)
            other = taken.get(key)
            if other is not None and _answer_together(port, other):
                raise ValueError(
                    f"port {port.published}/{port.protocol.value} is published twice: "
                    f"{other} and {port}"
                )
            taken[key] = port


def _answer_together(one: PublishedPort, other: PublishedPort) -> bool:
    """Whether some packet would match both ports."""
    if PublishMode.INGRESS in (one.mode, other.mode):
        return True
    return one.host_ip is None or other.host_ip is None or one.host_ip == other.host_ip

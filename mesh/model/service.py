"""A service: a name, its published ports and the policies of its traffic."""

from __future__ import annotations

import enum
import sys
from collections import defaultdict
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import UNSET, UnsetType

from mesh.model import selector
from mesh.model.address import Family, parse_address, parse_prefix
from mesh.model.health import CheckType, HealthCheck
from mesh.model.names import NO_LABELS, check_label, check_name, parse_duration
from mesh.model.publish import PORTS, Protocol, PublishedPort, PublishMode

if TYPE_CHECKING:
    from mesh.model.selector import Selector

MOST_CONNECTIONS: Final = 65_535
"""The highest limit of connections per client: a client has no more ports to one frontend."""

MOST_PORTS: Final = 10_240
"""Published ports of one service: with more, its record is beyond the 1.5 MiB that etcd takes."""


ZONE_LABEL: Final = "zone"
"""The label of nodes that says which zone they are in, if a service names no other."""


class Affinity(enum.Enum):
    """How a client is tied to a backend."""

    NONE = "none"
    CLIENT_IP = "client-ip"


class AffinityPrefix(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """How much of a client's address ties it to a backend: those of one prefix share theirs."""

    ipv4: int = 32
    ipv6: int = 128

    def __post_init__(self) -> None:
        if self.ipv4 not in range(1, 33):
            raise ValueError(f"affinity prefix /{self.ipv4} of IPv4 is not in /1-/32")
        if self.ipv6 not in range(4, 129, 4):
            raise ValueError(
                f"affinity prefix /{self.ipv6} of IPv6 is not a multiple of 4 in /4-/128"
            )

    def length(self, family: Family) -> int:
        """In bits."""
        return self.ipv4 if family is Family.V4 else self.ipv6


WHOLE_ADDRESS: Final = AffinityPrefix()


class Source(enum.Enum):
    """What address a replica on another node sees: the client's, or the ingress node's."""

    PRESERVE = "preserve"
    MASQUERADE = "masquerade"


class Prefer(enum.Enum):
    """Which replicas a node balances over: its own or those of its zone as long as there are any,
    or its own only.
    """

    ANY = "any"
    LOCAL = "local"
    LOCAL_ONLY = "local-only"
    ZONE = "zone"


class ServiceSpec(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True, gc=False
):
    """What a user or an automation asks for, as it stands in etcd.

    `vip` is "auto", "none" or an IPv4 address of the VIP range; `zone_label` the label of nodes
    whose value is their zone.  On `local_health_port` each node tells whether it has replicas.
    `publish_on` selects the nodes on which published ports answer (mesh.model.selector).
    `limit_connections` is how many connections at a time one client may have to each port of it,
    on each node; 0: as many as it likes.
    """

    name: str
    ports: tuple[PublishedPort, ...] = ()
    vip: str = "auto"
    affinity: Affinity = Affinity.NONE
    affinity_prefix: AffinityPrefix | UnsetType = UNSET
    source: Source = Source.PRESERVE
    prefer: Prefer = Prefer.ANY
    zone_label: str | UnsetType = UNSET
    local_health_port: int | UnsetType = UNSET
    publish_on: str | UnsetType = UNSET
    health: HealthCheck | None = None
    allow: tuple[str, ...] = ()
    limit_connections: int | UnsetType = UNSET
    drain: str = "10s"
    labels: dict[str, str] = {}

    def __post_init__(self) -> None:
        check_name(self.name, "service")
        if self.vip not in ("auto", "none"):
            parse_address(self.vip)
        for prefix in self.allow:
            parse_prefix(prefix)
        parse_duration(self.drain)
        if self.publish_on:
            selector.parse(self.publish_on)
        elif self.publish_on is not UNSET:  # of all nodes
            msgspec.structs.force_setattr(self, "publish_on", UNSET)
        if self.zone_label is not UNSET:
            check_label(self.zone_label)
        if self.affinity_prefix is not UNSET and self.affinity is not Affinity.CLIENT_IP:
            raise ValueError("affinityPrefix needs affinity client-ip")
        if not self.limit_connections:  # what says nothing is not written
            msgspec.structs.force_setattr(self, "limit_connections", UNSET)
        if self.limit not in range(MOST_CONNECTIONS + 1):
            raise ValueError(
                f"limitConnections {self.limit}: give a number from 1 to "
                f"{MOST_CONNECTIONS}, or 0 for no limit"
            )
        self._check_ports()
        self._check_local_health()
        for field in ("name", "vip", "drain"):  # one text for all records that say it
            msgspec.structs.force_setattr(self, field, sys.intern(getattr(self, field)))
        if not self.labels:
            msgspec.structs.force_setattr(self, "labels", NO_LABELS)
        check = self.check
        if check is not None and check.type is not CheckType.EXEC and self.checked_port is None:
            raise ValueError(
                f"health type {check.type.value} needs a port: the service has no target over TCP"
            )

    @property
    def affine_prefix(self) -> AffinityPrefix:
        """How much of a client's address counts."""
        return WHOLE_ADDRESS if self.affinity_prefix is UNSET else self.affinity_prefix

    @property
    def zone_key(self) -> str:
        """The label whose value is a node's zone."""
        return ZONE_LABEL if self.zone_label is UNSET else self.zone_label

    @property
    def heeds_labels(self) -> bool:
        """Whether labels of nodes say what it comes to."""
        return self.prefer is Prefer.ZONE or bool(self.publish_on)

    @property
    def selector(self) -> Selector:
        """What is required of nodes on which published ports answer."""
        return selector.parse(self.publish_on) if self.publish_on else ()

    @property
    def drain_seconds(self) -> float:
        """How long established connections go on while a task drains."""
        return parse_duration(self.drain)

    @property
    def limit(self) -> int:
        """How many connections a client may have; 0: as many as it likes."""
        return self.limit_connections or 0

    @property
    def check(self) -> HealthCheck | None:
        """The health check, if there is one to pass."""
        health = self.health
        return None if health is None or health.type is CheckType.NONE else health

    @property
    def checked_port(self) -> int | None:
        """The port that is probed: the check's own, or the first target over TCP."""
        if self.health is not None and self.health.port is not None:
            return self.health.port
        return next((p.target for p in self.ports if p.protocol is Protocol.TCP), None)

    def _check_local_health(self) -> None:
        port = self.local_health_port
        if port is UNSET:
            return
        if port not in PORTS:
            raise ValueError(f"localHealthPort {port} is not in 1-65535")
        for other in self.ports:
            if (other.published, other.protocol) == (port, Protocol.TCP):
                raise ValueError(f"localHealthPort {port} is published, too: {other}")

    def _check_ports(self) -> None:
        if len(self.ports) > MOST_PORTS:
            raise ValueError(
                f"{len(self.ports)} published ports: a service may have {MOST_PORTS}, so make "
                "several of it"
            )
        taken: defaultdict[tuple[object, ...], list[PublishedPort]] = defaultdict(list)
        for port in self.ports:
            if port.published is None:
                continue
            others = taken[port.published, port.protocol]
            for other in others:
                if _answer_together(port, other):
                    raise ValueError(
                        f"port {port.published}/{port.protocol.value} is published twice: "
                        f"{other} and {port}"
                    )
            others.append(port)


def _answer_together(one: PublishedPort, other: PublishedPort) -> bool:
    """Whether some packet would match both ports."""
    if PublishMode.INGRESS in (one.mode, other.mode):
        return True
    return one.host_ip is None or other.host_ip is None or one.host_ip == other.host_ip

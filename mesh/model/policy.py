"""A network policy: who may connect to the tasks it selects, in the words of Kubernetes'
NetworkPolicy (networking/v1), as far as they mean something here.
"""

from __future__ import annotations

import enum
import ipaddress
from typing import TYPE_CHECKING, Final

import msgspec

from mesh.model.address import parse_prefix
from mesh.model.names import check_name
from mesh.model.publish import PORTS, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

SERVICE_LABEL: Final = "service"
"""The label that every task has: the name of its service."""


class PolicyProtocol(enum.Enum):
    """A protocol, as policies spell it."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"

    @property
    def protocol(self) -> Protocol:
        """The same, as ports have it."""
        return Protocol(self.value.lower())


class PolicyType(enum.Enum):
    """What a policy is about: only connections that come in."""

    INGRESS = "Ingress"


class _Record(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    rename="camel",
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    pass


class PodSelector(_Record, frozen=True):
    """Tasks with all of these labels; without any, every task of the cluster."""

    match_labels: dict[str, str] = {}

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether a task with these labels is selected."""
        return all(labels.get(name) == value for name, value in self.match_labels.items())


class IPBlock(_Record, frozen=True):
    """The addresses of a prefix but for some prefixes within."""

    cidr: str
    except_: tuple[str, ...] = msgspec.field(default=(), name="except")

    def __post_init__(self) -> None:
        whole = ipaddress.ip_network(parse_prefix(self.cidr))
        for text in self.except_:
            part = ipaddress.ip_network(parse_prefix(text))
            if part.version != whole.version or not part.subnet_of(whole):  # type: ignore[arg-type]
                raise ValueError(f"except {text!r} is not within cidr {self.cidr!r}")


class Peer(_Record, frozen=True):
    """Who may connect: tasks, or addresses."""

    pod_selector: PodSelector | None = None
    ip_block: IPBlock | None = None

    def __post_init__(self) -> None:
        if (self.pod_selector is None) is (self.ip_block is None):
            raise ValueError("each entry of `from` has either a podSelector or an ipBlock")


class PolicyPort(_Record, frozen=True):
    """Ports of the tasks, not published ones; without `port`, all of the protocol."""

    protocol: PolicyProtocol = PolicyProtocol.TCP
    port: int | None = None
    end_port: int | None = None

    def __post_init__(self) -> None:
        for name, port in (("port", self.port), ("endPort", self.end_port)):
            if port is not None and port not in PORTS:
                raise ValueError(f"{name} {port} is not in 1-65535")
        if self.end_port is not None and (self.port is None or self.end_port < self.port):
            raise ValueError(f"endPort {self.end_port} needs a port that is not above it")

    @property
    def span(self) -> tuple[int, int]:
        """The first and the last port."""
        if self.port is None:
            return 0, PORTS[-1]
        return self.port, self.end_port or self.port


class IngressRule(_Record, frozen=True):
    """Peers and the ports that they may connect to; an empty list means all."""

    from_: tuple[Peer, ...] = msgspec.field(default=(), name="from")
    ports: tuple[PolicyPort, ...] = ()


class NetworkPolicy(_Record, frozen=True):
    """Only what some rule of some policy allows may connect to a task that policies select."""

    name: str
    pod_selector: PodSelector
    ingress: tuple[IngressRule, ...] = ()
    policy_types: tuple[PolicyType, ...] = (PolicyType.INGRESS,)

    def __post_init__(self) -> None:
        check_name(self.name, "policy")
        if self.policy_types != (PolicyType.INGRESS,):
            raise ValueError('policyTypes must be ["Ingress"]: there are no others here')


def labels_of(service: str, inherited: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The labels of a task: its own beat its service's, and nobody names another service."""
    return {**inherited, **own, SERVICE_LABEL: service}

"""Which task on this node gets which host port, when several want the same one.

Pure, mutable; knows only this node.  The outcome depends on the claims, never on the order in
which they became known: the smallest revision wins, then service and task name.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from mesh.model.view import HostClaim

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mesh.model.publish import Protocol

_Port = tuple["Protocol", int]


class Claims:
    """The claims of every service to this node's ports, and who holds each."""

    def __init__(self) -> None:
        self._wanted: dict[str, frozenset[HostClaim]] = {}
        self._ingress: dict[_Port, str] = {}
        self._claimants: defaultdict[_Port, set[HostClaim]] = defaultdict(set)
        self._owner: dict[HostClaim, HostClaim] = {}

    def update(self, service: str, wanted: Iterable[HostClaim]) -> frozenset[str]:
        """Replace a service's claims; the services whose granted ports changed."""
        claims = frozenset(wanted)
        before = self._wanted.pop(service, frozenset())
        if claims:
            self._wanted[service] = claims
        changed: set[str] = set()
        for claim in before - claims:
            self._claimants[_port(claim)].discard(claim)
            if self._owner.pop(claim) == claim:
                changed.add(service)
        for claim in claims - before:
            self._claimants[_port(claim)].add(claim)
        for port in {_port(claim) for claim in before ^ claims}:
            changed |= self._decide(port)
        return frozenset(changed)

    def reserve(self, protocol: Protocol, published: int, service: str | None) -> frozenset[str]:
        """An ingress port is allocated to `service`, or to nobody: no task gets it for itself.

        Returns the services whose granted ports changed.
        """
        port = (protocol, published)
        if service is None:
            self._ingress.pop(port, None)
        else:
            self._ingress[port] = service
        return frozenset(self._decide(port)) if port in self._claimants else frozenset()

    def is_reserved(self, protocol: Protocol, published: int) -> bool:
        """Whether a port is an ingress port."""
        return (protocol, published) in self._ingress

    def claimants(self, protocol: Protocol, published: int) -> frozenset[tuple[str, str]]:
        """The services and tasks that claim a port, whoever holds it."""
        claims = self._claimants.get((protocol, published), ())
        return frozenset((claim.service, claim.task) for claim in claims)

    def granted(self, service: str) -> frozenset[HostClaim]:
        """The claims of a service that hold their port."""
        claims = self._wanted.get(service)
        if claims is None:
            return frozenset()
        return frozenset(claim for claim in claims if self._owner[claim] == claim)

    def refused(self, service: str) -> tuple[tuple[HostClaim, HostClaim], ...]:
        """The claims of a service that got nothing, each with the claim that holds the port.

        The holder's `task` is empty where the port is an ingress port.
        """
        claims = sorted(self._wanted.get(service, frozenset()), key=_age)
        return tuple((c, self._owner[c]) for c in claims if self._owner[c] != c)

    def all_refused(self) -> Iterator[tuple[HostClaim, HostClaim]]:
        """Every claim on this node that got nothing, with the claim that holds the port."""
        return ((claim, owner) for claim, owner in self._owner.items() if claim != owner)

    def _decide(self, port: _Port) -> set[str]:
        """Grant one port anew; the services that won or lost a claim to it."""
        changed: set[str] = set()
        holders = list(self._ingress_claim(port))
        for claim in sorted(self._claimants[port], key=_age):
            owner = next((h for h in holders if _answer_together(h, claim)), claim)
            if owner is claim:
                holders.append(claim)
            if (self._owner.get(claim) == claim) != (owner is claim):
                changed.add(claim.service)
            self._owner[claim] = owner
        if not self._claimants[port]:
            del self._claimants[port]
        return changed

    def _ingress_claim(self, port: _Port) -> Iterator[HostClaim]:
        """What every task's claim to an ingress port loses against."""
        if port in self._ingress:
            yield HostClaim(self._ingress[port], "", *port, 0, None, 0)


def _port(claim: HostClaim) -> _Port:
    return claim.protocol, claim.published


def _age(claim: HostClaim) -> tuple[int, str, str, str, int, int]:
    address = claim.address or ""
    return claim.revision, claim.service, claim.task, address, claim.published, claim.target


def _answer_together(one: HostClaim, other: HostClaim) -> bool:
    """Whether some packet to their common port would match both."""
    return one.address is None or other.address is None or one.address == other.address

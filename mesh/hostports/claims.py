"""Which task on this node gets its host ports, when several want the same one.

A task gets all that it claims, or nothing: half a task would answer on some of its ports and hide
that others lack.  Pure, mutable; knows only this node.  The outcome depends on the claims, never on
the order in which they became known: tasks choose by revision, then service and task name.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from mesh.model.view import HostClaim

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from mesh.model.publish import Protocol

_Port = tuple["Protocol", int]
_Rank = tuple[int, str, str]
"""Revision, service, task: the smaller one chooses first."""

_NOTHING: frozenset[HostClaim] = frozenset()


class _Bid(NamedTuple):
    """What one task wants; `waits` if it lacks something else besides."""

    rank: _Rank
    claims: frozenset[HostClaim]
    waits: bool


class Claims:
    """The claims of every service to this node's ports, and which tasks hold theirs.

    A change costs as much as the ports of the tasks that it concerns: each is decided at most once,
    the older before the younger, and only those that want a port that was won or lost.
    """

    def __init__(self) -> None:
        self._bids: dict[str, dict[str, _Bid]] = {}
        self._ingress: dict[_Port, str] = {}
        self._claimants: defaultdict[_Port, set[HostClaim]] = defaultdict(set)
        self._granted: set[tuple[str, str]] = set()
        self._refused: dict[tuple[str, str], tuple[tuple[HostClaim, HostClaim], ...]] = {}

    def update(
        self, service: str, wanted: Iterable[HostClaim], waiting: Collection[str] = ()
    ) -> frozenset[str]:
        """Replace a service's claims; the services whose granted ports changed.

        The tasks that are `waiting` lack something else, and so get none of what they claim.
        """
        bids = _bids(wanted, waiting)
        before = self._bids.pop(service, {})
        if bids:
            self._bids[service] = bids
        changed: set[str] = set()
        ports: set[_Port] = set()
        for task in before.keys() | bids.keys():
            old, new = before.get(task), bids.get(task)
            if old != new:
                ports |= self._replace(old, new)
                if (service, task) in self._granted and _claims(old) != _claims(new):
                    changed.add(service)
                if new is None:
                    self._granted.discard((service, task))
                    self._refused.pop((service, task), None)
        concerned = {rank for port in ports for rank in self._ranks(port)}
        return frozenset(changed | self._decide(concerned))

    def reserve(self, protocol: Protocol, published: int, service: str | None) -> frozenset[str]:
        """An ingress port is allocated to `service`, or to nobody: no task gets it for itself.

        Returns the services whose granted ports changed.
        """
        port = (protocol, published)
        if service is None:
            self._ingress.pop(port, None)
        else:
            self._ingress[port] = service
        return frozenset(self._decide(set(self._ranks(port))))

    def is_reserved(self, protocol: Protocol, published: int) -> bool:
        """Whether a port is an ingress port."""
        return (protocol, published) in self._ingress

    def claimants(self, protocol: Protocol, published: int) -> frozenset[tuple[str, str]]:
        """The services and tasks that name a port themselves, whoever holds it."""
        claims = self._claimants.get((protocol, published), ())
        return frozenset((claim.service, claim.task) for claim in claims if claim.revision)

    def granted(self, service: str) -> frozenset[HostClaim]:
        """The claims of a service that hold their port."""
        bids = self._bids.get(service)
        if bids is None:
            return _NOTHING
        held = (bid.claims for task, bid in bids.items() if (service, task) in self._granted)
        return frozenset[HostClaim]().union(*held)

    def refused(self, service: str) -> tuple[tuple[HostClaim, HostClaim], ...]:
        """What is in the way of a service's tasks: the claims, each with the one that has the port.

        That one's `task` is empty where the port is an ingress port.
        """
        bids = self._bids.get(service, {})
        return tuple(
            pair
            for task in sorted(bids, key=lambda name: bids[name].rank)
            for pair in self._refused.get((service, task), ())
        )

    def all_refused(self) -> Iterator[tuple[tuple[HostClaim, HostClaim], ...]]:
        """The same of every task on this node that has something in its way."""
        return iter(self._refused.values())

    # ---- decisions

    def _replace(self, old: _Bid | None, new: _Bid | None) -> set[_Port]:
        """Have a task's claims known instead of those before; the ports that either names."""
        for claim in _claims(old):
            port = _port(claim)
            self._claimants[port].discard(claim)
            if not self._claimants[port]:
                del self._claimants[port]
        for claim in _claims(new):
            self._claimants[_port(claim)].add(claim)
        return {_port(claim) for claim in _claims(old) | _claims(new)}

    def _ranks(self, port: _Port) -> Iterator[_Rank]:
        """Of all that want a port."""
        for claim in self._claimants.get(port, ()):
            yield self._bids[claim.service][claim.task].rank

    def _decide(self, concerned: set[_Rank]) -> set[str]:
        """Decide on these tasks anew, and on whom that concerns; whose granted ports changed."""
        changed: set[str] = set()
        queue = list(concerned)
        heapq.heapify(queue)
        while queue:
            rank = heapq.heappop(queue)
            _, service, task = rank
            bid, name = self._bids[service][task], (service, task)
            obstacles = tuple(self._obstacles(bid))
            if obstacles:
                self._refused[name] = obstacles
            else:
                self._refused.pop(name, None)
            if (is_granted := not (obstacles or bid.waits)) == (name in self._granted):
                continue
            changed.add(service)
            if is_granted:
                self._granted.add(name)
            else:
                self._granted.discard(name)
            for claim in bid.claims:
                for other in self._ranks(_port(claim)):
                    if other > rank and other not in concerned:
                        concerned.add(other)
                        heapq.heappush(queue, other)
        return changed

    def _obstacles(self, bid: _Bid) -> Iterator[tuple[HostClaim, HostClaim]]:
        """The claims that lose, each against the one that has the port."""
        for claim in sorted(bid.claims, key=_order):
            owner = self._owner(claim, bid.rank)
            if owner is not None:
                yield claim, owner

    def _owner(self, claim: HostClaim, rank: _Rank) -> HostClaim | None:
        """Whose port it is, if somebody else's: a number that was given stays its task's, even
        while that waits for others.
        """
        port = _port(claim)
        if port in self._ingress:
            return HostClaim(self._ingress[port], "", *port, 0, None, 0)
        holders = [
            other
            for other in self._claimants[port]
            if (other.service, other.task) != rank[1:]
            and _answer_together(claim, other)
            and self._comes_before(other, claim, rank)
        ]
        return min(holders, key=_age, default=None)

    def _comes_before(self, other: HostClaim, claim: HostClaim, rank: _Rank) -> bool:
        if not other.revision:
            return claim.revision > 0
        if (other.service, other.task) not in self._granted:
            return False
        return self._bids[other.service][other.task].rank < rank


def _bids(wanted: Iterable[HostClaim], waiting: Collection[str]) -> dict[str, _Bid]:
    claims: defaultdict[str, list[HostClaim]] = defaultdict(list)
    for claim in wanted:
        claims[claim.task].append(claim)
    return {
        task: _Bid(
            (max(c.revision for c in of_task), of_task[0].service, task),
            frozenset(of_task),
            task in waiting,
        )
        for task, of_task in claims.items()
    }


def _claims(bid: _Bid | None) -> frozenset[HostClaim]:
    return bid.claims if bid is not None else frozenset()


def _port(claim: HostClaim) -> _Port:
    return claim.protocol, claim.published


def _order(claim: HostClaim) -> tuple[int, str, str, int]:
    return claim.published, claim.protocol.value, claim.address or "", claim.target


def _age(claim: HostClaim) -> tuple[int, str, str, str]:
    return claim.revision, claim.service, claim.task, claim.address or ""


def _answer_together(one: HostClaim, other: HostClaim) -> bool:
    """Whether some packet to their common port would match both."""
    return one.address is None or other.address is None or one.address == other.address

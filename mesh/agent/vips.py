"""The VIPs that services were given, as far as they lie in the cluster's range.

Mutable, a part of mesh.agent.state.  Pure: no clock, no I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mesh.model.allocation import VipAllocation
    from mesh.model.cluster import Cluster


class Vips:
    """What is allocated to each service; of two indexes the lower one counts."""

    def __init__(self) -> None:
        self._cluster: Cluster | None = None
        self._held: dict[str, dict[int, VipAllocation]] = {}
        self._addresses: dict[str, tuple[str, ...]] = {}

    def confine(self, cluster: Cluster | None) -> None:
        """The cluster has these settings."""
        self._cluster = cluster
        self._addresses.clear()

    def allocated(self, index: int, vip: VipAllocation, *, held: bool) -> None:
        """A service was given this index of the range, or no longer has it."""
        self._addresses.pop(vip.service, None)
        indexes = self._held.setdefault(vip.service, {})
        if held:
            indexes[index] = vip
        else:
            indexes.pop(index, None)
        if not indexes:
            del self._held[vip.service]

    def of(self, service: str) -> tuple[str, ...]:
        """The addresses of a service that really lie in the VIP range, whatever etcd says."""
        found = self._addresses.get(service)
        if found is None:
            held, cluster = self._held.get(service), self._cluster
            if not held or cluster is None:
                return ()
            found = held[min(held)].addresses
            if not all(map(cluster.is_vip, found)):
                found = tuple(filter(cluster.is_vip, found))
            self._addresses[service] = found
        return found

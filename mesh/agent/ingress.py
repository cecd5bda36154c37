"""Which ports of nodes the controller gave to which service.

Mutable, a part of mesh.agent.state.  Pure: no clock, no I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from mesh.model.allocation import LOCAL_HEALTH

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from mesh.model.service import ServiceSpec
    from mesh.model.view import IngressPort

T = TypeVar("T")


class IngressPorts:
    """The ingress ports of services, and those on which nodes tell of their replicas."""

    def __init__(self) -> None:
        self._ports: dict[str, frozenset[IngressPort]] = {}
        self._health: dict[str, frozenset[int]] = {}

    def allocated(self, service: str, port: IngressPort, *, held: bool) -> None:
        """A service was given a port, or no longer has it."""
        if port.target == LOCAL_HEALTH:
            _hold(self._health, service, port.published, held=held)
        else:
            _hold(self._ports, service, port, held=held)

    def of(self, service: str) -> Collection[IngressPort]:
        """Those of a service, in no order."""
        return self._ports.get(service, ())

    def everything(self) -> Mapping[str, Collection[IngressPort]]:
        """Those of every service that has any."""
        return self._ports

    def local_health(self, spec: ServiceSpec) -> int | None:
        """The port on which nodes tell of a service, if it was given the one that it wants."""
        wanted = spec.local_health_port
        return wanted if wanted and wanted in self._health.get(spec.name, ()) else None


def _hold(owned: dict[str, frozenset[T]], service: str, thing: T, *, held: bool) -> None:
    """An owner of nothing is not kept."""
    before: frozenset[T] = owned.pop(service, frozenset())
    now = before | {thing} if held else before - {thing}
    if now:
        owned[service] = now

"""What a service's VIP and ingress ports mean on a node, as forwardings.

Pure, and deterministic: the same set of tasks gives the same forwardings in whatever order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.model.address import one_per_family
from mesh.model.publish import PublishMode
from mesh.model.service import Prefer
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.vip import eligibility

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.model.publish import Protocol
    from mesh.model.service import ServiceSpec
    from mesh.model.task import Task
    from mesh.model.view import IngressPort, NodeView, ServiceView


def plan(service: ServiceView, node: NodeView) -> tuple[Forwarding, ...]:
    """One forwarding per target port and protocol, and a second one where the published port is
    local-only.

    The VIP answers on the target port of every published port, whatever its mode.
    """
    tasks = eligibility.eligible(service, node)
    chosen = eligibility.preferred(tasks, service.spec.prefer, node)
    found: list[Forwarding] = []
    for target, protocol in _targets(service.spec):
        vip = [Frontend(Scope.VIP, address, protocol, target) for address in sorted(service.vips)]
        ports = sorted(_published(service, target, protocol))
        key = f"{service.spec.name}/{target}/{protocol.value}"
        if service.spec.prefer is Prefer.LOCAL_ONLY:
            local = [Frontend(Scope.NODE, None, protocol, port) for port in ports]
            found += _forwarding(service.spec, key, vip, _backends(tasks, target))
            found += _forwarding(service.spec, f"{key}/local", local, _backends(chosen, target))
        else:
            ingress = [Frontend(Scope.INGRESS, None, protocol, port) for port in ports]
            found += _forwarding(service.spec, key, vip + ingress, _backends(chosen, target))
    return tuple(found)


def _targets(spec: ServiceSpec) -> list[tuple[int, Protocol]]:
    """The distinct targets of a spec; several published ports to one target share a pool."""
    pairs = {(port.target, port.protocol) for port in spec.ports}
    return sorted(pairs, key=lambda pair: (pair[0], pair[1].value))


def _published(service: ServiceView, target: int, protocol: Protocol) -> set[int]:
    """The allocated ingress ports that lead to `target`."""
    return {
        given.published
        for given in service.ingress
        if given.protocol is protocol and _target_of(service.spec, given) == target
    }


def _target_of(spec: ServiceSpec, given: IngressPort) -> int | None:
    """Where an allocated port leads; None if the spec no longer asks for it.

    The spec's target wins over the allocation's, so that a changed target takes effect with the
    spec and the port never stops answering in between.
    """
    dynamic = None
    for port in spec.ports:
        if port.mode is not PublishMode.INGRESS or port.protocol is not given.protocol:
            continue
        if port.published == given.published:
            return port.target
        if port.published is None and port.target == given.target:
            dynamic = port.target
    return dynamic


def _backends(tasks: Iterable[Task], target: int) -> tuple[Backend, ...]:
    return tuple(
        sorted(
            Backend(address, target, task.weight)
            for task in tasks
            for address in one_per_family(task.addresses)
        )
    )


def _forwarding(
    spec: ServiceSpec, key: str, frontends: list[Frontend], backends: tuple[Backend, ...]
) -> list[Forwarding]:
    """The forwarding, unless nothing would ever reach it."""
    if not frontends:
        return []
    return [
        Forwarding(
            key=key,
            frontends=tuple(frontends),
            backends=backends,
            affinity=spec.affinity,
            source=spec.source,
            allow=spec.allow,
        )
    ]

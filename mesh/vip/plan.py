"""What a service's VIP and ingress ports mean on a node, as forwardings.

Pure, and deterministic: the same set of tasks gives the same forwardings in whatever order.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from mesh.model.address import one_per_family
from mesh.model.publish import PublishMode
from mesh.model.service import Prefer
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.vip import eligibility

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mesh.model.publish import Protocol
    from mesh.model.service import ServiceSpec
    from mesh.model.task import Task
    from mesh.model.view import NodeView, ServiceView


def plan(service: ServiceView, node: NodeView) -> tuple[Forwarding, ...]:
    """One forwarding per target port and protocol, and a second one where the published port is
    local-only.

    The VIP answers on the target port of every published port, whatever its mode.
    """
    tasks = eligibility.eligible(service, node)
    chosen = eligibility.preferred(tasks, service.spec.prefer, node)
    published = _published(service)
    vips = sorted(service.vips)
    found: list[Forwarding] = []
    for target, protocol in _targets(service.spec):
        vip = [Frontend(Scope.VIP, address, protocol, target) for address in vips]
        ports = sorted(published.get((target, protocol), ()))
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
    if len(pairs) == 1:
        return list(pairs)
    return sorted(pairs, key=lambda pair: (pair[0], pair[1].value))


def _published(service: ServiceView) -> Mapping[tuple[int, Protocol], set[int]]:
    """The allocated ingress ports that lead to each target.

    The spec's target wins over the allocation's, so that a changed target takes effect with the
    spec and the port never stops answering in between.
    """
    asked = [port for port in service.spec.ports if port.mode is PublishMode.INGRESS]
    named = {(port.published, port.protocol): port.target for port in asked if port.published}
    dynamic = {(port.target, port.protocol) for port in asked if port.published is None}
    found: defaultdict[tuple[int, Protocol], set[int]] = defaultdict(set)
    for given in service.ingress:
        target = named.get((given.published, given.protocol))
        if target is None and (given.target, given.protocol) in dynamic:
            target = given.target
        if target is not None:
            found[target, given.protocol].add(given.published)
    return found


def _backends(tasks: Iterable[Task], target: int) -> tuple[Backend, ...]:
    backends = [
        Backend(address, target, task.weight)
        for task in tasks
        for address in one_per_family(task.addresses)
    ]
    return tuple(sorted(backends))


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

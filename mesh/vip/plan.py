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

    _Target = tuple[int, Protocol]


def plan(service: ServiceView, node: NodeView) -> tuple[Forwarding, ...]:
    """One forwarding per target port and protocol, and a second one where the published port is
    local-only.

    The VIP answers on the target port of every published port, whatever its mode.
    """
    tasks = eligibility.reachable(service.eligible(node.live), node)
    chosen = eligibility.preferred(tasks, service.spec, node)
    vips = sorted(service.vips)
    found: list[Forwarding] = []
    for (target, protocol), ports in _targets(service):
        vip = [Frontend(Scope.VIP, address, protocol, target) for address in vips]
        key = f"{service.spec.name}/{target}/{protocol.value}"
        if service.spec.prefer is Prefer.LOCAL_ONLY:
            local = [Frontend(Scope.NODE, None, protocol, port) for port in ports]
            found += _forwarding(service.spec, key, vip, _backends(tasks, target))
            found += _forwarding(service.spec, f"{key}/local", local, _backends(chosen, target))
        else:
            scope = Scope.NODE if service.spec.publish_on else Scope.INGRESS
            ingress = [Frontend(scope, None, protocol, port) for port in ports]
            found += _forwarding(service.spec, key, vip + ingress, _backends(chosen, target))
    return tuple(found)


def _targets(service: ServiceView) -> list[tuple[_Target, list[int]]]:
    """The distinct targets of a spec, each with the allocated ingress ports that lead there;
    several published ports to one target share a pool.

    The spec's target wins over the allocation's, so that a changed target takes effect with the
    spec and the port never stops answering in between.
    """
    found: dict[_Target, list[int]] = {}
    named: dict[tuple[int, Protocol], int] = {}
    dynamic: set[_Target] = set()
    for port in service.spec.ports:
        found[port.target, port.protocol] = []
        if port.mode is PublishMode.INGRESS:
            if port.published:
                named[port.published, port.protocol] = port.target
            else:
                dynamic.add((port.target, port.protocol))
    for protocol, published, given in sorted(service.ingress, key=_number):
        target = named.get((published, protocol))
        if target is None and (given, protocol) in dynamic:
            target = given
        if target is not None:
            found[target, protocol].append(published)
    return sorted(found.items(), key=_order) if len(found) > 1 else list(found.items())


def _number(port: IngressPort) -> int:
    return port.published


def _order(target: tuple[_Target, list[int]]) -> tuple[int, str]:
    (number, protocol), _ = target
    return number, protocol.value


def _backends(tasks: Iterable[Task], target: int) -> tuple[Backend, ...]:
    backends = [
        Backend(address, target, task.weight)
        for task in tasks
        for address in one_per_family(task.addresses)
    ]
    backends.sort()
    return tuple(backends)


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
            prefix=spec.affine_prefix,
            source=spec.source,
            allow=spec.allow,
            limit=spec.limit,
        )
    ]

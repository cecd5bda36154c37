"""What the host-mode ports granted to tasks of this node mean, as forwardings.

Pure.  A port leads to the one task that holds it and nowhere else.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from mesh.model.address import one_per_family
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.model.publish import Protocol
    from mesh.model.view import HostClaim, NodeView, ServiceView


def plan(service: ServiceView, node: NodeView) -> tuple[Forwarding, ...]:
    """One forwarding per task, target port and protocol of the granted claims.

    A task that accepts no new connections has them refused.  One that only its node keeps from them
    (maintenance) goes on: nobody else can answer there.
    """
    if not service.host_ports:
        return ()
    tasks = {task.id: task for task in service.tasks if task.node == node.name}
    eligible = {task.id for task in service.accepting(node.live)}
    return tuple(
        _leading(tasks[task].addresses if task in eligible else (), claims)._replace(
            allow=service.spec.allow, limit=service.spec.limit
        )
        for task, claims in _pools(claim for claim in service.host_ports if claim.task in tasks)
    )


def lead(addresses: tuple[str, ...], claims: Iterable[HostClaim]) -> tuple[Forwarding, ...]:
    """The same of one container at `addresses` to which all of these ports lead."""
    return tuple(_leading(addresses, each) for _, each in _pools(claims))


def _pools(claims: Iterable[HostClaim]) -> list[tuple[str, list[HostClaim]]]:
    """Those that share a pool, together, with their task."""
    pools: defaultdict[tuple[str, int, Protocol], list[HostClaim]] = defaultdict(list)
    for claim in claims:
        pools[claim.task, claim.target, claim.protocol].append(claim)
    return [(task, each) for (task, _, _), each in sorted(pools.items(), key=_order)]


def _order(pool: tuple[tuple[str, int, Protocol], list[HostClaim]]) -> tuple[str, int, str]:
    (task, target, protocol), _ = pool
    return task, target, protocol.value


def _leading(addresses: tuple[str, ...], claims: list[HostClaim]) -> Forwarding:
    first = claims[0]
    return Forwarding(
        key=f"{first.service}/{first.target}/{first.protocol.value}/host/{first.task}",
        frontends=tuple(sorted(map(_frontend, claims), key=lambda f: (f.port, f.address or ""))),
        backends=tuple(Backend(a, first.target) for a in one_per_family(addresses)),
    )


def _frontend(claim: HostClaim) -> Frontend:
    scope = Scope.NODE if claim.address is None else Scope.HOST_IP
    return Frontend(scope, claim.address, claim.protocol, claim.published)

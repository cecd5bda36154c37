"""What the host-mode ports granted to tasks of this node mean, as forwardings.

Pure.  A port leads to the one task that holds it and nowhere else.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from mesh.model.address import one_per_family
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope

if TYPE_CHECKING:
    from mesh.model.publish import Protocol
    from mesh.model.service import ServiceSpec
    from mesh.model.task import Task
    from mesh.model.view import HostClaim, NodeView, ServiceView


def plan(service: ServiceView, node: NodeView) -> tuple[Forwarding, ...]:
    """One forwarding per task, target port and protocol of the granted claims.

    A task that accepts no new connections has them refused.
    """
    if not service.host_ports:
        return ()
    tasks = {task.id: task for task in service.tasks if task.node == node.name}
    eligible = {task.id for task in service.eligible(node.live)}
    pools: defaultdict[tuple[str, int, Protocol], list[HostClaim]] = defaultdict(list)
    for claim in service.host_ports:
        if claim.task in tasks:
            pools[claim.task, claim.target, claim.protocol].append(claim)
    return tuple(
        _forwarding(service.spec, tasks[task], claims, serves=task in eligible)
        for (task, _, _), claims in sorted(pools.items(), key=_order)
    )


def _order(pool: tuple[tuple[str, int, Protocol], list[HostClaim]]) -> tuple[str, int, str]:
    (task, target, protocol), _ = pool
    return task, target, protocol.value


def _forwarding(
    spec: ServiceSpec, task: Task, claims: list[HostClaim], *, serves: bool
) -> Forwarding:
    first = claims[0]
    backends = tuple(Backend(a, first.target) for a in one_per_family(task.addresses))
    key = f"{spec.name}/{first.target}/{first.protocol.value}/host/{task.id}"
    return Forwarding(
        key=key,
        frontends=tuple(sorted(map(_frontend, claims), key=lambda f: (f.port, f.address or ""))),
        backends=backends if serves else (),
        allow=spec.allow,
    )


def _frontend(claim: HostClaim) -> Frontend:
    scope = Scope.NODE if claim.address is None else Scope.HOST_IP
    return Frontend(scope, claim.address, claim.protocol, claim.published)

"""Which of a service's eligible tasks a node balances over.

Pure: same state, same answer, in the order of the tasks given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from mesh.model.service import Prefer

if TYPE_CHECKING:
    from mesh.model.service import ServiceSpec
    from mesh.model.task import Task
    from mesh.model.view import NodeView, ServiceView


def reachable(tasks: tuple[Task, ...], node: NodeView) -> tuple[Task, ...]:
    """Those of the eligible `tasks` that `node` reaches; all, if it reaches none: a try costs
    nothing where there is no other way.
    """
    if not node.unreachable:
        return tasks
    return tuple([task for task in tasks if task.node not in node.unreachable]) or tasks


def preferred(tasks: tuple[Task, ...], spec: ServiceSpec, node: NodeView) -> tuple[Task, ...]:
    """Those of the eligible `tasks` that `node` balances over."""
    match spec.prefer:
        case Prefer.ANY:
            return tasks
        case Prefer.LOCAL:
            return _local(tasks, node) or tasks
        case Prefer.LOCAL_ONLY:
            return _local(tasks, node)
        case Prefer.ZONE:
            return _of_zone(tasks, spec.zone_key, node) or tasks
        case _:
            assert_never(spec.prefer)


def local(service: ServiceView, node: NodeView) -> tuple[Task, ...]:
    """The replicas on `node` itself that may be given new connections."""
    return _local(service.eligible(node.live), node)


def told(service: ServiceView, node: NodeView) -> str:
    """The preference and what it comes to on `node`, for people; "" if there is none."""
    spec = service.spec
    if spec.prefer is Prefer.ANY:
        return ""
    tasks = reachable(service.eligible(node.live), node)
    chosen, of = preferred(tasks, spec, node), f"of {len(tasks)} replicas"
    if spec.prefer is Prefer.LOCAL_ONLY:
        return f"prefer local-only: published ports have {len(chosen)} {of}, those here"
    where = "here"
    if spec.prefer is Prefer.ZONE:
        zone = node.label(node.name, spec.zone_key)
        if zone is None:
            return f"prefer zone: node {node.name} has no label {spec.zone_key!r}, so all {of[3:]}"
        where = f"in zone {zone!r}"
        near = _of_zone(tasks, spec.zone_key, node)
    else:
        near = _local(tasks, node)
    if not near:
        return f"prefer {spec.prefer.value}: none {of} is {where}, so all of them"
    return f"prefer {spec.prefer.value}: {len(near)} {of}, those {where}"


def _local(tasks: tuple[Task, ...], node: NodeView) -> tuple[Task, ...]:
    return tuple([task for task in tasks if task.node == node.name])


def _of_zone(tasks: tuple[Task, ...], label: str, node: NodeView) -> tuple[Task, ...]:
    """Those on nodes with the same label; none if the node itself has no such label."""
    zone = node.label(node.name, label)
    if zone is None:
        return ()
    return tuple([task for task in tasks if node.label(task.node, label) == zone])

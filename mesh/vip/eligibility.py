"""Which of a service's eligible tasks a node balances over.

Pure: same state, same answer, in the order of the tasks given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.model.service import Prefer

if TYPE_CHECKING:
    from mesh.model.task import Task
    from mesh.model.view import NodeView


def preferred(tasks: tuple[Task, ...], prefer: Prefer, node: NodeView) -> tuple[Task, ...]:
    """Those of the eligible `tasks` that `node` balances over."""
    if prefer is Prefer.ANY:
        return tasks
    local = tuple(task for task in tasks if task.node == node.name)
    return local if local or prefer is Prefer.LOCAL_ONLY else tasks

"""Why nodes do not get on, for a test that fails: what they report, and what they said last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mesh.lab import control, wire

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.support.gateway import Records

_LINES: Final = 20


async def told(lab: str, records: Records, nodes: Iterable[str], revision: int) -> str:
    """The reports and last words of nodes that did not apply a revision in time."""
    parts = [f"revision {revision} is not applied:"]
    for node in nodes:
        log = await control.call(lab, wire.Logs(name=node))
        parts += [f"{node}: {records.get(f'applied/{node}')}", *log.splitlines()[-_LINES:]]
    return "\n".join(parts)

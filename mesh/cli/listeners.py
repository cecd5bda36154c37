"""What processes of living nodes listen on, as their agents tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.errors import InvalidRecord
from mesh.model.listener import Listening
from mesh.store import schema

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.cli.options import Session
    from mesh.model.listener import Listener, Port

Occupied = dict["Port", tuple[str, "Listener"]]
"""A node and who has the port there; the first of several nodes."""


async def read(session: Session) -> Occupied:
    """Who has which port.  A record that cannot be read says nothing here; `mesh status` tells."""
    nodes, living = session.keys.under("listeners"), session.keys.under("alive")
    items = {item.key: item.value for item in (await session.store.list(nodes, living)).items}
    found: dict[str, Listening] = {}
    for key in sorted(items):
        name = key.removeprefix(nodes)
        if key.startswith(nodes) and f"{living}{name}" in items:
            try:
                found[name] = schema.decode(key, items[key], Listening)
            except InvalidRecord:
                continue
    return by_port(found)


def by_port(nodes: Mapping[str, Listening]) -> Occupied:
    """The same, of records by node."""
    found: Occupied = {}
    for name, record in nodes.items():
        for one in record.listeners:
            if one.meets(None):
                found.setdefault((one.protocol, one.port), (name, one))
    return found

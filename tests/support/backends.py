"""A node of a lab whose agent comes back with another rule backend."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from mesh.agent import config
from mesh.model.publish import Protocol
from tests.support.cluster import until

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.support.cluster import Cluster
    from tests.support.requests import Ask


@dataclass
class World:
    """A lab, and what drives the rules of the node that changes."""

    mesh: Cluster
    node: str
    backend: str

    async def become(self, backend: str) -> None:
        """Have the agent come back with another backend."""
        path = Path(self.mesh.node(self.node).config)
        _write(path, config.dump(replace(config.load(path), backend=backend)))
        self.backend = backend
        await self.restart(signal.SIGTERM)

    async def restart(self, number: int) -> None:
        """End the agent by a signal, and start it again."""
        await self.mesh.signal(self.node, number)
        await until(lambda: not self.mesh.agent_runs(self.node))
        await self.mesh.start_again(self.node)

    def lasting(self, asks: Iterable[Ask]) -> list[Ask]:
        """Those whose flows stay where they are while the agent is away.

        Other nodes may take the node for dead meanwhile, and then move their UDP flows.
        """
        inside = {one.netns for one in self.mesh.containers.values() if one.node == self.node}
        inside.add(self.mesh.netns(self.node))
        here = self.mesh.addresses(self.node)
        return [
            one
            for one in asks
            if one.protocol is Protocol.TCP or one.address in here or one.netns in inside
        ]


def _write(path: Path, text: str) -> None:
    path.write_text(text)

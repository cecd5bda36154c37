"""How long labs wait until they take a node for dead: on a crowded machine, longer."""

from __future__ import annotations

from typing import Final

from mesh.agent.config import ReachConfig

UNMISSED: Final = {"livenessTtl": 120}
"""Settings of a cluster whose nodes may be without an agent: on a crowded machine one takes long to
start, and others would take the node for dead and move UDP flows.  Its leader is not missed, too.
"""

PATIENT: Final = ReachConfig(fall=24)
"""Six seconds: WireGuard is a process like any other here, and may be late by more than one."""

QUICK: Final = ReachConfig()
"""What nodes have by default."""

"""The environment of what runs in a lab: this very package, the system's tools, no other cluster.

Pure: an environment in, another one out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import mesh

if TYPE_CHECKING:
    from collections.abc import Mapping

HOME: Final = Path("/run/lab")
"""The lab's own directory; a machine sees its part of it, its disk, at the same place."""

CONFIG: Final = HOME / "agent.toml"
"""Where a node finds its agent's configuration, on its disk."""

SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""A user's PATH often lacks the directories of nft and ip."""


def with_this_package(given: Mapping[str, str]) -> dict[str, str]:
    """`given`, with `python -m mesh` being this very package, wherever it is started."""
    root = str(Path(mesh.__path__[0]).parent)
    return {**given, "PYTHONPATH": f"{root}:{given.get('PYTHONPATH', '')}".rstrip(":")}


def inside(given: Mapping[str, str]) -> dict[str, str]:
    """`given` for a program on a machine of the lab.

    On nodes the command line finds the node's configuration, which says how to reach etcd.
    """
    kept = {name: value for name, value in given.items() if not name.startswith("MESH_ETCD")}
    path = f"{given.get('PATH', '')}:{SYSTEM_PATH}".lstrip(":")
    return with_this_package(kept) | {"PATH": path, "MESH_CONFIG": str(CONFIG)}


def last_line(log: str) -> str:
    """What a program said last."""
    return (log.rstrip().splitlines() or ["it said nothing"])[-1]

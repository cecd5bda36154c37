"""The command line on a node of a lab, as its operator runs it there."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

from mesh.lab import environment
from tests.support.cluster import LIMIT

if TYPE_CHECKING:
    from tests.support.cluster import Cluster

_MESH: Final = (sys.executable, "-m", "mesh", "--config", str(environment.CONFIG))


def on_node(mesh: Cluster, node: str, *args: str) -> str:
    """What a verb printed on a node, which must succeed."""
    pid = mesh.node(node).agent_pid
    enter = ("nsenter", f"--target={pid}", "--net", "--mount", "--pid", "--")
    done = subprocess.run(
        (*enter, *_MESH, *args), capture_output=True, text=True, check=False, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


def document(mesh: Cluster, node: str, *args: str) -> Any:
    """The document that a verb printed."""
    return json.loads(on_node(mesh, node, *args, "--json"))

"""What becomes of a node's rules while something happens, as `nft monitor` tells it."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.cluster import Cluster

_END: Final = "end-of-watch"


@contextmanager
def watched(mesh: Cluster, node: str) -> Iterator[list[str]]:
    """The lines of nft during a block, complete after it."""
    lines: list[str] = []
    argv = ("nsenter", f"--net={mesh.netns(node)}", "--", "nft", "monitor")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as monitor:
        try:
            yield lines
        finally:
            mesh.sh(node, "nft", "add", "table", "inet", _END)
            mesh.sh(node, "nft", "delete", "table", "inet", _END)
            assert monitor.stdout is not None
            for line in monitor.stdout:
                if _END in line:
                    break
                lines.append(line.strip())
            monitor.kill()

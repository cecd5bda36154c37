"""What becomes of a node's rules while a test does something, as nft tells it."""

from __future__ import annotations

import select
import subprocess
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.support.cluster import Cluster

_BEGINS: Final = "watch-begins"
_ENDS: Final = "watch-ends"


@contextmanager
def watched(mesh: Cluster, node: str) -> Iterator[list[str]]:
    """nft's lines about a block, complete after it."""
    lines: list[str] = []
    argv = ("nsenter", f"--net={mesh.netns(node)}", "--", "nft", "monitor")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as monitor:
        told = monitor.stdout
        assert told is not None
        _mark(mesh, node, _BEGINS)
        while not select.select([told], [], [], 0.5)[0]:  # it did not listen yet
            _mark(mesh, node, _BEGINS)
        try:
            yield lines
        finally:
            _mark(mesh, node, _ENDS)
            seen = takewhile(lambda line: _ENDS not in line, told)
            lines += [line.strip() for line in seen if _BEGINS not in line]
            monitor.kill()


def _mark(mesh: Cluster, node: str, name: str) -> None:
    """Do something that is seen."""
    mesh.sh(node, "nft", "add", "table", "inet", name)
    mesh.sh(node, "nft", "delete", "table", "inet", name)


def generations(lines: Iterable[str], word: str) -> list[int]:
    """How many elements of sets whose names begin so came or went with each generation of the
    ruleset, where any did.
    """
    counts = [0]
    for line in lines:
        if line.startswith("# new generation"):
            counts.append(0)
        elif f" element inet mesh {word}" in line:
            counts[-1] += line.count(" : ")
    return [count for count in counts if count]

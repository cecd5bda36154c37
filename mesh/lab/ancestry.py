"""The processes above `mesh lab up`, whose violent end must end the lab.

Owns the walk up the process tree.  Never watches process 1: it outlives everything, or takes
everything with it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec


class Watched(msgspec.Struct, frozen=True, kw_only=True):
    """A process the guard watches; `any_end`: also a plain exit of it ends the lab."""

    pid: int
    descriptor: int
    any_end: bool
    direct: bool


def above(*, any_end_of_caller: bool) -> list[Watched]:
    """The caller's parent, its parent, and so on, each held by a pidfd the caller must close."""
    found: list[Watched] = []
    pid = os.getppid()
    limit = _DEEPEST if _shows_this_process() else 1
    while pid > 1 and len(found) < limit:
        try:
            descriptor = os.pidfd_open(pid)
            parent = _parent(pid)
        except (ProcessLookupError, FileNotFoundError):
            break  # it ended just now; who inherited us is not above us by anyone's will
        direct = not found
        found.append(
            Watched(
                pid=pid,
                descriptor=descriptor,
                any_end=direct and any_end_of_caller,
                direct=direct,
            )
        )
        pid = parent
    return found


_DEEPEST: Final = 100
"""More processes than this are not above a terminal or a test."""


def _shows_this_process() -> bool:
    """Whether /proc belongs to this PID namespace, so that its numbers mean the same."""
    return os.readlink("/proc/self") == str(os.getpid())


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

"""Runs a benchmark in namespaces of its own, so that it cannot touch this machine's rules."""

from __future__ import annotations

import os
import sys
from typing import Final

_MARK: Final = "MESH_BENCH_NAMESPACES"


def isolate() -> None:
    """Start this very command again in new namespaces, unless it runs in them already.

    With `unshare` (util-linux); without root in a user namespace.  The kernel ends everything
    within when the command ends, also when it is killed.
    """
    if os.environ.get(_MARK) == "1":
        return
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    kinds = ["--net", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
    os.environ[_MARK] = "1"
    os.execvp("unshare", ["unshare", *user, *kinds, "--", *sys.orig_argv])

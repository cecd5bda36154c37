"""All tests run in namespaces of their own: nothing they do can reach this machine's network.

Without root the same is done inside a user namespace.  The process tree lives in its own PID
namespace, so nothing survives the run, even when it is killed.
"""

from __future__ import annotations

import os
import sys

_MARK = "MESH_TEST_NAMESPACES"
_SETUP = (
    "mount --make-rprivate / && mount -t tmpfs tmpfs /run && mkdir -p /run/lock /run/netns && "
    "mount -t proc proc /proc && ip link set lo up && "
    'exec "$@"'
)


def _isolate() -> None:
    if os.environ.get(_MARK) == "1":
        return
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    os.environ[_MARK] = "1"
    os.execvp(
        "unshare",
        [
            "unshare", *user, "--net", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--",
            "sh", "-c", _SETUP, "sh", *sys.orig_argv,
        ],
    )  # fmt: skip


_isolate()

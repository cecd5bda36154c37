"""All tests run in namespaces of their own: nothing they do can reach this machine's network.

Without root the same is done inside a user namespace.  The process tree lives in its own PID
namespace, so nothing survives the run, even when it is killed.
"""

from __future__ import annotations

import os
import signal
import sys

import pytest
from hypothesis import settings

settings.register_profile("mesh", deadline=None)  # this machine may be busy with others
settings.load_profile("mesh")

_MARK = "MESH_TEST_NAMESPACES"
_SETUP = (
    "mount --make-rprivate / && mount -t tmpfs tmpfs /run && mkdir -p /run/lock /run/netns && "
    "mount -t proc proc /proc && ip link set lo up && "
    'exec "$@"'
)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get(_MARK) == "1" or config.option.collectonly:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's way of ignoring it is inherited
        return
    os.environ[_MARK] = "1"
    capture = config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    capture.stop_global_capturing()  # else what runs next would print into the capture file
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    os.execvp(
        "unshare",
        [
            "unshare", *user, "--net", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--",
            "sh", "-c", _SETUP, "sh", *sys.orig_argv,
        ],
    )  # fmt: skip

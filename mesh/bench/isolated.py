"""Runs a measurement in namespaces of its own, so that it cannot touch this machine's rules.

The measuring program is this process's child.  The kernel ends it, and all that it made, when this
process ends, also when it is killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

from mesh.bench.progress import tell
from mesh.errors import HostNotReady, MeshError
from mesh.lab import environment, kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SETUP: Final = (
    "mount -t tmpfs tmpfs /run && mkdir -p /run/lock /run/netns && mount -t proc proc /proc && "
    'ip link set lo up && exec "$@"'
)


def measure(module: str, arguments: Mapping[str, object]) -> Any:
    """What `python -m module` answers to `arguments`; it tells its progress on stderr.

    Without root in a user namespace.  Raises MeshError with what it could not do.
    """
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    kinds = ["--net", "--mount", "--pid", "--fork", "--kill-child=SIGKILL"]
    shell = ["sh", "-c", _SETUP, "sh"]
    python = [sys.executable, "-m", module, json.dumps(arguments)]
    try:
        done = subprocess.run(
            ["unshare", *user, *kinds, "--", *shell, *python],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=environment.inside(os.environ),
            preexec_fn=kernel.die_with_parent,
            check=False,
        )
    except FileNotFoundError:
        raise HostNotReady("unshare is not installed: apt install util-linux") from None
    if not done.stdout:
        raise MeshError(
            f"{module} ended with {done.returncode} before it had measured anything: see above"
        )
    answer = json.loads(done.stdout)
    if "failed" in answer:
        raise MeshError(answer["failed"])
    return answer["found"]


def answer(work: Callable[[Mapping[str, Any]], object]) -> None:
    """What such a module does: work on the arguments, print what was found or what went wrong.

    An interrupt is for its parent, which ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        answer = {"found": work(json.loads(sys.argv[1]))}
    except MeshError as error:
        answer = {"failed": str(error)}
    tell("")
    json.dump(answer, sys.stdout)

"""One who drives the rules of a network namespace, and one who writes to a state directory.

The kernel drops both holds with their process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import struct
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from mesh.errors import Conflict, HostNotReady

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NAME: Final = "\0warren-mesh/agent"
"""An abstract socket: there is one of a name in each network namespace, wherever files are."""

_CREDENTIALS: Final = struct.Struct("=iII")
_NOBODY: Final = -1

_PATIENCE_SECONDS: Final = 0.3
"""An agent holds its namespace for as long as it runs, another publisher for milliseconds."""

_AGAIN_SECONDS: Final = 0.005

log = logging.getLogger(__name__)


@contextmanager
def held(state_dir: Path) -> Iterator[None]:
    """What an agent, or its removal, holds.  Raises HostNotReady if another agent has it."""
    with _of_directory(state_dir), namespace():
        yield


@contextmanager
def _of_directory(state_dir: Path) -> Iterator[None]:
    descriptor = opened(state_dir, "agent.lock")
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HostNotReady(
                f"another agent runs with state_dir {state_dir}: stop it first"
            ) from None
        yield
    finally:
        os.close(descriptor)


def opened(state_dir: Path, name: str) -> int:
    """A descriptor of a file in a state directory, which is made.  Raises HostNotReady."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(state_dir / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostNotReady(
            f"state_dir {state_dir}: {error.strerror}; run as root or choose another state_dir"
        ) from None


@contextmanager
def namespace() -> Iterator[None]:
    """Hold the namespace of the calling thread.  Raises HostNotReady if an agent has it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as claim:
        try:
            claim.bind(_NAME)
            claim.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _blame(*_holder())
        yield


@contextmanager
def briefly() -> Iterator[None]:
    """Hold the namespace of the calling thread for one change.  Blocks for a moment; raises
    Conflict if an agent has it.
    """
    ends = time.monotonic() + _PATIENCE_SECONDS
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as claim:
        while True:
            try:
                claim.bind(_NAME)
                claim.listen()
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            process, user = _holder()
            if not _is_ours(user):
                log.warning("process %d of user %d pretends to be an agent here", process, user)
                break
            if time.monotonic() > ends:
                raise Conflict(
                    f"a mesh agent (process {process}) drives this network namespace: publish "
                    "through etcd (`mesh service create`), or stop it and take it off this host "
                    "with `mesh agent --cleanup`"
                )
            time.sleep(_AGAIN_SECONDS)
        yield


def _blame(process: int, user: int) -> None:
    """Anybody can take such a name: what is not root's, or our own, is no agent's."""
    if _is_ours(user):
        raise HostNotReady(
            f"another agent (process {process}) drives this network namespace: stop it first"
        )
    log.warning("process %d of user %d pretends to be an agent here: ignored", process, user)


def _is_ours(user: int) -> bool:
    return user in (0, os.geteuid())


def _holder() -> tuple[int, int]:
    """Process and user that have the name; nobody's, if it lets nobody ask."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # else whoever fills its queue makes us wait for ever
        try:
            probe.connect(_NAME)
        except BlockingIOError:
            return 0, _NOBODY
        except ConnectionRefusedError:  # it ends just now
            return 0, os.geteuid()
        found = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(found)
    return process, user

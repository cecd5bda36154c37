"""One agent per network namespace and per state directory: what an agent, or its removal, holds.

The kernel drops both with their process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from mesh.errors import HostNotReady

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NAME: Final = "\0warren-mesh/agent"
"""An abstract socket: there is one of a name in each network namespace, wherever files are."""

_CREDENTIALS: Final = struct.Struct("=iII")
_NOBODY: Final = -1

log = logging.getLogger(__name__)


@contextmanager
def held(state_dir: Path) -> Iterator[None]:
    """Hold both.  Raises HostNotReady if another agent has one of them."""
    with _of_directory(state_dir), _of_namespace():
        yield


@contextmanager
def _of_directory(state_dir: Path) -> Iterator[None]:
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(state_dir / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostNotReady(
            f"state_dir {state_dir}: {error.strerror}; run as root or choose another state_dir"
        ) from None
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


@contextmanager
def _of_namespace() -> Iterator[None]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as claim:
        try:
            claim.bind(_NAME)
            claim.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _blame(*_holder())
        yield


def _blame(process: int, user: int) -> None:
    """Anybody can take such a name: what is not root's, or our own, is no agent's."""
    if user in (0, os.geteuid()):
        raise HostNotReady(
            f"another agent (process {process}) drives this network namespace: stop it first"
        )
    log.warning("process %d of user %d pretends to be an agent here: ignored", process, user)


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

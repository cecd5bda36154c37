"""The first process of a container: namespaces of its own, the command in them, its end.

A program of its own, started by `process.py`: it forks, so it must have no threads, and imports
next to nothing, so it starts in 20 ms.  Everything here dies with the supervisor, by the kernel:
a PID namespace ends with its first process, so nothing that the command ever forked keeps the
network namespace or its addresses.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from typing import Final, NoReturn

from mesh.dataplane import netns

READY: Final = b"ready\n"
"""Said when the namespaces exist; the command starts at the answer, any one byte."""

_PR_SET_PDEATHSIG: Final = 1
_MS_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8
_MS_REC_SLAVE: Final = 16384 | 1 << 19

_FORWARDED: Final = frozenset({
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
})  # fmt: skip
_WATCHED: Final = _FORWARDED | {signal.SIGCHLD}

# Exit codes of a command that could not be started (POSIX shell, "Exit Status for Commands").
_CANNOT_RUN: Final = 126
_NOT_FOUND: Final = 127

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    """`init DESCRIPTOR COMMAND…`: the exit code is the command's, 128 + n if signal n ended it."""
    supervisor = socket.socket(fileno=int(sys.argv[1]))
    supervisor.set_inheritable(False)
    _die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    try:
        netns.unshare(netns.CLONE_NEWNET | netns.CLONE_NEWPID | netns.CLONE_NEWNS)
    except OSError as error:
        _fail(supervisor, _CANNOT_RUN, f"no namespaces for the container: {error.strerror}")
    first = os.fork()
    if first == 0:
        _first_process(supervisor, sys.argv[2:])
    supervisor.close()
    os._exit(_tend(first))


def _first_process(supervisor: socket.socket, command: list[str]) -> NoReturn:
    # If the parent died before this took effect, so did the supervisor, and it does not answer.
    _die_with_parent()
    _mount_own_proc()
    supervisor.sendall(READY)
    if not supervisor.recv(1):
        os._exit(_CANNOT_RUN)
    child = os.fork()
    if child == 0:
        _execute(supervisor, command)
    supervisor.close()
    os._exit(_tend(child))


def _execute(supervisor: socket.socket, command: list[str]) -> NoReturn:
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
    # Python ignores these two, and an ignored signal stays ignored in the program executed.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except (FileNotFoundError, NotADirectoryError):
        _fail(supervisor, _NOT_FOUND, f"{command[0]}: command not found")
    except OSError as error:
        _fail(supervisor, _CANNOT_RUN, f"{command[0]}: {error.strerror}")


def _fail(supervisor: socket.socket, code: int, reason: str) -> NoReturn:
    supervisor.sendall(f"{code} {reason}".encode())
    os._exit(code)


def _tend(child: int) -> int:
    """Pass signals on to `child` and reap every orphan until `child` ends; its exit code."""
    while True:
        received = signal.sigwait(_WATCHED)
        if received != signal.SIGCHLD:
            os.kill(child, received)
            continue
        ended, status = os.waitpid(-1, os.WNOHANG)
        while ended:
            if ended == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            ended, status = os.waitpid(-1, os.WNOHANG)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _mount_own_proc() -> None:
    """Let /proc show the container's processes; where the host forbids it, it shows the host's.

    Host mounts still appear in the container, never the other way round.
    """
    if _libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC_SLAVE), None) == 0:
        _libc.mount(b"proc", b"/proc", b"proc", ctypes.c_ulong(_MS_NOSUID_NODEV_NOEXEC), None)

"""A check's command: in the task's network namespace, with nothing of its starter's environment.

Owns the process group from its start to its end.  No shell, no descriptor but the three, and no
process left: not after the time-out, and not when this process is killed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Final

from mesh.dataplane import netns

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from mesh.health.target import Exec

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_MOST_SAID: Final = 4096
"""Bytes of its output that are kept, to be told; it may write as much as it likes."""

_MOST_TOLD: Final = 200

OWN_FAULTS: Final = frozenset({
    errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN,
})  # fmt: skip
"""Errors of system calls that say nothing about the task."""

_DIES_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL", "--")


async def run(target: Exec, timeout: float, executor: Executor) -> str:
    """Run it once, waited for in `executor`: why it failed, empty if it ended with 0.

    Raises OSError where this process has no descriptor, memory or process left for it.
    """
    if target.netns is None:
        return "the task's record names no netns, which type exec needs"
    stop = _Stop()
    running = executor.submit(_execute, target, timeout, stop.descriptor)
    running.add_done_callback(lambda _: stop.close())
    try:
        return await asyncio.wrap_future(running)
    except asyncio.CancelledError:
        stop.now()
        raise


class _Stop:
    """Tells a thread that waits for a command to wait no longer."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._is_open = True

    def now(self) -> None:
        with self._lock:
            if self._is_open:
                os.eventfd_write(self.descriptor, 1)

    def close(self) -> None:
        with self._lock:
            self._is_open = False
            os.close(self.descriptor)


def _execute(target: Exec, timeout: float, stop: int) -> str:
    assert target.netns is not None
    environment = {"PATH": PATH, "LANG": "C.UTF-8", **dict(target.environment)}
    try:
        # Only this thread goes there; a child is born where its parent is.
        with netns.entered(target.netns):
            process = subprocess.Popen(
                (*_DIES_WITH_US, *target.command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd="/",
                start_new_session=True,
            )
    except OSError as error:
        if error.errno in OWN_FAULTS:
            raise
        where = error.filename or target.netns
        return f"cannot start: {where}: {error.strerror}"
    try:
        said, ended = _attend(process, time.monotonic() + timeout, stop)
    finally:
        _kill(process)
    if not ended:
        return f"no end within {timeout:g} s"
    return _told(process.returncode, said)


def _attend(process: subprocess.Popen[bytes], due: float, stop: int) -> tuple[bytes, bool]:
    """What it says until it ends or its time does; and whether it ended."""
    assert process.stdout is not None
    said, pipe = b"", process.stdout.fileno()
    ended = os.pidfd_open(process.pid)
    waiting = select.poll()
    for descriptor in (ended, pipe, stop):
        waiting.register(descriptor, select.POLLIN)
    try:
        while (left := due - time.monotonic()) > 0:
            ready = {descriptor for descriptor, _ in waiting.poll(left * 1000)}
            if stop in ready:
                return said, False
            if pipe in ready:
                more = os.read(pipe, _MOST_SAID)
                said = (said + more)[:_MOST_SAID]
                if not more:
                    waiting.unregister(pipe)
            elif ended in ready:
                return said, True
        return said, False
    finally:
        os.close(ended)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of its group; before it is buried, so that its number is its own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _told(status: int, said: bytes) -> str:
    if status == 0:
        return ""
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    lines = said.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{how}: {last[:_MOST_TOLD]}" if last else how

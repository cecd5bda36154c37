"""The process a lab lives by: its death, by whatever means, is the lab's.

Stays in the host's namespaces, starts the lab's first process in new ones, lets in whom the
socket may serve, and ends the lab when a process it watches was killed.  Never touches the
network, and knows nothing of what runs inside.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import struct
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import msgspec

from mesh.dataplane import netns
from mesh.lab import kernel
from mesh.lab.kernel import Ending
from mesh.lab.wire import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.lab.ancestry import Watched

RETRY_SECONDS: Final = 0.5
"""How often a process is asked about whose end its parent has not acknowledged."""

_CREDENTIALS: Final = struct.Struct("3i")
"""struct ucred: pid, uid, gid (unix(7))."""


def main() -> NoReturn:
    """`guard PLAN`: returns, as an exit, when nothing of the lab is left."""
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    door = socket.socket(fileno=plan.control)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    nurse = _bear(plan, theirs)
    theirs.close()
    os.close(plan.relay)
    door.listen()
    _Guard(plan, door, ours).watch(os.pidfd_open(nurse))
    # Closing the channel ends the lab's first process; the nurse ends when the kernel has
    # killed and buried all that were below it.
    ours.close()
    os.waitpid(nurse, 0)
    sys.exit(0)


class _Guard:
    """Waits for the first reason to end the lab."""

    def __init__(self, plan: Plan, door: socket.socket, channel: socket.socket) -> None:
        self._plan = plan
        self._door = door
        self._channel = channel
        self._selector = selectors.DefaultSelector()
        self._undecided: list[Watched] = []
        self._over = False

    def watch(self, nurse: int) -> None:
        """Return when the lab is to end, or has."""
        self._on(nurse, self._end)
        self._on(self._door.fileno(), self._let_in)
        self._on(self._plan.lifeline, self._released)
        for watched in self._plan.watched:
            self._on(watched.descriptor, partial(self._judge, watched))
        while not self._over:
            for key, _ in self._selector.select(RETRY_SECONDS if self._undecided else None):
                key.data()
            undecided, self._undecided = self._undecided, []
            for watched in undecided:
                self._judge(watched)

    def _on(self, descriptor: int, act: Callable[[], None]) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, act)

    def _end(self) -> None:
        self._over = True

    def _released(self) -> None:
        """The client is done with the lab and leaves it running, or it is gone."""
        if os.read(self._plan.lifeline, 1):
            self._selector.unregister(self._plan.lifeline)
        else:
            self._end()

    def _let_in(self) -> None:
        visitor, _ = self._door.accept()
        with visitor:
            raw = visitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            if _CREDENTIALS.unpack(raw)[1] in (0, os.getuid()):
                socket.send_fds(self._channel, [b"."], [visitor.fileno()])

    def _judge(self, watched: Watched) -> None:
        """A watched process ended, or did so before and is asked about again."""
        if watched.descriptor in self._selector.get_map():
            self._selector.unregister(watched.descriptor)
        match kernel.ending(watched.descriptor, watched.pid):
            case Ending.KILLED:
                self._end()
            case Ending.EXITED:
                self._over = self._over or watched.any_end
            case Ending.HIDDEN:
                self._over = self._over or watched.direct
            case Ending.UNDECIDED:
                if watched.any_end:
                    self._end()
                self._undecided.append(watched)


def _bear(plan: Plan, channel: socket.socket) -> int:
    """Start the lab's first process; the number of its parent, which ends when it has ended."""
    guard = os.getpid()
    nurse = os.fork()
    if nurse:
        return nurse
    try:
        kernel.die_with_parent()
        if os.getppid() != guard:
            os._exit(1)
        if os.geteuid() != 0:
            _become_root()
        netns.unshare(netns.CLONE_NEWPID | netns.CLONE_NEWNS | netns.CLONE_NEWNET)
        first = os.fork()
        if first == 0:
            kernel.die_with_parent()
            _become_first(plan, channel, guard)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.waitpid(first, 0)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        sys.stderr.write(f"the kernel refuses namespaces to this user ({what})\n")
        sys.stderr.flush()
    os._exit(0)


def _become_root() -> None:
    """Enter a user namespace in which this user is root, and nobody else exists."""
    uid, gid = os.geteuid(), os.getegid()
    netns.unshare(netns.CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def _become_first(plan: Plan, channel: socket.socket, guard: int) -> NoReturn:
    for descriptor in (channel.fileno(), plan.relay):
        os.set_inheritable(descriptor, True)
    for descriptor in (plan.control, plan.lifeline, *(w.descriptor for w in plan.watched)):
        os.set_inheritable(descriptor, False)
    descriptors = (str(channel.fileno()), str(plan.relay))
    arguments = (plan.name, str(plan.nodes), plan.backend, *descriptors, str(guard))
    os.execv(sys.executable, (sys.executable, "-m", "mesh.lab.init", *arguments))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()

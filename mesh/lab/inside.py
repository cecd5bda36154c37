"""Running a command on a machine of a lab, for a user at the host: `mesh lab exec`.

The command has the caller's terminal, dies with this process, and with the machine.  Needs no
program but Python; a plain `nsenter --target PID --all` does much the same.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from mesh.dataplane import netns
from mesh.errors import HostNotReady
from mesh.lab import kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_KINDS: Final = netns.CLONE_NEWNET | netns.CLONE_NEWNS | netns.CLONE_NEWPID | kernel.CLONE_NEWUTS
_FORWARDED: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
_CALLER_GONE: Final = signal.SIGUSR2
_WATCHED: Final = _FORWARDED | {signal.SIGCHLD, _CALLER_GONE}

_CANNOT_ENTER: Final = 125
_CANNOT_RUN: Final = 126
_NOT_FOUND: Final = 127


def main() -> NoReturn:
    """`inside PID COMMAND…`: the exit code is the command's."""
    try:
        sys.exit(run(int(sys.argv[1]), sys.argv[2:], os.environ))
    except HostNotReady as error:
        sys.exit(f"mesh: {error}")


def run(pid: int, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """The exit code of a command in the namespaces of process `pid`; 128 + n after signal n.

    Must be called in a process without threads.  Raises HostNotReady if the process is gone.
    """
    try:
        machine = os.pidfd_open(pid)
    except ProcessLookupError:
        raise HostNotReady("the machine was powered off just now") from None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    caller = os.getpid()
    # A process in between buries the command even if this one is killed: an unburied process
    # keeps its PID namespace, and so the lab, from ending.
    between = os.fork()
    if between == 0:
        there = (machine, _KINDS | _user_namespace(pid))
        _stand_between(caller, there, lambda: _execute(command, environment, before))
    os.close(machine)
    code = _tend(between)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return code


def _stand_between(
    caller: int, there: tuple[int, int], execute: Callable[[], NoReturn]
) -> NoReturn:
    here = os.getcwd()
    try:
        netns.setns(*there)
    except OSError as error:
        _complain(f"cannot enter the machine: {error.strerror}: is the lab yours?", _CANNOT_ENTER)
    kernel.die_with_parent(_CALLER_GONE)
    child = os.fork()
    if child == 0:
        kernel.die_with_parent(signal.SIGKILL)
        os.chdir(here if os.path.isdir(here) else "/")
        execute()
    # The terminal's signals reach the command by themselves, and a kill of the caller's process
    # group must not reach this one.  In a group of the same session it would be the command's link
    # to the outside: with its end the kernel hangs up on a caller's group that has a stopped job.
    os.setsid()
    if os.getppid() != caller:
        os.kill(child, signal.SIGKILL)
    os._exit(_tend(child))


def _tend(child: int) -> int:
    """Pass signals on to `child` until it ends; its exit code."""
    while True:
        received = signal.sigwaitinfo(_WATCHED)
        if received.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
        elif received.si_signo == _CALLER_GONE:
            os.kill(child, signal.SIGKILL)
        elif received.si_code <= 0:  # sent by a process; the terminal sends to the child, too
            os.kill(child, received.si_signo)


def _user_namespace(pid: int) -> int:
    """The flag that enters the process's user namespace too, unless this process is in it."""
    theirs, ours = (Path(f"/proc/{one}/ns/user").stat().st_ino for one in (pid, "self"))
    return 0 if theirs == ours else netns.CLONE_NEWUSER


def _execute(
    command: Sequence[str], environment: Mapping[str, str], mask: set[int | signal.Signals]
) -> NoReturn:
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        os.execvpe(command[0], tuple(command), environment)
    except (FileNotFoundError, NotADirectoryError):
        _complain(f"{command[0]}: command not found", _NOT_FOUND)
    except OSError as error:
        _complain(f"{command[0]}: {error.strerror}", _CANNOT_RUN)


def _complain(text: str, code: int) -> NoReturn:
    sys.stderr.write(f"mesh: {text}\n")
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

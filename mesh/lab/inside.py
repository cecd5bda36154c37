"""Running a command on a machine of a lab, for a user at the host: `mesh lab exec`.

The command has the caller's terminal, dies with this process, and with the machine.  Needs no
program but Python; a plain `nsenter --target PID --all` does the same.
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
    from collections.abc import Mapping, Sequence

_KINDS: Final = netns.CLONE_NEWNET | netns.CLONE_NEWNS | netns.CLONE_NEWPID | kernel.CLONE_NEWUTS
_FORWARDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
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

    Must be called in a process without threads.  Raises HostNotReady if the kernel refuses.
    """
    here = os.getcwd()
    try:
        descriptor = os.pidfd_open(pid)
        netns.setns(descriptor, _KINDS | _user_namespace(pid))
        os.close(descriptor)
    except OSError as error:
        raise HostNotReady(
            f"cannot enter the machine: {error.strerror}: is the lab yours?"
        ) from None
    child = os.fork()
    if child == 0:
        kernel.die_with_parent()
        _execute(command, environment, here)
    for number in _FORWARDED:
        signal.signal(number, lambda received, _: os.kill(child, received))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


def _user_namespace(pid: int) -> int:
    """The flag that enters the process's user namespace too, unless this process is in it."""
    theirs, ours = (Path(f"/proc/{one}/ns/user").stat().st_ino for one in (pid, "self"))
    return 0 if theirs == ours else netns.CLONE_NEWUSER


def _execute(command: Sequence[str], environment: Mapping[str, str], here: str) -> NoReturn:
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.chdir(here if os.path.isdir(here) else "/")
    try:
        os.execvpe(command[0], tuple(command), environment)
    except (FileNotFoundError, NotADirectoryError):
        code, reason = _NOT_FOUND, "command not found"
    except OSError as error:
        code, reason = _CANNOT_RUN, error.strerror or "cannot be executed"
    sys.stderr.write(f"mesh: {command[0]}: {reason}\n")
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

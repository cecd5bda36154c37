"""Starting a program in given namespaces, by two forks, from a process without threads.

Knows both numbers of what it starts: in the lab's PID namespace and in the host's.  Never waits
for a program to end.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from mesh.errors import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_RESTORED: Final = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGCHLD)
"""Python ignores or catches these, and an ignored signal stays ignored in the program executed."""


@dataclass(frozen=True, slots=True)
class Program:
    """What to execute; `output` is a descriptor for both of its output streams."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    output: int
    directory: str = "/"
    reaps_orphans: bool = False
    """Start it with SIGCHLD ignored, so that the kernel buries the children it is given."""


class Started(NamedTuple):
    """A process by its number here, and by its number in the PID namespace of the host."""

    pid: int
    host_pid: int


def nothing() -> None:
    """For a program that stays in its parent's namespaces, or needs no preparation."""


def start(
    program: Program, host_proc: int, enter: Callable[[], None], prepare: Callable[[], None]
) -> Started:
    """Start `program` as an orphan, which the PID namespace's first process inherits.

    `enter` moves a forked process elsewhere; `prepare` runs in the process it forks there, which
    a new PID namespace has as its first.  `host_proc` is a descriptor of the host's /proc.
    Raises CommandFailed with what went wrong on the way to execve(2).
    """
    reader, writer = os.pipe()
    middle = os.fork()
    if middle == 0:
        _fork_there(program, host_proc, writer, (enter, prepare))
    os.close(writer)
    os.waitpid(middle, 0)
    with os.fdopen(reader) as said:
        words = dict(line.split(" ", 1) for line in said.read().splitlines())
    if "error" in words:
        raise CommandFailed(f"cannot start {program.argv[0]}: {words['error']}")
    return Started(int(words["pid"]), int(words["host"]))


def _fork_there(
    program: Program,
    host_proc: int,
    writer: int,
    steps: tuple[Callable[[], None], Callable[[], None]],
) -> NoReturn:
    enter, prepare = steps
    try:
        enter()
        pid = os.fork()
        if pid == 0:
            prepare()
            os.write(writer, f"host {os.readlink('self', dir_fd=host_proc)}\n".encode())
            _execute(program)
        os.write(writer, f"pid {pid}\n".encode())
    except OSError as error:
        _fail(writer, error)
    os._exit(0)


def _fail(writer: int, error: OSError) -> NoReturn:
    where = f" ({error.filename})" if error.filename else ""
    os.write(writer, f"error {error.strerror}{where}\n".encode())
    os._exit(127)


def _execute(program: Program) -> NoReturn:
    os.setsid()
    for number in _RESTORED:
        signal.signal(number, signal.SIG_DFL)
    if program.reaps_orphans:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    os.chdir(program.directory)
    nowhere = os.open("/dev/null", os.O_RDONLY)
    for target, source in enumerate((nowhere, program.output, program.output)):
        os.dup2(source, target)
    os.execvpe(program.argv[0], program.argv, program.environment)

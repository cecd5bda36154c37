"""Runs a program and returns what it printed; the one place that starts short-lived processes.

Never a shell, never secrets in arguments: input goes through descriptor 0.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from mesh.dataplane import observe
from mesh.errors import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_PACKAGES: Final = {
    "bridge": "iproute2",
    "ip": "iproute2",
    "ip6tables": "iptables",
    "modprobe": "kmod",
    "nft": "nftables",
    "sysctl": "procps",
    "wg": "wireguard-tools",
}
"""The Debian package of a program, by the first word of its name, where the two differ."""

_CONTEXT: Final = 2
_LINE: Final = re.compile(r"(?:/dev/stdin:|line )(\d+)")


async def run(
    *argv: str,
    input: str | None = None,
    timeout: float = 30.0,
    started: Callable[[int], None] = lambda _: None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run `argv` and return its standard output.  Raises CommandFailed.

    `input` is standard input, as a file in memory: `wg` opens /dev/stdin by name, which a pipe
    cannot always serve.  `timeout` is in seconds.  `started` is told the process id, in another
    thread.  The failing line of `input`, where the program names one, is attached to the error as
    a note.  A program with an `environment` of its own is somebody's script: it has a session of
    its own, too, and whatever it started ends with it at the time-out.
    """
    try:
        with _stdin(input) as stdin:
            done = await asyncio.to_thread(_run, argv, stdin, timeout, started, environment)
        output, errors = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if done.returncode:
            raise _failure(argv, done.returncode, errors or output, input)
    except CommandFailed:
        observe.tell(argv[0], failed=True)
        raise
    observe.tell(argv[0], failed=False)
    return output


def _run(
    argv: tuple[str, ...],
    stdin: int,
    timeout: float,
    started: Callable[[int], None],
    environment: Mapping[str, str] | None,
) -> subprocess.CompletedProcess[bytes]:
    """In a thread with subprocess, which uses vfork(2): asyncio on uvloop forks, and then gRPC's
    fork handlers crash some children before they execute anything.
    """
    try:
        pipe, script = subprocess.PIPE, environment is not None
        with subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=pipe,
            stderr=pipe,
            env=environment,
            start_new_session=script,
        ) as process:
            started(process.pid)
            try:
                output, errors = process.communicate(timeout=timeout)
            except BaseException:
                if script:
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                raise
    except FileNotFoundError:
        if "/" in argv[0]:
            raise CommandFailed(f"{argv[0]}: no such program") from None
        raise CommandFailed(
            f"{argv[0]} is not installed: apt install {_package(argv[0])}"
        ) from None
    except OSError as error:
        raise CommandFailed(f"{argv[0]} cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"{' '.join(argv)}: no end after {timeout:g} s, stopped") from None
    return subprocess.CompletedProcess(argv, process.returncode, output, errors)


def _package(program: str) -> str:
    if program == "wireguard-go":
        return program
    word = program.partition("-")[0]
    return _PACKAGES.get(word, word)


@contextmanager
def _stdin(text: str | None) -> Iterator[int]:
    """A nameless file with `text` in it, positioned at its start; without text the null device."""
    if text is None:
        yield subprocess.DEVNULL
        return
    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "w", closefd=False) as file:
            file.write(text)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _failure(argv: tuple[str, ...], status: int, said: str, text: str | None) -> CommandFailed:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reason = "; ".join(lines[:2]) if lines else f"exit status {status}, no message"
    error = CommandFailed(f"{' '.join(argv)}: {reason}")
    if text is not None and (match := _LINE.search(said)):
        error.add_note(_excerpt(text, int(match[1])))
    return error


def _excerpt(text: str, number: int) -> str:
    """The line `number` of `text`, marked, with its neighbours."""
    lines = text.splitlines()
    first = max(0, number - 1 - _CONTEXT)
    shown = enumerate(lines[first : number + _CONTEXT], first + 1)
    return "\n".join(f"{'>' if index == number else ' '} {index:4} {line}" for index, line in shown)

"""A command in namespaces of its own, from its birth to its end: the supervisor's side.

Owns the child process and the handshake with it (`init.py`).  Knows nothing of links, addresses
or etcd; never restarts anything.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import mesh
from mesh.containers import init
from mesh.errors import HostNotReady, MeshError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

START_SECONDS: Final = 20.0
"""A new namespace is ready in some 50 ms; a crowded machine may need seconds."""

_BOOT: Final = (
    "import sys; sys.path.insert(0, {root!r}); from mesh.containers import init; init.main()"
)


class CannotRun(MeshError):
    """The command does not exist (exit code 127) or cannot be executed (126)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.exit_code = code


class Process:
    """A command that waits in its namespaces until `begin`, and dies with this process."""

    def __init__(self, child: asyncio.subprocess.Process, channel: socket.socket) -> None:
        self._child = child
        self._channel = channel

    @classmethod
    async def prepare(cls, command: Sequence[str], environment: Mapping[str, str]) -> Process:
        """Make the namespaces.  `environment` adds to this process's own.

        Raises HostNotReady where the kernel refuses them.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _BOOT.format(root=_root())),
                *(str(theirs.fileno()), *command),
                pass_fds=(theirs.fileno(),),
                env={**os.environ, **environment},
                start_new_session=True,
            )
        ours.setblocking(False)
        process = cls(child, ours)
        try:
            said = await process._hear()
            if said != init.READY:
                raise HostNotReady(_split(said)[1])
        except BaseException:
            await process.stop(0)
            raise
        return process

    @property
    def pid(self) -> int:
        """The process whose death ends the container."""
        return self._child.pid

    @property
    def netns(self) -> str:
        """The path of the network namespace, valid until the process ends."""
        return f"/proc/{self._child.pid}/ns/net"

    async def begin(self) -> None:
        """Start the command.  Raises CannotRun if it is not there or not executable."""
        await asyncio.get_running_loop().sock_sendall(self._channel, b".")
        # The channel closes when the command takes the place of the program that held it.
        failure = await self._hear()
        self._channel.close()
        if failure:
            raise CannotRun(*_split(failure))

    async def wait(self) -> int:
        """The command's exit code when it has ended; 128 + n if signal n ended it."""
        code = await self._child.wait()
        self._channel.close()
        return code if code >= 0 else 128 - code

    async def stop(self, grace: float) -> int:
        """Ask the command to end, kill everything in it after `grace` seconds; its exit code."""
        with suppress(ProcessLookupError, TimeoutError):
            if grace:
                self._child.terminate()
                return await asyncio.wait_for(self.wait(), grace)
        with suppress(ProcessLookupError):
            self._child.kill()
        return await self.wait()

    async def _hear(self) -> bytes:
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.wait_for(loop.sock_recv(self._channel, 4096), START_SECONDS)
        except TimeoutError:
            raise HostNotReady(
                f"a container was not ready after {START_SECONDS:g} s: is this machine overloaded?"
            ) from None


def _root() -> str:
    """Where this very package is imported from, whatever the working directory holds."""
    return str(Path(mesh.__path__[0]).parent)


def _split(said: bytes) -> tuple[int, str]:
    code, _, reason = said.decode(errors="replace").partition(" ")
    return (int(code), reason) if code.isdigit() else (1, "a container ended before it began")

"""A lab's socket as its users know it: its name, and asking it for something.

The name is abstract, so a lab puts no file on this machine; it is bound to the network namespace
`mesh lab up` ran in.  Never keeps a connection.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from pathlib import Path
from typing import Any, Final

import msgspec

from mesh import errors
from mesh.lab import wire
from mesh.lab.wire import LabStatus

END_SECONDS: Final = 20.0
"""A lab ends in some 50 ms; fifty nodes on a crowded machine take seconds."""

_ABSTRACT: Final = re.compile(r" 00010000 .* @mesh-lab/(\d+)/(\S+)$")
"""A listening line of /proc/net/unix (the fourth field is __SO_ACCEPTCON)."""


def address(name: str) -> str:
    """The abstract name of this user's lab `name`."""
    return f"\0mesh-lab/{os.getuid()}/{name}"


def names() -> list[str]:
    """This user's labs in this network namespace."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    found = (match for line in lines if (match := _ABSTRACT.search(line)))
    return sorted(match[2] for match in found if int(match[1]) == os.getuid())


async def call(name: str, request: wire.AnyRequest) -> Any:
    """The result of a request.  Raises NotFound if no such lab runs, else what its reply says."""
    try:
        reader, writer = await asyncio.open_unix_connection(address(name), limit=wire.LINE_LIMIT)
    except ConnectionRefusedError:
        raise errors.NotFound(f"no lab {name!r} runs here: start it with `mesh lab up`") from None
    try:
        writer.write(msgspec.json.encode(request) + b"\n")
        line = await reader.readline()
    except ConnectionError:
        line = b""
    finally:
        writer.close()
    if not line:
        raise errors.MeshError(f"lab {name} ended before it answered")
    reply = msgspec.json.decode(line, type=wire.Reply)
    if reply.error is not None:
        raise _KINDS.get(reply.code, errors.MeshError)(reply.error)
    return reply.result


_KINDS: Final = {
    kind.exit_code: kind for kind in (errors.BadUsage, errors.NotFound, errors.Conflict)
}


async def status(name: str) -> LabStatus:
    """What the lab is.  Raises NotFound."""
    return msgspec.convert(await call(name, wire.Status()), LabStatus)


async def down(name: str) -> None:
    """End the lab, and return when the last of its processes is gone.  Raises NotFound."""
    guard = await call(name, wire.Down())
    await gone(guard, END_SECONDS)


async def gone(pid: int, seconds: float | None = None) -> None:
    """Return when the process has ended.  Raises MeshError if it has not in `seconds`."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(descriptor, ended.set)
        try:
            async with asyncio.timeout(seconds):
                await ended.wait()
        except TimeoutError:
            raise errors.MeshError(
                f"the lab's guard, process {pid}, still waits for the end of processes: "
                "does process 1 here bury its orphans?"
            ) from None
        finally:
            loop.remove_reader(descriptor)
    finally:
        os.close(descriptor)


def claim(name: str) -> socket.socket:
    """The lab's name, bound but not yet listening.  Raises Conflict if it is taken."""
    owner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        owner.bind(address(name))
    except OSError:
        owner.close()
        raise errors.Conflict(
            f"lab {name!r} runs already: choose another --name, or end it with `mesh lab down`"
        ) from None
    return owner

"""The lab's first process: makes the machines, starts etcd, and serves the lab's socket.

Everything in the lab is below it in one PID namespace, so its end is the end of all of it; it
ends itself when the guard is gone.  Never restarts anything.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Final

import msgspec

from mesh import errors
from mesh.lab import environment, kernel, machines, topology, wire
from mesh.lab.world import World

ETCD_SECONDS: Final = 20.0
"""etcd answers within half a second; a crowded machine may need more."""

_CHUNK: Final = 1 << 16


def main() -> None:
    """`init NAME NODES BACKEND CHANNEL RELAY GUARD`: descriptors, and the guard's number."""
    name, nodes, backend, channel, relay, guard = sys.argv[1:]
    host = machines.Host(os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    # Neither signal's default or Python's way of dying suits a process that is a machine.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        machines.furnish_switch()
        listener = socket.socket(fileno=int(relay))
        port = listener.getsockname()[1]
        world = World(name, f"http://127.0.0.1:{port}", int(guard), host)
        world.build(topology.machines(int(nodes)), backend)
        asyncio.run(_serve(world, socket.socket(fileno=int(channel)), listener))
    except errors.MeshError as error:
        sys.stderr.write(f"{error}\n")
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        sys.stderr.write(f"the kernel refuses what a lab needs: {error.strerror}{where}\n")
    sys.stderr.flush()
    os._exit(1)


async def _serve(world: World, channel: socket.socket, listener: socket.socket) -> None:
    world.attach(asyncio.get_running_loop())
    world.start_etcd()
    await _answers(world)
    await asyncio.start_server(_relay, sock=listener)
    visits: set[asyncio.Task[None]] = set()
    channel.setblocking(False)
    loop = asyncio.get_running_loop()
    over = asyncio.Event()

    def arrived() -> None:
        message, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
        if not message:
            over.set()
        for descriptor in descriptors:
            visit = asyncio.create_task(_visit(world, socket.socket(fileno=descriptor)))
            visits.add(visit)
            visit.add_done_callback(visits.discard)

    loop.add_reader(channel, arrived)
    await over.wait()
    os._exit(0)


async def _answers(world: World) -> None:
    """Wait for etcd.  Raises MeshError with the end of its log."""
    try:
        async with asyncio.timeout(ETCD_SECONDS):
            while world.etcd_runs():
                with suppress(ConnectionRefusedError):
                    _, writer = await asyncio.open_connection("127.0.0.1", topology.ETCD_PORT)
                    writer.close()
                    return
                await asyncio.sleep(0.02)
    except TimeoutError:
        pass
    raise errors.MeshError(
        f"etcd does not start; its log ends: {environment.last_line(world.tail('etcd'))}"
    )


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection from the host to etcd."""
    try:
        there = await asyncio.open_connection("127.0.0.1", topology.ETCD_PORT)
    except OSError:
        writer.close()
        return
    async with asyncio.TaskGroup() as group:
        group.create_task(_copy(reader, there[1]))
        group.create_task(_copy(there[0], writer))


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await source.read(_CHUNK):
            target.write(data)
            await target.drain()
    target.close()


async def _visit(world: World, visitor: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=visitor, limit=wire.LINE_LIMIT)
    with suppress(ConnectionError):
        try:
            request = msgspec.json.decode(await reader.readline(), type=wire.AnyRequest)
            reply = wire.Reply(result=await world.handle(request))
        except errors.MeshError as error:
            reply, request = wire.Reply(error=str(error), code=error.exit_code), None
        except (msgspec.DecodeError, OSError) as error:
            reply, request = wire.Reply(error=str(error), code=1), None
        writer.write(msgspec.json.encode(reply) + b"\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    if isinstance(request, wire.Down):
        os._exit(0)


if __name__ == "__main__":
    kernel.die_with_parent()
    main()

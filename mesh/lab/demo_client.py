"""The demo's hold on a machine of the lab: questions to the prober there, and its answers.

Owns the prober's process.  Judges nothing, and never enters a namespace itself.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from mesh.errors import MeshError
from mesh.lab import environment, wire
from mesh.lab.demo_prober import Answer, Line

if TYPE_CHECKING:
    from mesh.lab.demo_checks import Seen
    from mesh.lab.demo_prober import Ask

_CLOSE_SECONDS: Final = 5.0


class Load(NamedTuple):
    """A question that is being answered; `Client.stop` ends one that goes on."""

    number: int
    seen: asyncio.Future[tuple[Seen, ...]]


class Client:
    """Asks from a machine until it is closed; `name` is what messages call the machine."""

    def __init__(self, name: str, child: asyncio.subprocess.Process) -> None:
        self.name = name
        self._child = child
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[tuple[Seen, ...]]] = {}
        self._ended = ""
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, name: str, pid: int) -> Client:
        """A client in the namespaces of process `pid`."""
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mesh.lab.inside", str(pid)),
            *(sys.executable, "-m", "mesh.lab.demo_prober"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment.with_this_package(os.environ),
            limit=wire.LINE_LIMIT,
            start_new_session=True,  # a Ctrl-C is for the demo, which then ends this
        )
        return cls(name, child)

    async def ask(self, question: Ask) -> tuple[Seen, ...]:
        """What was seen.  Raises MeshError if the prober has ended."""
        return await self.begin(question).seen

    def begin(self, question: Ask) -> Load:
        """Ask without waiting for the answer."""
        load = Load(next(self._numbers), asyncio.get_running_loop().create_future())
        self._waiting[load.number] = load.seen
        self._send(Line(load.number, question))
        return load

    async def stop(self, load: Load) -> tuple[Seen, ...]:
        """End a load: all that was seen, waiting for what had begun.  Raises as `ask`."""
        self._send(Line(load.number))
        return await load.seen

    async def close(self) -> None:
        """End the prober; nobody waits for answers any more."""
        assert self._child.stdin is not None
        for waiting in self._waiting.values():
            waiting.cancel()
        self._waiting.clear()
        self._child.stdin.close()
        try:
            await asyncio.wait_for(self._child.wait(), _CLOSE_SECONDS)
        except TimeoutError:
            self._child.kill()
            await self._child.wait()
        await self._reading

    def _send(self, line: Line) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(msgspec.json.encode(line) + b"\n")
        self._fail_if_ended()

    async def _read(self) -> None:
        assert self._child.stdout is not None
        assert self._child.stderr is not None
        while said := await self._child.stdout.readline():
            answer = msgspec.json.decode(said, type=Answer)
            waiting = self._waiting.pop(answer.number, None)
            if waiting is not None and not waiting.cancelled():
                waiting.set_result(answer.seen)
        self._ended = environment.last_line((await self._child.stderr.read()).decode())
        self._fail_if_ended()

    def _fail_if_ended(self) -> None:
        if self._ended:
            failure = MeshError(f"the prober on {self.name} ended: {self._ended}")
            for waiting in self._waiting.values():
                if not waiting.cancelled():
                    waiting.set_exception(failure)
            self._waiting.clear()


def innermost(pid: int) -> int:
    """The last of a process's only children's children: a container's command, by its supervisor.

    Raises MeshError if the process has ended.
    """
    try:
        while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            pid = int(children[0])
    except FileNotFoundError:
        raise MeshError(f"process {pid} of a replica ended just now") from None
    return pid

"""What every part of the demo works with: the lab, clients on its machines, and who is shown what.

Keeps the rows told so far.  Decides neither what is shown nor what is right.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from mesh.errors import MeshError, NotFound
from mesh.lab import control, wire
from mesh.lab.demo_checks import Check
from mesh.lab.demo_client import Client

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Sequence

    from mesh.lab.client import OwnLab
    from mesh.lab.demo_checks import Seen, Verdict
    from mesh.lab.demo_prober import Ask
    from mesh.lab.demo_rows import Row

BEFORE: Final = 0.3
AFTER: Final = 0.8
"""Seconds of connections before and after a disturbance."""

_LOG_LINES: Final = 5


class Audience(Protocol):
    """Who is shown the rows as they come."""

    def group(self, title: str) -> None:
        """What the next rows show."""

    def begin(self, name: str) -> None:
        """A row, or some, are worked on."""

    def row(self, name: str, verdict: Verdict) -> None:
        """A row is known."""


class Stage:
    """One performance: `checks` are the rows told so far, `current` is worked on."""

    def __init__(self, lab: OwnLab, audience: Audience) -> None:
        self.lab = lab
        self.checks: list[Check] = []
        self.current = ""
        self._audience = audience
        self._key = ""
        self._clients: dict[str, Client] = {}

    def group(self, key: str, title: str) -> None:
        """Begin rows that show one thing; `key` begins their names for programs."""
        self._key = key
        self._audience.group(title)

    def begin(self, name: str) -> None:
        """Say what is worked on."""
        self.current = name
        self._audience.begin(name)

    def tell(self, name: str, verdict: Verdict) -> None:
        """Show a row."""
        self.checks.append(Check(f"{self._key}: {name}", verdict.ok, verdict.detail))
        self._audience.row(name, verdict)

    async def start_client(self, name: str, pid: int) -> None:
        """Let `name` be asked from the namespaces of process `pid`."""
        self._clients[name] = await Client.start(name, pid)

    async def silent(self, asks: Iterable[tuple[str, Ask]]) -> str:
        """The first address that does not answer, or nothing."""
        seen = await self._answers(asks)
        return next((one.host for one in seen if one.failure), "")

    async def supervisor(self, replica: str) -> int:
        """The host's number of the process that runs a replica.  Raises NotFound."""
        for task in (await self.lab.status()).tasks:
            if task.id == replica:
                return task.pid
        raise NotFound(f"lab {self.lab.name} runs no replica {replica!r}")

    async def ask(self, row: Row) -> None:
        """Ask all of a row's questions at once, and show it.  Raises MeshError."""
        self.begin(row.name)
        self.tell(row.name, row.judge(await self._answers(row.asks)))

    async def _answers(self, asks: Iterable[tuple[str, Ask]]) -> list[Seen]:
        answers = await asyncio.gather(*(self._clients[who].ask(ask) for who, ask in asks))
        return [one for seen in answers for one in seen]

    async def under_load(
        self, asks: Sequence[Ask], disturbance: Coroutine[None, None, float]
    ) -> tuple[list[tuple[Seen, ...]], float]:
        """What c1 saw for every question before, during and after a disturbance; when it began."""
        c1 = self._clients["c1"]
        loads = [c1.begin(ask) for ask in asks]
        await asyncio.sleep(BEFORE)
        at = await disturbance
        await asyncio.sleep(AFTER)
        return list(await asyncio.gather(*(c1.stop(load) for load in loads))), at

    async def close(self) -> None:
        """End the clients."""
        await asyncio.gather(*(one.close() for one in self._clients.values()))

    async def logs(self) -> dict[str, list[str]]:
        """What the agent of every node said last, as far as the lab can tell."""
        found = {}
        for node in ("n1", "n2", "n3"):
            with suppress(MeshError):
                log = await control.call(self.lab.name, wire.Logs(name=node))
                found[node] = log.splitlines()[-_LOG_LINES:]
        return found

"""Tells programs of this host which host ports lead to which task, as Galaxy does on request: by a
file for each task, or by a command.

Owns the files of `published_dir`, and what it notes of the command's successes.  Works by itself:
neither a full disk nor a command that hangs holds up forwarding or etcd.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from mesh.dataplane import command
from mesh.errors import CommandFailed
from mesh.model.report import Problem
from mesh.store import schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mesh.agent.config import AgentConfig
    from mesh.model.mapping import PortMapping

log = logging.getLogger(__name__)

_HOOK_SECONDS: Final = 10.0
"""A command that takes longer is stopped, and counts as failed."""

_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0
"""Seconds until what failed is tried again: twice as many each time."""

_SUFFIX: Final = ".json"
_UNFINISHED: Final = f"{_SUFFIX}.new"


class Ports(Protocol):
    """What can be told."""

    def all_published(self) -> Mapping[str, tuple[PortMapping, ...]]:
        """The ports of every task that has any, by its name."""
        ...


class Outlet(Protocol):
    """Where somebody is told of tasks and their ports, as JSON."""

    name: str
    """How a problem with it begins."""

    def told(self) -> dict[str, bytes]:
        """What was told of each task last, by this agent or one before.  Raises OSError."""
        ...

    async def tell(self, task: str, record: bytes | None) -> None:
        """Tell what there is of a task now, or None.  Raises OSError, CommandFailed."""
        ...


class Directory:
    """A file for each task, `<task>.json`.  Such files that list ports are ours, others are not."""

    def __init__(self, path: Path) -> None:
        self.name = "published_dir"
        self._path = path

    def told(self) -> dict[str, bytes]:
        """See Outlet.told."""
        self._path.mkdir(parents=True, exist_ok=True)
        found = {}
        for path in self._path.iterdir():
            if path.name.endswith(_UNFINISHED):
                path.unlink()  # of an agent that was killed
            elif path.name.endswith(_SUFFIX):
                record = path.read_bytes()
                if schema.parse_mappings(path.name, record):
                    found[path.name.removesuffix(_SUFFIX)] = record
        return found

    async def tell(self, task: str, record: bytes | None) -> None:
        """See Outlet.tell: nobody ever reads half a file."""
        await asyncio.to_thread(self.put, task, record)

    def put(self, task: str, record: bytes | None) -> None:
        """Write or remove one file.  Raises OSError."""
        path = self._path / f"{task}{_SUFFIX}"
        if record is None:
            path.unlink(missing_ok=True)
            return
        unfinished = path.with_name(f"{task}{_UNFINISHED}")
        try:
            unfinished.write_bytes(record)
            os.replace(unfinished, path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise


class Hook:
    """A command for each change: the ports on its standard input; TASK, NODE and ACTION
    ("published", "removed") in its environment.

    `notes` has what it succeeded with: the next agent tells it of the difference only.
    """

    def __init__(self, argv: tuple[str, ...], node: str, notes: Path) -> None:
        self.name = "published_hook"
        self._argv = argv
        self._node = node
        self._notes = Directory(notes)

    def told(self) -> dict[str, bytes]:
        """See Outlet.told."""
        return self._notes.told()

    async def tell(self, task: str, record: bytes | None) -> None:
        """See Outlet.tell."""
        action = "removed" if record is None else "published"
        environment = {**os.environ, "TASK": task, "NODE": self._node, "ACTION": action}
        said = (record or b"[]").decode()
        await command.run(*self._argv, input=said, timeout=_HOOK_SECONDS, environment=environment)
        self._notes.put(task, record)


def outlets(config: AgentConfig) -> tuple[Outlet, ...]:
    """What a node's configuration asks for."""
    found: list[Outlet] = []
    if config.published_dir is not None:
        found.append(Directory(Path(config.published_dir)))
    if config.published_hook:
        notes = Path(config.state_dir) / "published-hook"
        found.append(Hook(config.published_hook, config.node, notes))
    return tuple(found)


class _Failure(NamedTuple):
    """Why a task was not told of, when it is tried again (loop time), and after what pause then."""

    reason: str
    due: float
    pause: float


class Writeback:
    """One outlet, kept in line with what is published; one task after the other."""

    def __init__(self, outlet: Outlet, ports: Ports, changed: Callable[[], None]) -> None:
        self._outlet = outlet
        self._ports = ports
        self._changed = changed
        self._wake = asyncio.Event()
        self._told: dict[str, bytes] = {}
        self._failing: dict[str, _Failure] = {}

    def wake(self) -> None:
        """The kernel has what is published now."""
        self._wake.set()

    def problems(self) -> Iterator[Problem]:
        """What could not be told."""
        for task, failure in sorted(self._failing.items())[:1]:
            more = f" and {len(self._failing) - 1} more" if len(self._failing) > 1 else ""
            about = f"{self._outlet.name} of task {task}{more}" if task else self._outlet.name
            message = f"{failure.reason}; it is tried again, at least every minute"
            yield Problem(about=about, message=message)

    async def run(self) -> None:
        """Tell for ever."""
        await self._wake.wait()
        await self._until_known()
        while True:
            self._wake.clear()
            reasons = self._reasons()
            await self._pass()
            if self._reasons() != reasons:
                self._changed()
            due = min((failure.due for failure in self._failing.values()), default=None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._wake.wait()

    async def _until_known(self) -> None:
        """Find out what an agent before this one told."""
        while True:
            try:
                self._told = self._outlet.told()
            except OSError as error:
                self._fail("", error)
                self._changed()
            else:
                if self._failing.pop("", None) is not None:
                    self._changed()
                return
            await asyncio.sleep(self._failing[""].pause)

    async def _pass(self) -> None:
        """Tell what is not yet told, until there is news."""
        ports = self._ports.all_published().items()
        wanted = {task: schema.encode(mappings) for task, mappings in ports}
        now = asyncio.get_running_loop().time()
        for task in sorted(wanted.keys() | self._told):
            record = wanted.get(task)
            if record == self._told.get(task):
                self._failing.pop(task, None)
                continue
            if task in self._failing and self._failing[task].due > now:
                continue
            await self._tell(task, record)
            if self._wake.is_set():
                return

    async def _tell(self, task: str, record: bytes | None) -> None:
        try:
            await self._outlet.tell(task, record)
        except (OSError, ValueError, CommandFailed) as error:
            self._fail(task, error)
            return
        self._failing.pop(task, None)
        if record is None:
            self._told.pop(task, None)
        else:
            self._told[task] = record

    def _fail(self, task: str, error: Exception) -> None:
        reason = str(error)
        if isinstance(error, OSError) and error.strerror:
            reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        before = self._failing.get(task)
        pause = min(2 * before.pause, _LONGEST_PAUSE) if before is not None else _FIRST_PAUSE
        due = asyncio.get_running_loop().time() + pause
        self._failing[task] = _Failure(reason, due, pause)
        if before is None or before.reason != reason:
            log.warning("%s task=%s failed: %s", self._outlet.name, task, reason)

    def _reasons(self) -> dict[str, str]:
        return {task: failure.reason for task, failure in self._failing.items()}


async def withdraw(config: AgentConfig) -> None:
    """Tell that nothing is published any more; what cannot be told is logged."""
    for outlet in outlets(config):
        try:
            for task in sorted(outlet.told()):
                await outlet.tell(task, None)
        except (OSError, ValueError, CommandFailed) as error:
            log.warning("%s was not told: %s", outlet.name, error)

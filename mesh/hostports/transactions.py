"""Publishing as a transaction over two things: the state directory and the kernel.

What is to be is written down first, then the kernel follows; a process that ends in between leaves
a mark, and the next call brings the kernel to what is written.  What the kernel refuses is taken
back in both.  One call at a time: mesh.hostports.publisher sees to it.
"""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from mesh.dataplane import connected
from mesh.engine import lock, predecessor
from mesh.engine.healing import Repair
from mesh.errors import ApplyFailed, BadUsage, Conflict, MeshError
from mesh.hostports import alone, asked, installation, listeners, statedir
from mesh.hostports.installation import Installation
from mesh.hostports.publications import Publications, Request, addresses_of
from mesh.model import address
from mesh.model.names import check_id
from mesh.rules import owner

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from mesh.dataplane.firewall import Mode
    from mesh.hostports.asked import Asked
    from mesh.hostports.publications import Publication, Settings
    from mesh.hostports.statedir import StateDirectory
    from mesh.model.report import Problem

log = logging.getLogger(__name__)


class Host(NamedTuple):
    """How ports are published here: by which rule backend ("auto" or a name), what may be done
    about firewalls, and who may have which port.
    """

    backend: str
    firewall: Mode
    settings: Settings


class Checked(NamedTuple):
    """What was put right, and what somebody has to look at."""

    repaired: Repair
    problems: tuple[Problem, ...]


class Transactions:
    """Changes to what one state directory and one kernel have."""

    def __init__(self, state: StateDirectory, host: Host) -> None:
        self._state = state
        self._host = host
        self._known = Publications(host.settings)
        self._seen: tuple[int, int] | None = None
        self._installed: Installation | None = None
        self._is_tidy = True
        self.problems: tuple[Problem, ...] = ()
        """What the last call found that keeps packets away, or could not do."""

    async def publish(
        self, task: str, container: str | Iterable[str], wanted: Iterable[Asked]
    ) -> Publication | None:
        """Give a task these ports and no others; None if these are none.  Raises MeshError."""
        _check(task)
        ports, addresses = asked.ports(wanted), addresses_of(container)
        if not ports:
            await self.unpublish(task)
            return None
        async with self._held():
            header = self._state.header
            draw = header.owner << 32 | header.generation
            request = Request(task, addresses, ports, draw)
            found, cursors = self._known.decide(request, header.cursors, listeners.look())
            installed = await self._opened(addresses)
            if found != self._known.get(task):
                header = msgspec.structs.replace(header, cursors=cursors)
                await self._change(installed, header, task, found)
            self.problems = installed.problems(addresses)
            return found

    async def unpublish(self, task: str) -> bool:
        """Take all its ports from a task; whether it had any.  Raises MeshError."""
        _check(task)
        async with self._held():
            if self._known.get(task) is None:
                return False
            await self._change(await self._opened(), self._state.header, task, None)
            return True

    async def check(self) -> Checked:
        """Put right what somebody else did to the rules.  Raises MeshError."""
        async with self._held():
            whose = await predecessor.owners()
            if not self._known.names() and self._state.header.owner not in whose:
                return Checked(Repair(), ())
            fresh = self._installed is None
            await predecessor.check(self._state.header.owner)
            installed = await self._opened(self._addresses())
            mended = installed.mended if fresh else Repair()
            mended |= await installed.heal()
            self.problems = installed.problems(self._addresses())
            return Checked(mended, self.problems)

    async def restore(self) -> int:
        """Have this kernel hold what the state directory says, also after a reboot and in another
        network namespace; how many tasks that is.  Raises MeshError.
        """
        async with self._held(moving=True):
            if self._known.names():
                installed = await self._opened(self._addresses())
                self.problems = installed.problems(self._addresses())
            return len(self._known.names())

    async def cleanup(self, *, force: bool) -> None:
        """Take everything that was published off this host, with the state; with `force` also what
        another state directory published.  Raises MeshError.
        """
        with self._state.locked(), lock.briefly():
            whose = await predecessor.owners()
            foreign = whose - {self._state.header.owner}
            if foreign and (owner.AGENT in foreign or not force):
                await predecessor.check(self._state.header.owner)
            self._close()
            if whose:
                await installation.remove()
            self._state.clear()
            self._known, self._seen = Publications(self._host.settings), None

    @property
    def is_tidy(self) -> bool:
        """Whether nothing is left to do after the answers."""
        return self._is_tidy

    async def tidy(self) -> None:
        """Have the disk keep what was written, and forget flows that nothing serves any more.
        Raises MeshError.
        """
        self._is_tidy = True
        self._state.sync()
        if self._installed is not None:
            with self._state.locked(), lock.briefly():
                header = self._state.header
                if self._seen == (header.owner, header.generation):
                    await self._installed.settle()

    def close(self) -> None:
        """Release sockets; the kernel keeps forwarding."""
        self._close()

    # ---- one change

    async def _change(
        self,
        installed: Installation,
        header: statedir.Header,
        task: str,
        wanted: Publication | None,
    ) -> None:
        """All or nothing of what a task is to have, in the state and in the kernel."""
        before = self._known.get(task)
        begun = msgspec.structs.replace(
            header, generation=header.generation + 1, unfinished=True, namespace=statedir.here()
        )
        self._seen, self._is_tidy = None, False
        self._state.save(begun)
        try:
            self._note(task, wanted)
            await installed.change(task)
        except BaseException as error:
            await self._roll_back(installed, task, before)
            if isinstance(error, MeshError):
                raise ApplyFailed(f"task {task}: {error}; its ports are as they were") from error
            raise
        self._finish()

    async def _roll_back(
        self, installed: Installation, task: str, before: Publication | None
    ) -> None:
        try:
            self._note(task, before)
            await installed.change(task)
        except MeshError as error:
            log.warning("task %s: not taken back, the next call does it: %s", task, error)
            self._close()
        else:
            self._finish()

    def _note(self, task: str, wanted: Publication | None) -> None:
        if wanted is None:
            self._state.remove(task)
            self._known.drop(task)
        else:
            self._state.write(wanted)
            self._known.put(wanted)

    def _finish(self) -> None:
        header = msgspec.structs.replace(
            self._state.header, unfinished=False, namespace=statedir.here()
        )
        self._state.save(header)
        self._seen = (header.owner, header.generation)

    # ---- what is there

    @asynccontextmanager
    async def _held(self, *, moving: bool = False) -> AsyncIterator[None]:
        """Alone with state and kernel, and knowing what the state says."""
        with self._state.locked(), lock.briefly():
            header, here = self._state.header, statedir.here()
            if header.namespace not in ("", here):
                self._check_moved(header.namespace, here, moving=moving)
            if self._seen != (header.owner, header.generation):
                self._reload()
            if header.unfinished:
                await self._opened(self._addresses())
            yield

    def _check_moved(self, there: str, here: str, *, moving: bool) -> None:
        """Whose namespace was another one, of this boot, has to say that it is meant."""
        boot = there.partition("/")[0]
        if not moving and boot == here.partition("/")[0]:
            raise Conflict(
                f"{self._state} has the ports of another network namespace: use a state directory "
                "of its own here, or move them here with `mesh published --restore`"
            )
        self._seen = None

    def _reload(self) -> None:
        """Somebody else changed the state, or this is the first look at it."""
        self._close()
        self._known = Publications(self._host.settings)
        for each in self._state.tasks():
            self._known.put(each)
        self._seen = (self._state.header.owner, self._state.header.generation)

    def _addresses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(a for each in self._known for a in each.addresses))

    async def _opened(self, more: Iterable[str] = ()) -> Installation:
        """The kernel, in line with the state, and ready for containers at these addresses."""
        known: set[str] = set()
        if self._installed is not None:
            known.update(*self._installed.parameters.segments)
        addresses = set(more) | (set() if self._installed is not None else set(self._addresses()))
        segments = known | _segments(addresses, known)
        if self._installed is not None and segments == known:
            self._installed.check_owner()
            return self._installed
        self._close()
        header = self._state.header
        await predecessor.check(header.owner)
        self._state.save(msgspec.structs.replace(header, unfinished=True))
        parameters = alone.parameters(header.owner, segments)
        published = alone.Published(self._known)
        host = self._host
        self._installed = await Installation.open(
            published, host.backend, parameters, host.firewall
        )
        self._is_tidy = False
        self._finish()
        return self._installed

    def _close(self) -> None:
        if self._installed is not None:
            self._installed.close()
            self._installed = None


def _segments(addresses: Iterable[str], known: Iterable[str]) -> set[str]:
    """The networks of this host that these addresses are in, without those `known`."""
    fresh = [a for a in addresses if not any(address.contains(each, a) for each in known)]
    if not fresh:
        return set()
    return {n for n in connected.networks() if any(address.contains(n, a) for a in fresh)}


def _check(task: str) -> None:
    try:
        check_id(task, "task")
    except ValueError as error:
        raise BadUsage(str(error)) from None

"""This node's ports next to the other processes of the host: holds those that lead to services,
and knows who listens on the others.

Owns the held sockets and the look at who listens.  What that means for services is decided in
mesh.hostports.occupied.
"""

from __future__ import annotations

import asyncio
import logging
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.agent import systemd
from mesh.dataplane import localports, sockdiag
from mesh.engine.desired import Touched
from mesh.hostports import occupied, reservation
from mesh.hostports.reservation import Reservation
from mesh.model import listener
from mesh.model.listener import Binding
from mesh.model.publish import Protocol
from mesh.model.report import Problem
from mesh.rules import nft
from mesh.rules.forwarding import Frontend, Scope

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
    from pathlib import Path

    from mesh.agent.state import State
    from mesh.dataplane.sockdiag import Owner, Socket
    from mesh.model.listener import Listener, Port
    from mesh.rules.elements import ElementKey, Elements

    ReadSome = Callable[[Collection[ElementKey]], Awaitable[Elements]]

log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 2.0
"""Between two looks at who listens: one costs a fraction of a millisecond."""

_NOTHING: Final = Touched(frozenset(), nodes=False)


class Seen(NamedTuple):
    """Who listens; `lasting` are those that no connection of the host explains."""

    listeners: Mapping[Port, tuple[Listener, ...]]
    lasting: frozenset[Listener]


class Occupancy:
    """The ports of one node.  `touch` is told what the host's other processes touch."""

    def __init__(
        self,
        state: State,
        state_dir: Path,
        touch: Callable[[Touched], None],
        own: Callable[[], Collection[int]],
    ) -> None:
        """`own` are the inodes of sockets that listen on ports for services, and not for others."""
        self._state = state
        self._own = own
        self._state_dir = state_dir
        self._occupied = state.hostports.occupied
        self._touch = touch
        self._reservation = Reservation(reservation.raise_limit())
        self._given = systemd.given()
        self._store = systemd.Store(self._given)
        self._owners: dict[int, Owner] = {}
        self._sockets: frozenset[Socket] | None = None
        self._busy: frozenset[Port] = frozenset()
        self._planned: dict[str, frozenset[Binding]] = {}
        self._fresh: set[Binding] = set()
        self._unheld: set[Binding] = set()
        self._blind: str | None = None
        self._looking = asyncio.Lock()
        self.seen = Seen({}, frozenset())

    # ---- before and after the rules are written

    async def begin(self, read_some: ReadSome) -> Touched:
        """Settle who has which port, before anything is written; call `secured` after it.

        What the kernel leads to services already stays so, whoever listens there by now.
        """
        if self._state.cluster is not None:
            localports.reserve(self._state.cluster.dynamic_ports, self._state_dir)
        everything = Touched(self._state.settle(_NOTHING).services | self._state.services(), True)
        bindings = {name: self._bindings(name) for name in everything.services}
        sockets = self._listening()
        if sockets is not None:
            await self._name(sockets)
            for service, first in (await self._were_first(bindings, read_some)).items():
                self._occupied.put_in_force(service, first)
        wanted = frozenset[Binding]().union(*bindings.values())
        for name, descriptors in self._given.items():
            self._reservation.adopt(descriptors, wanted)
            self._store.keep({name: self._reservation.descriptors(name)})
        await self.look()
        return await self.secure(everything)

    async def secure(self, touched: Touched) -> Touched:
        """Hold what touched services are to have; what is to be planned in the end.

        What somebody else has turns out here, and touches whoever was to have it.
        """
        while True:
            touched = self._state.settle(touched)
            for name in touched.services:
                self._planned[name] = self._bindings(name)
            wanted = {b for name in touched.services for b in self._planned[name]}
            new = {b for b in wanted if b not in self._reservation and b not in self._unheld}
            self._fresh |= new
            failed = self._reservation.hold(new)
            if not failed:
                return touched
            self._unheld |= failed.keys()
            more = await self.look()
            touched = touched._replace(services=touched.services | more.services)

    def secured(self, touched: Touched) -> None:
        """The kernel has it: hold no more what leads nowhere now."""
        gone = self._fresh
        self._fresh = set()
        there = set[Binding]()
        for name in touched.services:
            planned = self._planned.pop(name, frozenset())
            gone |= self._occupied.put_in_force(name, planned)
            there |= planned
        gone = {binding for binding in gone - there if not self._occupied.has(binding)}
        self._unheld -= gone
        self._reservation.release(gone)
        self._store.keep(self._reservation.changed())

    def _bindings(self, service: str) -> frozenset[Binding]:
        granted = self._state.hostports.granted(service)
        return occupied.bindings(self._state.ingress(service), granted)

    # ---- meanwhile

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self._unheld or self._reservation.lacking:
                again = self._unheld | self._reservation.lacking
                self._unheld = set(self._reservation.hold(again))
                self._store.keep(self._reservation.changed())
            before = self._sockets, self._busy
            touched = await self.look()
            if (self._sockets, self._busy) != before:
                self._touch(touched)

    async def look(self) -> Touched:
        """Who listens now; what that touches."""
        async with self._looking:
            sockets = self._listening()
            if sockets is None:
                return _NOTHING
            listened = {(one.protocol, one.port) for one in sockets}
            busy = frozenset(b[:2] for b in self._unheld if b[:2] not in listened)
            if sockets == self._sockets and busy == self._busy:
                return _NOTHING
            await self._name(sockets)
            self._sockets, self._busy = sockets, busy
            services = self._state.hostports.observe(self.seen.listeners, busy)
            return Touched(services, nodes=False)

    def problems(self) -> Iterator[Problem]:
        """What this host does not let the agent know, or hold."""
        if self._blind is not None:
            message = f"cannot be told from free ones ({self._blind}): load inet_diag, tcp_diag"
            yield Problem(about="ports that processes of the host use", message=message)
        lacking = len(self._reservation.lacking)
        if lacking:
            message = (
                f"{lacking} published ports are not held, so that other processes may take them: "
                "raise the agent's limit of open files (LimitNOFILE)"
            )
            yield Problem(about="open files", message=message)

    # ---- who listens

    def _listening(self) -> frozenset[Socket] | None:
        try:
            own = self._own()
            found = frozenset(one for one in sockdiag.listening() if one.inode not in own)
        except OSError as error:
            if self._blind is None:
                log.warning("cannot ask who listens: %s", error)
            self._blind = error.strerror or str(error)
            return None
        self._blind = None
        return found

    async def _name(self, sockets: frozenset[Socket]) -> None:
        """Find out whose they are, but for sockets that only wait for answers."""
        lent, asked = localports.lent(), {binding[:2] for binding in self._unheld}
        lasting = {
            one
            for one in sockets
            if one.protocol is not Protocol.UDP
            or one.port not in lent
            or (one.protocol, one.port) in asked
        }
        unknown = {one.inode for one in lasting} - self._owners.keys()
        if unknown:
            self._owners |= await asyncio.to_thread(sockdiag.owners, unknown)
        present = {one.inode for one in sockets}
        self._owners = {
            inode: self._owners.get(inode, sockdiag.UNKNOWN)
            for inode in present & (self._owners.keys() | unknown)
        }
        named = {one: sockdiag.listener(one, self._owner(one)) for one in sockets}
        self.seen = Seen(
            listener.by_port(set(named.values())), frozenset(named[one] for one in lasting)
        )

    def _owner(self, one: Socket) -> Owner:
        return self._owners.get(one.inode, sockdiag.UNKNOWN)

    async def _were_first(
        self, bindings: Mapping[str, frozenset[Binding]], read_some: ReadSome
    ) -> dict[str, frozenset[Binding]]:
        """What the kernel leads to services although somebody listens there."""
        listeners = self.seen.listeners
        keys = {
            (name, binding): list(chain(*nft.frontend_keys(_frontends(binding))))
            for name, of_service in bindings.items()
            for binding in of_service
            if binding[:2] in listeners
        }
        there = await read_some({key for some in keys.values() for key in some}) if keys else {}
        found: dict[str, frozenset[Binding]] = {}
        for (name, binding), some in keys.items():
            if any(key in there for key in some):
                found[name] = found.get(name, frozenset()) | {binding}
        return found


def _frontends(binding: Binding) -> Iterator[Frontend]:
    """What may lead somewhere from a port."""
    protocol, port, address = binding
    if address is not None:
        yield Frontend(Scope.HOST_IP, address, protocol, port)
        return
    for scope in (Scope.INGRESS, Scope.NODE):
        yield Frontend(scope, None, protocol, port)

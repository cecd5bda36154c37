"""The nftables driver: the program through `nft`, its elements through one netlink socket.

Owns `table inet mesh` and `table bridge mesh` in the network namespace it was made in, and touches
no other.  Never decides what should be forwarded.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from typing import TYPE_CHECKING, Final

from mesh.dataplane import command, nfchange, nfloaded, nfmessages, nfretire, nfwatch
from mesh.dataplane.nfmessages import TABLE, additions, removals
from mesh.dataplane.nfnetlink import BRIDGE, INET, Refused, Socket
from mesh.dataplane.nfwatch import Watch
from mesh.dataplane.protocol import Examined, Tampering
from mesh.delta import Delta
from mesh.errors import ApplyFailed, CommandFailed, HostNotReady, NotFound
from mesh.rules import elements, extras, nft_intact, program
from mesh.rules.nft_intact import Seen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mesh.dataplane.nfmessages import Chunk
    from mesh.dataplane.nfwatch import Event
    from mesh.dataplane.protocol import ElementDelta
    from mesh.model.report import Problem
    from mesh.rules.elements import ElementKey, Elements
    from mesh.rules.extras import Extras
    from mesh.rules.program import Parameters

_log = logging.getLogger(__name__)

_RECREATE: Final = "table inet mesh\ndelete table inet mesh\n"
_UPGRADE: Final = "flush table inet mesh\n"
_STATIC: Final = ("own4", "own6", "sizes")
_IN_LOOP: Final = 500
"""Elements that are packed and committed within the event loop: about 5 ms at most."""


class NftablesDriver:
    """Drives nftables for one node.  `prepare` is also how a damaged program is healed."""

    name = "nftables"
    chunk = 200  # about 2 600 elements, 10 ms

    def __init__(self, parameters: Parameters) -> None:
        self._layout = parameters.layout
        self._program = program.build(parameters)
        self._socket = Socket()
        self._extras = extras.NONE
        self._attached = False
        self._waiting: Elements | None = None
        self._lock = asyncio.Lock()
        self._watch: Watch | None = None
        self._own: set[int] = set()

    @property
    def port(self) -> int:
        """The netlink port id that our own changes are announced with."""
        return self._socket.port

    async def prepare(self) -> bool:
        """Load the program, or adopt the one that is loaded.  Raises CommandFailed.

        The same program, untouched by anybody: left alone.  Another version, or a damaged one:
        replaced in place, which keeps all elements and loses no packet.  None, or other bits of
        marks: loaded without elements, and `attach` has yet to lead packets there.  Other sets:
        what is there goes on until `attach` puts another in its place, with all that it holds.
        """
        async with self._lock:
            with _reading():
                self._watch = self._watch or Watch(ignored=self.port)
                loaded, witness = nfloaded.fingerprint(self._socket), self._witness()
                sizes = nfloaded.dispatched(self._socket)
                there = nfmessages.chains(self._socket, INET).keys()
            self._attached = bool(there & self._program.base_chains)
            self._waiting = None
            if loaded.schema != self._program.schema:
                if self._attached and nfloaded.layout(self._socket) == self._layout:
                    self._waiting = {}
                else:
                    await self._create()
            elif (loaded.version, loaded.witness) != (self._program.version, witness):
                had = extras.loaded((), sizes, self._layout)
                await self._replace(had | nfloaded.needed(self._socket, self._layout))
            else:
                self._extras = extras.loaded(there, sizes, self._layout)
                _log.info("nftables program=adopted version=%x", self._program.version)
                return False
            return True

    async def attach(self) -> None:
        """Load the chains that packets enter by, all at once.  Raises CommandFailed."""
        async with self._lock:
            if self._waiting is not None:
                await self._succeed(self._waiting)
                self._waiting = None
            if not self._attached:
                await self._extend(self._program.hooks)
                self._attached = True
                _log.info("nftables program=attached")
            await nfretire.retire(self._socket, nfretire.STAND_IN)

    async def _succeed(self, found: Elements) -> None:
        """Put this program in the place of one with other sets.  Raises CommandFailed, ApplyFailed.

        A table of another name stands in meanwhile; where that is too large for the rights that
        this host gives, nothing does.
        """
        whole = extras.whole(self._program, extras.needed(found, self._layout))
        more = elements.additions(found)
        try:
            await self._nft(nfretire.for_stand_in(_RECREATE + whole + more))
        except CommandFailed as error:
            _log.warning("nftables program=unserved error=%r", str(error))
        else:
            await nfretire.retire(self._socket)
        await self._create()
        await self._apply(Delta({}, found))

    def predecessor(self) -> Elements:
        """The frontends of a program that `attach` will put another in the place of."""
        found: Elements = {}
        for name in elements.FRONTENDS if self._waiting is not None else ():
            with contextlib.suppress(OSError):
                found |= nfmessages.read_elements(self._socket, [name])
        return found

    async def _create(self) -> None:
        self._attached = False
        await self._load(_RECREATE + self._program.unhooked, "created", extras.NONE)

    async def _replace(self, needed: Extras) -> None:
        whole = self._program.inet if self._attached else self._program.unhooked
        text = _UPGRADE + whole + extras.added(self._program, needed) + self._stale(needed)
        try:
            await self._load(text, "replaced", needed)
        except CommandFailed as error:
            _log.warning("nftables program=damaged error=%r created anew", str(error))
            await self._create()

    async def _load(self, text: str, how: str, more: Extras) -> None:
        before = nfmessages.generation(self._socket)
        await self._nft(text)
        transactions = 1
        try:
            await self._nft(self._program.bridge)
            transactions += 1
        except CommandFailed as error:
            text = "nftables table=bridge error=%r replicas on one bridge cannot reach each other"
            _log.warning(text, str(error))
        self._extras = more
        self._write_witness(before + transactions)
        _log.info("nftables program=%s version=%x", how, self._program.version)

    async def _nft(self, text: str) -> None:
        await command.run("nft", "-f", "-", input=text, started=self._own.add)

    def _stale(self, needed: Extras) -> str:
        """Deletes chains of ours that the program does not have; the flush leaves them empty."""
        wanted = extras.chains(self._program, needed)
        foreign = sorted(nfmessages.chains(self._socket, INET).keys() - wanted)
        return "".join(
            f"delete chain inet mesh {name}\n" for name in foreign if name.isidentifier()
        )

    def _witness(self) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return nfmessages.witness(self._socket, _STATIC)
        return None

    def _write_witness(self, generation: int) -> None:
        """Write down what the program looks like in the kernel, for `prepare` to compare.

        Not if anybody else changed the ruleset since it was loaded, which was the transaction
        with that number: what they did would count as ours.
        """
        key, witness = elements.mark_bytes(2), self._witness()
        if witness is None or nfmessages.generation(self._socket) != generation:
            return
        chunks = additions("fingerprint", [(key, elements.mark_bytes(witness))])
        if nfloaded.fingerprint(self._socket).witness is not None:
            chunks = [*removals("fingerprint", [key]), *chunks]
        self._socket.transact([chunk.message for chunk in chunks])

    async def read(self) -> Elements:
        """Every element of every set of services.  Raises NotFound if the program is gone."""
        async with self._lock:
            if self._waiting is not None:
                return dict(self._waiting)
            with _reading():
                return await asyncio.to_thread(
                    nfmessages.read_elements, self._socket, elements.SETS
                )

    async def read_some(self, keys: Iterable[ElementKey]) -> Elements:
        """See Driver.read_some.  Of a program that is gone, there is none."""
        async with self._lock:
            if self._waiting is not None:
                return {key: self._waiting[key] for key in keys if key in self._waiting}
            with _reading():
                return nfmessages.read_some(self._socket, keys)

    async def examine(self) -> Examined:
        """See Driver.examine.  A set that is gone is read as empty."""
        async with self._lock:
            with _reading():
                if (INET, nfmessages.TABLE) not in nfmessages.tables(self._socket):
                    raise FileNotFoundError
                loaded = nfloaded.fingerprint(self._socket)
                rules = nfmessages.rule_counts(self._socket, INET)
                seen = Seen(self._witness(), nfloaded.dispatched(self._socket), rules)
                held = await asyncio.to_thread(self._readable)
        wanted = {
            "schema": f"0x{self._program.schema:x}",
            "version": f"0x{self._program.version:x}",
        }
        told = {"schema": _hex(loaded.schema), "version": _hex(loaded.version)}
        found = nft_intact.differences(self._program, loaded, seen)
        return Examined(held, told, wanted, tuple(found))

    def _readable(self) -> Elements:
        found: Elements = {}
        for name in elements.SETS:
            with contextlib.suppress(FileNotFoundError):
                found |= nfmessages.read_elements(self._socket, [name])
        return found

    async def apply(self, delta: ElementDelta) -> None:
        """Apply a change in one transaction.  Raises ApplyFailed with the culprit element.

        Targets that changed frontends no longer point at go in a second one: a packet that has
        read the old mark on another processor would not find them, and be lost.
        """
        async with self._lock:
            if self._waiting is not None:
                kept = {k: v for k, v in self._waiting.items() if k not in delta.remove}
                self._waiting = kept | delta.add
            else:
                await self._apply(delta)

    async def _apply(self, delta: ElementDelta) -> None:
        missing = extras.needed(delta.add, self._layout).without(self._extras)
        if any(missing):
            await self._add(missing)
        if len(delta) <= _IN_LOOP:
            self._change(delta)
        else:
            await asyncio.to_thread(self._change, delta)
        if any(extras.needed(delta.remove, self._layout)[1:]):
            await self._relieve()

    async def _relieve(self) -> None:
        """Spare packets a hook that has nobody to guard any more, and limits that nobody has."""
        kept = nfloaded.still_needed(self._socket, self._layout)
        gone = self._extras.without(kept)._replace(sizes=frozenset())
        if any(gone):
            await self._extend(extras.removed(self._program, gone, kept))
            self._extras = self._extras.without(gone)

    def _change(self, delta: ElementDelta) -> None:
        now, orphans = nfchange.packed(delta)
        self._commit(now)
        if orphans:
            self._sweep(orphans)

    def _sweep(self, orphans: list[Chunk]) -> None:
        """Delete targets that nothing points at.  One that is gone already is as it should be."""
        try:
            self._socket.transact([chunk.message for chunk in orphans])
        except Refused as refused:
            if refused.errno != errno.ENOENT:
                raise nfchange.explained(refused, orphans) from None
            there = nfmessages.read_elements(self._socket, {chunk.name for chunk in orphans})
            for chunk in orphans:
                keys = [key for key in chunk.keys if (chunk.name, key) in there]
                self._commit(removals(chunk.name, keys))

    async def _add(self, missing: Extras) -> None:
        try:
            await self._extend(extras.added(self._program, missing, self._extras))
        except CommandFailed as error:
            raise ApplyFailed(f"this kernel refuses {missing}: {error}") from error
        self._extras |= missing

    async def _extend(self, text: str) -> None:
        """Load more of the program into what is there."""
        before = nfmessages.generation(self._socket)
        intact = nfloaded.fingerprint(self._socket).witness == self._witness()
        await self._nft(text)
        if intact:
            self._write_witness(before + 1)

    def _commit(self, chunks: list[Chunk]) -> None:
        try:
            self._socket.transact([chunk.message for chunk in chunks])
        except Refused as refused:
            raise nfchange.explained(refused, chunks) from None
        except TimeoutError as error:
            raise ApplyFailed(f"nftables: {error}") from None

    async def tampered(self, settle: float) -> Tampering:
        """See Driver.tampered.  What was done since `prepare` counts."""
        if self._watch is None:
            self._watch = Watch(ignored=self.port)
        while True:
            await self._watch.readable()
            found = self._foreign(self._watch)
            if found == []:
                continue
            await asyncio.sleep(settle)
            more = self._foreign(self._watch)
            if found is None or more is None:
                return Tampering("notifications were lost", "")
            theirs = [*found, *more]
            return Tampering(*nfwatch.summary(theirs), nfchange.touched(theirs))

    def _foreign(self, watch: Watch) -> list[Event] | None:
        """What others did to our tables since last asked; None if some of it was lost."""
        events = watch.read()
        if events is None:
            return None
        ours = [e for e in events if e.table == TABLE and e.family in (INET, BRIDGE)]
        theirs = [event for event in ours if event.port not in self._own]
        if not self._lock.locked():
            self._own.clear()
        return theirs

    async def surplus(self) -> dict[int, int]:
        """See Driver.surplus."""
        async with self._lock:
            with _reading():
                found = nfloaded.surplus(self._socket) if self._extras.limits else {}
        return {self._layout.id_of(mark): count for mark, count in found.items()}

    def problems(self) -> tuple[Problem, ...]:
        """See Driver.problems: a host that loaded the program can do all of it."""
        return ()

    async def remove(self) -> None:
        """Delete our tables, and nobody else's."""
        async with self._lock:
            self._waiting = None
            nfretire.remove(self._socket)

    def close(self) -> None:
        """Close the sockets; the kernel keeps forwarding."""
        self._socket.close()
        if self._watch is not None:
            self._watch.close()


def _hex(number: int | None) -> str | None:
    return None if number is None else f"{number:#x}"


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NotFound("table inet mesh is gone or damaged: prepare it again") from None
    except PermissionError:
        raise HostNotReady("nftables cannot be read: run as root, or with CAP_NET_ADMIN") from None
    except OSError as error:
        raise HostNotReady(f"nftables cannot be read: {error.strerror or error}") from None

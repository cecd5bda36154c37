"""Notices that somebody changed our chains of iptables or our ipsets, without starting a program.

Only tells; what a change means for the mesh is decided by who asks.  iptables-nft: the kernel says
which chain, and who.  iptables-legacy and ipset: it does not, so sizes are compared at each look,
and contents when a look says so or it is their turn.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.dataplane import nfwatch
from mesh.dataplane.nfmessages import TABLE
from mesh.dataplane.nfnetlink import (
    BRIDGE,
    Message,
    Socket,
    attribute,
    attributes,
    generic,
    text,
)
from mesh.dataplane.nfwatch import Watch
from mesh.dataplane.xtlegacy import LegacyTables
from mesh.rules import ipsets
from mesh.rules.xtables import TABLES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mesh.dataplane.nfwatch import Event

_LIST_SETS: Final = 6 << 8 | 7
_PROTOCOL: Final = attribute(1, b"\6")
_HEADERS_ONLY: Final = attribute(6 | 0x4000, struct.pack(">I", 1 << 2))
_NAME, _DATA, _ENTRIES, _COUNT = 2, 7, 8, 24
"""Attributes of a set in the answer: name, description, entries, and in the description how many
entries it has (linux/ipset/ip_set.h)."""

_POLL_SECONDS: Final = 0.3
"""Between two looks: 60 microseconds each, with 30 sets."""

_COMPARE_SHARE, _POKED_SHARE, _CHECK_SHARE = 0.01, 0.1, 0.1
"""Of the time at most: comparing contents in turn, comparing them when the lock was taken, and
checking everything because something near us was changed."""

_LATEST_SECONDS: Final = 1.0
"""Such a check is not put off for longer; where it takes longer itself, half the time is spent."""

_ROUTINE_SECONDS: Final = 60.0
_ROUTINE_SHARE: Final = 0.01
"""Everything is checked as often as this anyway: contents are not compared across own changes."""

_PREFIX: Final = "MESH-"
_BUILT_IN: Final = frozenset({"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"})
_FAMILIES: Final = (2, 10)


class Suspicion(NamedTuple):
    """What somebody did, as far as it is known; `by` whom, or empty.

    `certain`: it is about what is ours.
    """

    what: str
    by: str
    certain: bool


class _Contents:
    """Something whose digest is taken now and then, as often as that is cheap."""

    def __init__(self, what: str, read: Callable[[], bytes], *, ours: bool) -> None:
        self._suspicion = Suspicion(what, "", certain=ours)
        self._read = read
        self._digest: bytes | None = None
        self._taken = 0.0
        self._cost = 0.0

    def is_due(self, now: float, *, poked: bool) -> bool:
        """Whether to `compare`; sooner, if somebody may have written or nothing is known."""
        share = _POKED_SHARE if poked or self._digest is None else _COMPARE_SHARE
        return now >= self._taken + self._cost / share

    def compare(self) -> Suspicion | None:
        """Whether it differs from when last compared, unless forgotten since."""
        began, before = time.monotonic(), self._digest
        self._digest = self._read()
        self._taken = time.monotonic()
        self._cost = self._taken - began
        return self._suspicion if before not in (None, self._digest) else None

    def is_known(self) -> bool:
        """Whether the next comparison would tell of a change."""
        return self._digest is not None

    def forget(self) -> None:
        """Take what there is by the next comparison as known."""
        self._digest = None


@dataclass(slots=True)
class _Checks:
    """When everything was checked, and the seconds that took."""

    at: float
    cost: float = 0.0

    @property
    def next(self) -> float:
        """When a vague suspicion is followed at the earliest."""
        return self.at + min(max(_LATEST_SECONDS, self.cost), self.cost / _CHECK_SHARE)

    @property
    def routine(self) -> float:
        """When everything is checked without any."""
        return self.at + max(_ROUTINE_SECONDS, self.cost / _ROUTINE_SHARE)


class XtablesWatch:
    """Looks at the network namespace it was made in.  `close` releases its sockets.

    Changes made by processes that were told to `own` are not told of, on iptables-nft.
    """

    def __init__(self, flavour: str) -> None:
        self._socket = Socket()
        self._rules = Watch()
        self._tables = None if flavour == "nft" else LegacyTables(TABLES)
        self._own: set[int] = set()
        self._kept: Suspicion | None = None
        self._counts = self._count()
        self._sizes = self._tables.sizes() if self._tables is not None else ()
        self._contents = [_Contents("ipset", self._read_sets, ours=True)]
        if self._tables is not None:
            read = self._tables.contents
            self._contents.append(_Contents("iptables-legacy", read, ours=False))
        self._checks = _Checks(time.monotonic())

    async def suspicion(self, busy: asyncio.Lock) -> Suspicion:
        """Wait until there is reason to check everything.  While `busy` is held nothing is looked
        at, and it is held while contents are compared.
        """
        poked = False
        found: Suspicion | None = None
        while True:
            await self._wait()
            if busy.locked():
                await asyncio.sleep(_POLL_SECONDS)
                continue
            now, checks = time.monotonic(), self._checks
            found = self.look() or found
            poked = self._is_poked() or poked
            due = [each for each in self._contents if each.is_due(now, poked=poked)]
            for each in due:
                async with busy:
                    found = await asyncio.to_thread(each.compare) or found
            poked = poked and len(due) < len(self._contents)
            if found is None and now >= checks.routine:
                return Suspicion("a routine check", "", certain=False)
            if found is not None and (found.certain or now >= checks.next):
                return found

    async def _wait(self) -> None:
        """Until the kernel tells of something, or it is time for the next look."""
        try:
            async with asyncio.timeout(_POLL_SECONDS):
                await self._rules.readable()
        except TimeoutError:
            pass

    def checked(self, seconds: float) -> None:
        """Everything was checked just now, which took so long."""
        self._checks = _Checks(time.monotonic(), seconds)

    def own(self, process: int) -> None:
        """A process that works for us."""
        self._own.add(process)

    def look(self) -> Suspicion | None:
        """What can be seen in microseconds; the same thing is not told twice."""
        found = self._kept or self._heard()
        self._kept = None
        counts, sizes = self._count(), self._tables.sizes() if self._tables is not None else ()
        if found is not None and found.certain:
            pass
        elif counts != self._counts:
            names = sorted(name for name, _ in set(counts.items()) ^ set(self._counts.items()))
            found = Suspicion(f"ipset {names[0]}", "", certain=True)
        elif sizes != self._sizes:
            found = Suspicion("iptables-legacy", "", certain=False)
        self._counts, self._sizes = counts, sizes
        return found

    def _is_poked(self) -> bool:
        """Whether a program of iptables-legacy may have written."""
        return self._tables is not None and self._tables.locked()

    def before_own(self) -> None:
        """Keep what is seen by now: `settle` must not take it for ours."""
        self._kept = self.look()

    def settle(self) -> None:
        """Take what there is now as known, but for what others were heard to do; contents when
        they are compared next.
        """
        self._kept = self._kept or self._heard()
        self._own.clear()
        self._counts = self._count()
        self._sizes = self._tables.sizes() if self._tables is not None else ()
        for each in self._contents:
            each.forget()

    def knows_contents(self) -> bool:
        """Whether an edit that leaves every size alone would be told of."""
        return all(each.is_known() for each in self._contents)

    def close(self) -> None:
        """Stop looking."""
        self._socket.close()
        self._rules.close()
        if self._tables is not None:
            self._tables.close()

    def _heard(self) -> Suspicion | None:
        """What the kernel told of nf_tables since last asked."""
        events = self._rules.read()
        if events is None:
            return Suspicion("notifications were lost", "", certain=False)
        near = _is_near if self._tables is None else _is_bridge
        theirs = [event for event in events if event.port not in self._own and near(event)]
        if not theirs:
            return None
        what, by = nfwatch.summary(theirs)
        return Suspicion(what, by, certain=any(_is_ours(event) for event in theirs))

    def _count(self) -> dict[str, bytes]:
        """How many entries each set of ours has, by its name."""
        message = Message(_LIST_SETS, 0, generic(0) + _PROTOCOL + _HEADERS_ONLY)
        found = {}
        for answer in self._socket.dump(message):
            parts = dict(attributes(answer, 4))
            name = parts.get(_NAME, b"").rstrip(b"\0").decode(errors="replace")
            if ipsets.is_ours(name):
                found[name] = dict(attributes(parts.get(_DATA, b""))).get(_COUNT, b"")
        return found

    def _read_sets(self) -> bytes:
        """A digest of our sets' entries."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self._counts):
            for entries in self._entries(name):
                digest.update(entries)
        return digest.digest()

    def _entries(self, name: str) -> Iterator[bytes]:
        yield name.encode()
        try:
            answers = self._socket.dump(
                Message(_LIST_SETS, 0, generic(0) + _PROTOCOL + text(_NAME, name))
            )
        except FileNotFoundError:
            return
        for answer in answers:
            yield dict(attributes(answer, 4)).get(_ENTRIES, b"")


def _is_near(event: Event) -> bool:
    """Whether it is about a chain of ours, or one that leads there."""
    if event.table not in TABLES or event.family not in _FAMILIES:
        return _is_bridge(event)
    return _is_ours(event) or event.name in _BUILT_IN


def _is_bridge(event: Event) -> bool:
    return (event.family, event.table) == (BRIDGE, TABLE)


def _is_ours(event: Event) -> bool:
    return event.name.startswith(_PREFIX) or event.kind == "del table" or _is_bridge(event)

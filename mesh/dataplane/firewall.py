"""Other people's firewalls: our flows pass where that is in our hands, else the operator is told.

An accept is final only within its own table, so a DROP policy of Docker or ufw takes what our
program forwards.  Owns what carries our comment in others' chains.  Never creates a table or a
chain, and looks again only when somebody changed something.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.dataplane import nfchains, xtfilter, xtlegacy
from mesh.dataplane.nfnetlink import Socket
from mesh.dataplane.nfwatch import Watch
from mesh.dataplane.xtlegacy import LegacyFilter
from mesh.errors import CommandFailed
from mesh.model.address import FAMILIES, Family
from mesh.model.report import Problem
from mesh.rules import needs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mesh.dataplane.nfchains import Hooked
    from mesh.rules.needs import Blocked, Need, Wanted

_XTABLES: Final = {"ip": Family.V4, "ip6": Family.V6}
_POLL_SECONDS: Final = 0.3
_REST: Final = 5
"""Between two looks at a table pass at least so many times what the last one cost."""

log = logging.getLogger(__name__)

Table = xtfilter.Table | nfchains.Table


class Mode(enum.Enum):
    """What may be done about chains that drop our flows.

    REPORT: nothing at all.  FORWARD: one line in FORWARD of iptables, as container engines do.
    OPEN: lines wherever they are needed, in INPUT and in tables of nft too.
    """

    REPORT = "report"
    FORWARD = "forward"
    OPEN = "open"


class _Look(NamedTuple):
    """One look at a table: how many lines of ours each chain had before and has now, and which
    wishes are dropped now.
    """

    before: Mapping[str, int]
    ours: Mapping[str, int]
    blocked: tuple[Blocked, ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    """The last look at a table.  `rested` is when the next is due (event loop's clock)."""

    look: _Look
    wishes: tuple[Need, ...]
    rested: float


class Firewall:
    """Keeps our lines in place, and knows what is dropped all the same.

    `ignored` is the port id of the socket whose changes are ours; `own` the flavour of iptables
    that drives our rules, which accept what is forwarded by themselves there.
    """

    def __init__(self, ignored: int, own: str = "", mode: Mode = Mode.FORWARD) -> None:
        self._own = own
        self._mode = mode
        self._socket = Socket()
        self._watch = Watch(ignored=ignored)
        self._legacy = LegacyFilter()
        self._hooked: list[Hooked] | None = None
        self._seen: dict[Table, _Seen] = {}
        self._touched: dict[Table, str] = {}
        self._unread: set[Table] = set()
        self._mixed: set[Table] = set()
        self._lost: list[tuple[str, str]] = []
        self.blocked: tuple[Blocked, ...] = ()
        """What the last pass found dropped for certain."""
        self.failed: tuple[Problem, ...] = ()
        """What it could not read or write."""
        self.is_settled = False
        """Whether the last pass left nothing to look at; if not, `wait` is short."""

    async def wait(self, seconds: float) -> None:
        """Until somebody changed a table of nf_tables, but no longer; or until it is time to look
        at those of iptables-legacy, which the kernel does not tell of.
        """
        soon = self._legacy.is_used() or not self.is_settled
        try:
            async with asyncio.timeout(_POLL_SECONDS if soon else seconds):
                await self._watch.readable()
        except TimeoutError:
            pass

    async def sync(self, wanted: Wanted) -> tuple[Problem, ...]:
        """One pass over the tables in use; what is dropped there, and what could not be done."""
        self._listen()
        wishes = needs.of(wanted)
        problems: list[Problem] = []
        found: list[Blocked] = []
        tables = self._tables()
        self._seen = {table: seen for table, seen in self._seen.items() if table in tables}
        self._touched = {table: by for table, by in self._touched.items() if table in tables}
        mixed = len(self._mixed)
        for table in tables:
            try:
                found += await self._look(table, wishes)
            except xtfilter.Mixed:
                self._mixed.add(table)  # the next pass reads it as any table of nft
            except CommandFailed as error:
                self._seen.pop(table, None)
                problems += self._failed(table, error)
        self.is_settled = not self._touched and len(self._mixed) == mixed
        self.blocked, self.failed = tuple(found), tuple(problems)
        return (*problems, *needs.problems(found))

    def replaced(self) -> list[tuple[str, str]]:
        """Lines of ours that had been removed and are back, since last asked: where, by whom."""
        found, self._lost = self._lost, []
        return found

    async def remove(self) -> None:
        """Take our lines out of every table.  Raises CommandFailed."""
        for table in self._tables():
            try:
                await (await table.read()).write({})
            except CommandFailed as error:
                if isinstance(table, xtfilter.Table):
                    raise
                log.warning("firewall table=%r cannot be read: %s", table.name, error)

    def close(self) -> None:
        """Release the sockets."""
        self._socket.close()
        self._watch.close()
        self._legacy.close()

    # ---- which tables there are, and which were touched

    def _listen(self) -> None:
        """Note which tables were touched since the last pass, and by whom."""
        events = self._watch.read()
        if events is None:
            self._hooked = None
            self._touched |= dict.fromkeys(self._seen, "")
        for event in events or ():
            family = nfchains.FAMILIES.get(event.family)
            if family is None or event.kind.endswith(("element", "set", "commit")):
                continue
            if event.hooked or event.kind in ("del chain", "del table"):
                self._hooked = None
            self._touched[nfchains.Table(family, event.table)] = event.by
            if event.table == "filter" and family in _XTABLES:
                of_iptables = xtfilter.Table("nft", _XTABLES[family])
                self._touched[of_iptables] = event.by
                self._mixed.discard(of_iptables)
        if self._legacy.changed():
            self._touched |= {xtfilter.Table("legacy", family): "" for family in FAMILIES}

    def _tables(self) -> set[Table]:
        """The tables in use.

        Looks only: to ask iptables-legacy for a table would create it.
        """
        if self._hooked is None:
            self._hooked = nfchains.foreign(self._socket)
        native: dict[tuple[str, str], list[Hooked]] = {}
        found: set[Table] = set()
        for hooked in self._hooked:
            table = _of_iptables(hooked)
            if table is not None and table not in self._mixed:
                found.add(table)
            else:
                native.setdefault((hooked.family, hooked.table), []).append(hooked)
        for (family, name), chains in native.items():
            found.add(nfchains.Table(family, name, tuple(chains)))
        for each in FAMILIES:
            legacy = xtfilter.Table("legacy", each)
            if "filter" in xtlegacy.names(each) and legacy.is_served():
                found.add(legacy)
        return found

    # ---- one table

    async def _look(self, table: Table, wishes: tuple[Need, ...]) -> tuple[Blocked, ...]:
        """What a table drops of our wishes, once our lines are in place."""
        clock, seen = asyncio.get_running_loop().time, self._seen.get(table)
        if seen is not None:
            same = seen.wishes == wishes and table not in self._touched
            if same or clock() < seen.rested:
                return seen.look.blocked
        by, began = self._touched.pop(table, ""), clock()
        look = await self._pass(table, wishes)
        self._unread.discard(table)
        if seen is not None:
            for chain, count in seen.look.ours.items():
                if look.before[chain] < count <= look.ours[chain]:
                    self._lost.append((f"{table.name} {chain}", by))
        self._seen[table] = _Seen(look, wishes, clock() + _REST * (clock() - began))
        return look.blocked

    async def _pass(self, table: Table, wishes: tuple[Need, ...]) -> _Look:
        saved = await table.read()
        chains = [place.chain for _, place in table.places()]
        before = {chain: saved.count(chain) for chain in chains}
        writes = self._mode is not Mode.REPORT
        if writes and await saved.write(self._needed(table, saved, wishes)):
            log.warning("firewall table=%r our lines are in place", table.name)
            saved = await table.read()
        found: list[Blocked] = []
        for hook, place in table.places():
            found += needs.blocked(place, saved.chains, hook, wishes)
        ours = {chain: saved.count(chain) for chain in chains}
        return _Look(before, ours, tuple(found))

    def _needed(
        self, table: Table, saved: Saved, wishes: tuple[Need, ...]
    ) -> dict[str, tuple[Need, ...]]:
        """Which lines of ours each chain of a table is to have.

        In FORWARD of iptables before anything that may drop: what is dropped for certain is not
        enough, for others' lines come and go.
        """
        found: dict[str, tuple[Need, ...]] = {}
        flavour = table.flavour if isinstance(table, xtfilter.Table) else None
        for hook, place in table.places():
            if flavour is not None and hook == needs.FORWARD:
                if flavour != self._own and saved.may_drop(place.chain):
                    found[place.chain] = tuple(need for need in wishes if need.hook == hook)
            elif self._mode is Mode.OPEN:
                blocked = needs.blocked(place, saved.foreign, hook, wishes)
                found[place.chain] = tuple(each.need for each in blocked)
        return found

    def _failed(self, table: Table, error: CommandFailed) -> Iterable[Problem]:
        """A table of nft that cannot be read is not accused, but logged."""
        if isinstance(table, xtfilter.Table):
            return (Problem(about=f"firewall {table.name}", message=str(error)),)
        if table not in self._unread:
            self._unread.add(table)
            log.warning("firewall table=%r cannot be read: %s", table.name, error)
        return ()


Saved = xtfilter.Saved | nfchains.Listed


def _of_iptables(hooked: Hooked) -> xtfilter.Table | None:
    """The table of iptables-nft that a chain belongs to, if it is there and can be edited."""
    family = _XTABLES.get(hooked.family)
    if family is None or hooked.table != "filter" or hooked.name != xtfilter.CHAINS[hooked.hook]:
        return None
    table = xtfilter.Table("nft", family)
    return table if table.is_served() else None

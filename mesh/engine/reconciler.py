"""Keeps the rule backend in line with what the services come to.

Owns the ledger and the ids; the driver does the writing.  Never decides what a service means, and
never writes before `start` was given the first complete picture.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from mesh.delta import Delta
from mesh.engine import backoff
from mesh.engine.desired import Touched
from mesh.engine.healing import Repair
from mesh.errors import ApplyFailed
from mesh.model.publish import Protocol
from mesh.model.report import Problem
from mesh.rules import elements, guards, nft, stale
from mesh.rules.guards import Numbers
from mesh.rules.ids import Ids
from mesh.rules.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from mesh.dataplane.protocol import Driver, ElementDelta
    from mesh.engine.desired import Desired
    from mesh.rules.elements import ElementKey, Elements
    from mesh.rules.marks import Layout

    Told = Callable[[ElementDelta], None]

log = logging.getLogger(__name__)

_NODES = "/nodes"
"""The owner of what describes the nodes; no service can have a name with a slash."""

_POLICIES = "/policies"
"""The owner of what policies come to."""

_OTHERS = (_NODES, _POLICIES)
"""The owners that are no services, as Touched has them."""


class Reconciler:
    """One node's rules: planned, lowered and applied, one service at a time.

    `written` is told every change that the kernel has taken, `refused` those that it has not.
    """

    def __init__(
        self,
        desired: Desired,
        driver: Driver,
        written: Told,
        layout: Layout,
        refused: Told = lambda _: None,
    ) -> None:
        self._desired = desired
        self._driver = driver
        self._written = written
        self._refused = refused
        self._ids = Ids(layout)
        self._numbers = Numbers()
        self._ledger = Ledger()
        self._looked_at: tuple[str, dict[int, Elements]] = ("", {})
        self._pools: dict[str, tuple[str, ...]] = {}
        self._failed: dict[str, Problem] = {}
        self._tries: dict[str, int] = {}
        self._staged = False
        self._repaired = Repair()
        self._writing = asyncio.Lock()

    async def start(self, before: Elements) -> int:
        """Take over what the kernel holds: same ids, and only the difference is written, which is
        as many elements as is returned.

        `before` is what another backend holds, whose flows go on with the ids they have.

        In chunks of whole services, so that ten thousand of them are neither one transaction nor
        in memory at once; what nobody wants any more goes last.  Only then do packets meet it, if
        they did not before: nobody is refused for a service that is yet to come.
        """
        actual = await self._driver.read()
        names = sorted(self._desired.services())
        known = before | actual
        if known:
            for name in names:
                nft.adopt(self._desired.forwardings(name), known, self._ids)
            guards.adopt(self._desired.guards(), known, self._numbers)
        log.info("adopting services=%d elements=%d", len(names), len(actual))
        try:
            written = await self._take_over(actual, names)
        except ApplyFailed as error:
            log.warning("apply failed, reading the kernel back: %s", error)
            await self.heal()
            written = self._repaired.elements
        else:
            log.info("adopted written=%d removed=%d", written, len(actual))
        await self._driver.attach()
        return written + len(actual)

    async def _take_over(self, actual: Elements, names: list[str]) -> int:
        """Write what is missing in `actual`, and remove what is left there.

        While the kernel takes in a chunk the next one is planned.
        """
        delta, step = self._missing(actual, (), rest=True), self._driver.chunk
        written, writing = len(delta.add), asyncio.create_task(self._write(delta))
        try:
            for first in range(0, len(names), step):
                await asyncio.sleep(0)  # so that it is under way
                delta = self._missing(actual, names[first : first + step], rest=False)
                await writing
                written += len(delta.add)
                writing = asyncio.create_task(self._write(delta))
            await writing
        finally:
            writing.cancel()
        self._staged = True
        if actual:
            await self._write(Delta(actual, {}))
        return written

    def _missing(self, actual: Elements, names: Iterable[str], *, rest: bool) -> ElementDelta:
        """Stage some services, or the rest: what of them is not in `actual`.  Takes it out of
        there.
        """
        staged = self._stage(Touched(frozenset(names), rest, rest)).add
        if not actual:
            return Delta({}, staged)
        missing = {key: value for key, value in staged.items() if actual.get(key) != value}
        changed = {key: actual[key] for key in missing if key in actual}
        for key in staged:
            actual.pop(key, None)
        return Delta(changed, missing)

    async def heal(self) -> None:
        """Bring the kernel back from what somebody else did.

        Also where `start` ended half-way: what it did not come to is not yet known to be wanted.
        """
        async with self._writing:
            if not self._staged:
                self._stage(Touched(frozenset(self._desired.services()), True, True))
                self._staged = True
            await self._resync(Delta())

    async def repair(self, keys: Collection[ElementKey]) -> None:
        """The same, where somebody is known to have touched these elements and nothing else: it
        costs the same with ten services and ten thousand.
        """
        async with self._writing:
            actual = await self._driver.read_some(keys)
            wishes = {key: self._wanted(key) for key in keys}
            desired = {key: data for key, data in wishes.items() if data is not None}
            delta = Delta.between(actual, desired)
            if delta:
                await self._apply(delta)
                self._repaired |= Repair(elements=len(delta))

    def _wanted(self, key: ElementKey) -> bytes | None:
        owner: str | None = _POLICIES if key[0] in elements.POLICIES else _NODES
        if elements.SETS[key[0]].key[0] is elements.MARK:
            pool = self._ids.key(self._ids.layout.id_of(elements.mark_of(key[1][:4])))
            owner = pool.partition("/")[0] if pool is not None else None
        return self._ledger.wanted(key, owner)

    def repaired(self) -> Repair:
        """What was put right since last asked, by `heal` or by a change that met damage."""
        found, self._repaired = self._repaired, Repair()
        return found

    async def reconcile(self, touched: Touched) -> None:
        """Plan the touched services again and write what differs."""
        async with self._writing:
            delta = self._stage(touched)
            if self._is_refused(touched):  # what it has in the kernel is not what the ledger says
                await self._resync(delta)
            elif delta:
                await self._apply(delta)

    @property
    def refused(self) -> Mapping[str, int]:
        """Whom the kernel refused, and how often in a row."""
        return {owner: self._tries[owner] for owner in self._failed}

    async def retry(self, owner: str) -> None:
        """Try once more to let in somebody whom the kernel refused.

        It costs what that one has, however many others there are.
        """
        async with self._writing:
            if owner not in self._failed:
                return
            held = self._ledger.held_by(owner)
            delta = Delta.between(await self._driver.read_some(held), held)
            try:
                if delta:
                    await self._write(delta)
            except ApplyFailed as error:
                self._refused(delta)
                self._refuse(owner, error)
            else:
                log.info("let in owner=%s tries=%d", owner, self._tries.pop(owner))
                del self._failed[owner]

    def held(self, number: int) -> Elements:
        """The elements that have a frontend id; for mesh.rules.stale.

        Those of the last service are kept at hand: it may have a thousand ids.
        """
        key = self._ids.key(number)
        if key is None:
            return {}
        owner = key.partition("/")[0]
        if self._looked_at[0] != owner:
            self._looked_at = owner, stale.by_id(self._ledger.held_by(owner), self._ids.layout)
        return self._looked_at[1].get(number, {})

    def held_udp(self, number: int) -> Elements:
        """The same, of pools that serve UDP only: spares a look at all others."""
        key = self._ids.key(number)
        if key is None or key.split("/")[2] != Protocol.UDP.value:
            return {}
        return self.held(number)

    def pool(self, number: int) -> str | None:
        """The key of the pool that has a frontend id."""
        return self._ids.key(number)

    def frontends(self) -> Callable[[], Iterator[tuple[ElementKey, str]]]:
        """Every frontend, and whose it is: read later, in another thread."""
        return self._ledger.frontends()

    def installed(self) -> int:
        """How many elements the kernel has been given."""
        return self._ledger.size - sum(len(self._ledger.held_by(owner)) for owner in self._failed)

    def problems(self) -> Iterable[Problem]:
        """What could not be installed, and why."""
        yield from self._failed.values()
        for owner, key, winner in self._ledger.refused():
            shown = elements.describe(key)
            yield Problem(about=f"service {owner}", message=f"{shown} belongs to {winner}")

    def _stage(self, touched: Touched) -> ElementDelta:
        self._looked_at = ("", {})
        wanted = {name: self._lower(name) for name in sorted(touched.services)}
        if touched.policies:
            wanted[_POLICIES] = guards.lower(self._desired.guards(), self._numbers)
        if touched.nodes:
            wanted[_NODES] = self._desired.lower_nodes(self._ids.layout)
        return self._ledger.stage(wanted)

    def _lower(self, name: str) -> Elements:
        found, pools = self._desired.lower(name, self._ids)
        before = self._pools.get(name, ())
        if pools != before:
            for key in set(before).difference(pools):
                self._ids.release(key)
            self._pools.pop(name, None)
            if pools:
                self._pools[name] = pools
        return found

    async def _apply(self, delta: ElementDelta) -> None:
        try:
            await self._write(delta)
        except ApplyFailed as error:
            self._refused(delta)
            log.warning("apply failed, reading the kernel back: %s", error)
            await self._resync(delta)

    def _is_refused(self, touched: Touched) -> bool:
        owners = touched.services
        owners |= {owner for owner, is_ in zip(_OTHERS, touched[1:], strict=True) if is_}
        return not self._failed.keys().isdisjoint(owners)

    async def _write(self, delta: ElementDelta) -> None:
        if delta:
            await self._driver.apply(delta)
            self._written(delta)

    async def _resync(self, own: ElementDelta) -> None:
        """Mend the program, bring the kernel in line from what it really holds; single out who
        cannot be served.  What differs beyond `own` was somebody else.
        """
        self._failed.clear()
        program = await self._driver.prepare()
        desired = self._ledger.elements()
        delta = Delta.between(await self._driver.read(), desired)
        try:
            if delta:
                await self._driver.apply(delta)
        except ApplyFailed:
            await self._apply_each()
        self._tries = dict(self.refused)
        await self._driver.attach()
        self._written(delta)
        damaged = (delta.remove.keys() | delta.add.keys()) - own.add.keys() - own.remove.keys()
        for owner in self._failed:
            damaged -= self._ledger.held_by(owner).keys()
        self._repaired |= Repair(elements=len(damaged), program=program)

    async def _apply_each(self) -> None:
        """One owner at a time, so that a record the kernel refuses disturbs nobody else."""
        actual = await self._driver.read()
        await self._driver.apply(Delta(_without(actual, self._ledger.elements()), {}))
        for owner in (*_OTHERS, *sorted(self._desired.services())):
            held = self._ledger.held_by(owner)
            missing = _without(held, actual)
            try:
                await self._driver.apply(Delta({}, missing))
            except ApplyFailed as error:
                self._refused(Delta({}, missing))
                self._refuse(owner, error)

    def _refuse(self, owner: str, error: ApplyFailed) -> None:
        tries = self._tries[owner] = self._tries.get(owner, 0) + 1
        log.error("refused owner=%s tries=%d error=%s", owner, tries, error)
        message = backoff.told(str(error), tries)
        self._failed[owner] = Problem(about=_about(owner), message=message)


def _about(owner: str) -> str:
    return {_NODES: "nodes", _POLICIES: "policies"}.get(owner, f"service {owner}")


def _without(actual: Elements, desired: Elements) -> Elements:
    return {key: value for key, value in actual.items() if desired.get(key) != value}

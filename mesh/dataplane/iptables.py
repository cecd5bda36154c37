"""The iptables driver: static chains, pools as chains, frontends as ipsets.

Owns the chains called MESH-… of one flavour (legacy or nft), the sets called mesh-… and the table
`bridge mesh` in the network namespace it was made in, and touches nothing else.  Never decides
what should be forwarded.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from mesh.dataplane import command, nfmessages, xtprograms
from mesh.dataplane.nfnetlink import BRIDGE, Socket
from mesh.dataplane.protocol import Examined, Tampering
from mesh.dataplane.xtprograms import PROGRAMS, Programs
from mesh.dataplane.xtwatch import XtablesWatch
from mesh.delta import Delta
from mesh.errors import ApplyFailed, CommandFailed, HostNotReady, NotFound
from mesh.model.address import FAMILIES, Family
from mesh.model.report import Problem
from mesh.rules import ipsets, program, xtables, xtables_intact, xtables_limits
from mesh.rules.xtables_image import Image

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Iterator, Mapping

    from mesh.dataplane.protocol import ElementDelta
    from mesh.dataplane.xtprograms import Flavour
    from mesh.rules.elements import ElementKey, Elements
    from mesh.rules.marks import Layout
    from mesh.rules.program import Parameters
    from mesh.rules.xtables import Chains, Rules, Saved
    from mesh.rules.xtables_image import Stage, Step

T = TypeVar("T")

_log = logging.getLogger(__name__)

_NO_BRIDGE: Final = (
    "replicas on this node cannot reach each other through a service: nft is needed for it"
)


class _Found(NamedTuple):
    """What the host has, as far as it is ours."""

    tables: Mapping[Family, Mapping[str, Saved]]
    sets: set[str]
    image: Image


class IptablesDriver:
    """Drives one flavour of iptables for one node.  `prepare` is also how damage is healed."""

    port = 0  # its changes are made by other programs
    chunk = 5000  # every transaction writes a table again

    def __init__(self, parameters: Parameters, flavour: Flavour) -> None:
        self.name = f"iptables-{flavour}"
        self._programs = Programs(flavour, self._own)
        self._layout = parameters.layout
        self._owner = parameters.owner
        self._program = {family: xtables.program(parameters, family) for family in FAMILIES}
        self._version = {f: xtables.version(tables) for f, tables in self._program.items()}
        self._bridge = program.build(parameters).bridge
        self._image: Image | None = None
        self._attached = True
        self._problems: tuple[Problem, ...] = ()
        self._lock = asyncio.Lock()
        self._watch: XtablesWatch | None = None

    def problems(self) -> tuple[Problem, ...]:
        """What this host cannot do."""
        return self._problems

    async def prepare(self) -> bool:
        """Load the static chains and sets, or adopt those that are loaded.  Raises CommandFailed.

        The same ones, untouched by anybody: left alone.  Another version, or damaged ones: each
        table is written at once, and the pools that can still be read stay.  None: loaded, and
        `attach` has yet to lead packets there.
        """
        async with self._lock:
            began = time.monotonic()
            watch = self._watch = self._watch or _watch(self._programs.flavour)
            watch.look()  # what was done up to now is read below
            await xtprograms.ipset(ipsets.program())
            found = await self._find()
            self._attached = self._is_hooked(found)
            stale = [family for family in FAMILIES if not self._is_intact(family, found)]
            await _together(self._load(family, found) for family in stale)
            if not stale and self._attached:
                await _together(self._hook(f, found.tables[f]) for f in FAMILIES)
            had_bridge = _has_bridge()
            await self._load_bridge()
            await xtprograms.destroy(sorted(ipsets.lists(found.sets) - found.image.lists()))
            self._image = found.image
            self._settle()
            watch.checked(time.monotonic() - began)
            how = "loaded" if stale else "adopted"
            _log.info("iptables flavour=%s program=%s", self._programs.flavour, how)
            return bool(stale) or not (had_bridge or self._problems)

    async def attach(self) -> None:
        """Jump to our chains from the hooks: mangle, which gives flows their marks, last.

        Raises CommandFailed.
        """
        async with self._lock:
            if not self._attached:
                await _together(self._hook(family, {}) for family in FAMILIES)
                self._attached = True
                self._settle()
                _log.info("iptables flavour=%s program=attached", self._programs.flavour)

    async def tampered(self, settle: float) -> Tampering:
        """See Driver.tampered; also told now and then without a reason."""
        self._watch = self._watch or _watch(self._programs.flavour)
        found = await self._watch.suspicion(self._lock)
        await asyncio.sleep(settle)
        return Tampering(found.what, found.by)

    def knows_contents(self) -> bool:
        """Whether `tampered` has looked at all there is since the last change of our own.

        What is edited in place before that is noticed by a routine check.
        """
        return self._watch is not None and self._watch.knows_contents()

    async def read(self) -> Elements:
        """Every element the host holds.  Raises NotFound if chains or sets are gone or damaged."""
        async with self._lock:
            found = await self._find()
            if not all(self._is_intact(family, found) for family in FAMILIES):
                raise NotFound("chains or sets of the mesh are gone or damaged: prepare them again")
            self._image = found.image
            return await asyncio.to_thread(found.image.elements)

    async def read_some(self, keys: Iterable[ElementKey]) -> Elements:
        """See Driver.read_some; reads everything."""
        there = await self.read()
        return {key: there[key] for key in keys if key in there}

    async def examine(self) -> Examined:
        """See Driver.examine.  Raises CommandFailed where a program is missing or not allowed."""
        async with self._lock:
            found = await self._find()
        if not any(self._has_chains(family, found.tables[family]) for family in FAMILIES):
            raise NotFound(f"there are no chains of the mesh in {self.name}: prepare them")
        held = await asyncio.to_thread(found.image.elements)
        differences = [*xtables_intact.missing_sets(found.sets)]
        for family in FAMILIES:
            differences += self._differences(family, found)
            program, static = self._programs.name(family), self._program[family]
            differences += xtables_intact.displaced(program, static, found.tables[family])
        return Examined(
            held,
            {PROGRAMS[f]: xtables_intact.loaded(found.tables[f]) for f in FAMILIES},
            {PROGRAMS[f]: self._version[f] for f in FAMILIES},
            (*differences, *_bridge_gone()),
        )

    def _has_chains(self, family: Family, tables: Mapping[str, Saved]) -> bool:
        """Whether anything of ours is in the tables of a family."""
        return any(
            xtables.ours(table, static, tables.get(table, _EMPTY))
            for table, static in self._program[family].items()
        )

    async def apply(self, delta: ElementDelta) -> None:
        """Apply a change; if a step of it fails, those before are undone.  Raises ApplyFailed."""
        async with self._lock:
            image = self._image
            if image is None:
                raise NotFound("the chains of the mesh do not exist: prepare them")
            image.check(delta)
            change = image.effective(delta)
            if not change:
                return
            plan = await asyncio.to_thread(image.plan, change)
            self._expect()
            try:
                await self._run(plan.stages)
                await xtprograms.destroy(plan.unused)
            except CommandFailed as error:
                image.update(Delta(change.add, change.remove))
                raise _explained(error) from error
            finally:
                self._settle()

    async def _run(self, stages: list[Stage]) -> None:
        done: list[Stage] = []
        for stage in stages:
            results = await asyncio.gather(*map(self._do, stage), return_exceptions=True)
            done.append(stage)  # also what failed: of several tables or entries, some are written
            for result in results:
                if result is not None:
                    await self._undo(done)
                    raise result

    async def _do(self, step: Step) -> None:
        if step.family is not None:
            await self._programs.restore(step.family, step.text)
        else:
            await xtprograms.ipset([step.text])

    async def _undo(self, done: list[Stage]) -> None:
        """Take steps back, last first.  What cannot be is found by the next read."""
        for stage in reversed(done):
            for step in stage:
                try:
                    await self._do(step._replace(text=step.undo))
                except CommandFailed as error:
                    _log.warning("iptables undo was not complete: %s", error)

    async def surplus(self) -> dict[int, int]:
        """See Driver.surplus."""
        if self._image is None or not self._image.has_limits:
            return {}
        found: Counter[int] = Counter()
        for family in FAMILIES:
            saved = await self._programs.save(family, "-c", "-t", "mangle")
            found.update(xtables_limits.surplus(saved))
        return dict(found)

    async def exists(self) -> bool:
        """Whether there is any chain of ours; creates the tables it looks at."""
        return ":MESH-" in await self._programs.save(Family.V4)

    async def layout(self) -> Layout | None:
        """How the chains that are there keep marks; None if that cannot be told."""
        return xtables_intact.layout(xtables.parse(await self._programs.save(Family.V4)))

    async def remove(self) -> None:
        """Delete our chains, sets and bridge table, and nobody else's.

        What another backend of the mesh uses as well stays.
        """
        await self.remove_chains()
        async with self._lock:
            if await xtprograms.destroy(ipsets.by_use(await xtprograms.our_sets())):
                await xtprograms.unload_bridge()

    async def remove_chains(self) -> None:
        """Delete our chains alone: the other flavour has the same sets."""
        async with self._lock:
            self._image = None
            found = await self._find()
            await _together(self._unload(family, found) for family in FAMILIES)

    def close(self) -> None:
        """Stop looking; the kernel keeps forwarding."""
        if self._watch is not None:
            self._watch.close()

    def _expect(self) -> None:
        """What is seen by now was done by somebody else."""
        if self._watch is not None:
            self._watch.before_own()

    def _settle(self) -> None:
        """What was just written is our own."""
        if self._watch is not None:
            self._watch.settle()

    async def _find(self) -> _Found:
        """What there is.  Each flavour sees only its own tables; sets serve both."""
        texts = await _together(map(self._programs.save, FAMILIES))
        entries = await command.run("ipset", "save")
        return await asyncio.to_thread(_parsed, texts, entries, self._layout)

    def _is_intact(self, family: Family, found: _Found) -> bool:
        """Whether the chains of a family are as we left them."""
        return ipsets.is_whole(found.sets) and not any(self._differences(family, found))

    def _differences(self, family: Family, found: _Found) -> Iterator[Problem]:
        where, saved = self._programs.name(family), found.tables[family]
        static = self._whole(family)
        if self._attached:
            yield from xtables_intact.unhooked(where, static.tables, saved)
        dynamic = found.image.chains(family)
        yield from xtables_intact.differences(where, static, saved, dynamic)

    def _is_hooked(self, found: _Found) -> bool:
        """Whether packets get to any of our chains."""
        return any(
            xtables.hooked(static, found.tables[family].get(table, _EMPTY))
            for family, tables in self._program.items()
            for table, static in tables.items()
        )

    def _whole(self, family: Family) -> xtables_intact.Program:
        version, tables = self._version[family], self._program[family]
        return xtables_intact.Program(version, tables, self._layout, self._owner)

    async def _load(self, family: Family, found: _Found) -> None:
        """Write every chain of ours, then what they look like to iptables-save."""
        tables = found.tables[family]
        dynamic = found.image.chains(family)
        text = ""
        for table, static in self._program[family].items():
            saved = tables.get(table, _EMPTY)
            wanted = static.chains | dynamic.get(table, {})
            gone: dict[str, Rules] = dict.fromkeys(xtables.ours(table, static, saved), ())
            hooks = xtables.hook_commands(static, saved) if self._attached else ()
            text += xtables.restore(table, Delta(gone, {xtables.CANARY: (), **wanted}), hooks)
        await self._programs.restore(family, text)
        written = xtables.parse(await self._programs.save(family))
        text = ""
        for table, static in self._program[family].items():
            told = xtables_intact.told(self._whole(family), static, written[table])
            rules: Chains = {xtables.CANARY: (f"-m comment --comment {told}",)}
            text += xtables.restore(table, Delta({}, rules))
        await self._programs.restore(family, text)

    async def _hook(self, family: Family, saved: Mapping[str, Saved]) -> None:
        """Be the first in each hook of the saved tables."""
        text = ""
        for table, static in self._program[family].items():
            hooks = xtables.hook_commands(static, saved.get(table, _EMPTY))
            text += xtables.restore(table, Delta(), hooks)
        await self._programs.restore(family, text)

    async def _unload(self, family: Family, found: _Found) -> None:
        text = ""
        for table, static in self._program[family].items():
            saved = found.tables[family].get(table, _EMPTY)
            gone: dict[str, Rules] = dict.fromkeys(xtables.ours(table, static, saved), ())
            hooks = xtables.unhook_commands(static, saved)
            text += xtables.restore(table, Delta(gone, {}), hooks)
        await self._programs.restore(family, text)

    async def _load_bridge(self) -> None:
        """Replies between replicas on one bridge pass through the node; iptables cannot do it."""
        try:
            await command.run("nft", "-f", "-", input=self._bridge, started=self._own)
        except CommandFailed as error:
            _log.warning("iptables table=bridge error=%r", str(error))
            self._problems = (Problem(about="iptables", message=f"{_NO_BRIDGE} ({error})"),)
        else:
            self._problems = ()

    def _own(self, process: int) -> None:
        if self._watch is not None:
            self._watch.own(process)


_EMPTY: Final = xtables.Saved({})


def _watch(flavour: Flavour) -> XtablesWatch:
    try:
        return XtablesWatch(flavour)
    except PermissionError:
        raise HostNotReady("iptables cannot be read: run as root, or with CAP_NET_ADMIN") from None


async def _together(work: Iterable[Coroutine[None, None, T]]) -> list[T]:
    return await asyncio.gather(*work)


def _parsed(texts: Iterable[str], entries: str, layout: Layout) -> _Found:
    tables = {f: xtables.parse(text) for f, text in zip(FAMILIES, texts, strict=True)}
    found, names = ipsets.parse(entries, layout)
    return _Found(tables, names, Image.parse(tables, found, layout))


def _bridge_gone() -> Iterator[Problem]:
    """Where nft could load it."""
    if shutil.which("nft") is None:
        return
    with closing(Socket()) as netlink:
        if (BRIDGE, nfmessages.TABLE) not in nfmessages.tables(netlink):
            message = "is gone: replicas on one bridge miss replies until the agent loads it again"
            yield Problem(about="table bridge mesh", message=message)


def _has_bridge() -> bool:
    """Whether the table for replies between replicas is there.  Not without nf_tables."""
    try:
        with closing(Socket()) as netlink:
            return (BRIDGE, nfmessages.TABLE) in nfmessages.tables(netlink)
    except OSError:
        return False


def _explained(error: CommandFailed) -> ApplyFailed:
    """A program's refusal with the line it refused, where it names one."""
    shown = [line[2:] for note in getattr(error, "__notes__", ()) for line in note.splitlines()
             if line.startswith(">")]  # fmt: skip
    where = f": {shown[0].split(maxsplit=1)[1]}" if shown else ""
    return ApplyFailed(f"{error}{where}")

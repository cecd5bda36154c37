"""What somebody changed of the iptables program, told from what iptables-save printed.

Elements are not its business: whoever reads them compares them.  Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model.report import Problem
from mesh.rules import ipsets, marks, owner, xtables
from mesh.rules.edition import EDITION

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mesh.rules.marks import Layout
    from mesh.rules.xtables import Chains, Saved, Table

_NOTHING: Final = xtables.Saved({})
_REWRITTEN: Final = "was changed by somebody: the agent will write it again"


class Program(NamedTuple):
    """The static chains of one family, their version, how they keep marks, and whose they are."""

    version: str
    tables: Mapping[str, Table]
    layout: Layout
    owner: int = owner.AGENT


def told(program: Program, static: Table, saved: Saved) -> str:
    """What the canary says of chains that nobody touched."""
    witness, layout = xtables.witness(static, saved), program.layout
    fields = "" if layout == marks.DEFAULT else f".{layout.packet_mark:x}.{layout.ct_mark:x}"
    whose = f"/{program.owner:x}" if program.owner != owner.AGENT else ""
    return f"{program.version}.{witness}{fields}/{EDITION}{whose}"


def layout(saved: Mapping[str, Saved]) -> Layout | None:
    """How the chains in the tables of one family keep marks; None if no canary tells."""
    canaries = (_canary(saved.get(table, _NOTHING)) for table in xtables.TABLES)
    return next(filter(None, map(_layout_told, canaries)), None)


def _layout_told(canary: str) -> Layout | None:
    match canary.partition("/")[0].split("."):
        case [_, _]:
            return marks.DEFAULT
        case [_, _, packet_mark, ct_mark]:
            try:
                return marks.Layout.of(int(packet_mark, 16), int(ct_mark, 16))
            except ValueError:  # not written by us
                return None
    return None


def loaded(saved: Mapping[str, Saved]) -> str | None:
    """The version of the program in the tables of one family, as a canary tells it."""
    canaries = (_canary(saved.get(table, _NOTHING)) for table in xtables.TABLES)
    return next((text.partition(".")[0] for text in canaries if text), None)


def _canary(saved: Saved) -> str:
    return xtables.comment(saved.chains.get(xtables.CANARY, ()))


def differences(
    program: str,
    static: Program,
    saved: Mapping[str, Saved],
    dynamic: Mapping[str, Chains],
) -> Iterator[Problem]:
    """What is not as the driver left it in the tables of one family.

    `program` is what edits them ("ip6tables-legacy"), `dynamic` are the chains that the elements
    found there come to.
    """
    for table, wanted in static.tables.items():
        found = saved.get(table, _NOTHING)
        where = f"{program} -t {table}"
        yield from _of_canary(where, static, wanted, found)
        yield from _of_chains(where, table, wanted, found, dynamic.get(table, {}))


def _of_canary(where: str, static: Program, wanted: Table, found: Saved) -> Iterator[Problem]:
    canary = _canary(found)
    if canary == told(static, wanted, found):
        return
    if not canary:
        message = f"{xtables.CANARY} is gone: the agent will load the program again"
    elif canary.partition(".")[0] != static.version:
        message = "another version's program is loaded: an agent of this version will replace it"
    else:
        message = "the program was changed by somebody: the agent will reload it"
    yield Problem(about=where, message=message)


def _of_chains(
    where: str, table: str, wanted: Table, found: Saved, dynamic: Chains
) -> Iterator[Problem]:
    """Chains that are gone, of somebody else, or do not have the rules that they should."""
    every = wanted.chains | dynamic
    ours = xtables.ours(table, wanted, found) - {xtables.CANARY}
    for name in sorted(every.keys() | ours):
        rules = found.chains.get(name)
        if rules is None:
            message = "is gone: the agent will write it again"
        elif name not in every:
            message = "leads nowhere: the agent will write it again or remove it"
        elif xtables.shape(rules) != xtables.shape(every[name]):
            message = _REWRITTEN
        else:
            continue
        yield Problem(about=f"{where} {name}", message=message)


def unhooked(
    program: str, static: Mapping[str, Table], saved: Mapping[str, Saved]
) -> Iterator[Problem]:
    """Hooks that do not jump to our chain."""
    for table, wanted in static.items():
        there = xtables.hooked(wanted, saved.get(table, _NOTHING))
        for hook, chain in wanted.hooks.items():
            if hook not in there:
                message = f"does not jump to {chain}: the agent will put the jump back"
                yield Problem(about=f"{program} -t {table} {hook}", message=message)


def displaced(
    program: str, static: Mapping[str, Table], saved: Mapping[str, Saved]
) -> Iterator[Problem]:
    """Hooks in which somebody's rules come before ours; elements and chains are whole."""
    for table, wanted in static.items():
        found = saved.get(table, _NOTHING)
        for hook, chain in wanted.hooks.items():
            count = found.chains.get(hook, ()).count(f"-j {chain}")
            alone = xtables.Table({}, {hook: chain})
            if count and xtables.hook_commands(alone, found):
                how = "comes twice" if count > 1 else "is not the first any more"
                message = f"the jump to {chain} {how}: the agent will move it"
                yield Problem(about=f"{program} -t {table} {hook}", message=message)


def missing_sets(names: set[str]) -> Iterator[Problem]:
    """Sets that the chains look into and that are gone or were flushed; of what `ipsets.parse`
    found.
    """
    for name in sorted({ipsets.set_name(kept) for kept in ipsets.KEPT} - names):
        yield Problem(about=f"ipset {name}", message="is gone: the agent will create it again")
    if f"{ipsets.CANARY} 127.0.0.1" not in names:
        message = "is gone or empty, sets were flushed: the agent will fill them again"
        yield Problem(about=f"ipset {ipsets.CANARY}", message=message)

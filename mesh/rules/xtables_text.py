"""A node's rules in the language of iptables and ipset, for people and for the programs' own input.

What the driver loads, but for the witness in the canary, which only a loaded program has.  Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mesh.delta import Delta
from mesh.model.address import FAMILIES, Family
from mesh.rules import dump, ipsets, program, xtables
from mesh.rules.xtables_image import Image

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from mesh.rules.dump import Rules
    from mesh.rules.elements import Elements
    from mesh.rules.marks import Layout
    from mesh.rules.xtables import Chains

_PROGRAMS: Final = {Family.V4: "iptables", Family.V6: "ip6tables"}


def text(rules: Rules, owners: Collection[str] | None = None) -> Iterator[str]:
    """The sets, then the tables of each family, each part after a line that says what reads it.

    The whole, or only the entries and the pools' chains of some owners.
    """
    yield "# for: ipset restore -exist"
    if owners is None:
        yield from ipsets.program()
    for owner in sorted(rules.owners) if owners is None else owners:
        yield f"# {dump.title(owner)}"
        yield from _entries(rules.owners[owner], rules.parameters.layout)
    image = Image(rules.parameters.layout)
    for owner in rules.owners if owners is None else owners:
        image.update(Delta(add=rules.owners[owner]))
    for family in FAMILIES:
        dynamic = image.chains(family)
        pools = {n: r for n, r in dynamic["nat"].items() if xtables.POOL.fullmatch(n)}
        if owners is None:
            lines = "".join(_tables(rules, family, dynamic))
        else:
            lines = xtables.restore("nat", Delta({}, pools))
            guards = {name: rules for name, rules in dynamic["filter"].items() if rules}
            lines += xtables.restore("filter", Delta({}, guards))
            limits = {n: r for n, r in dynamic["mangle"].items() if xtables.POOL.fullmatch(n)}
            lines += xtables.restore("mangle", Delta({}, limits))
        if lines:
            yield f"# for: {_program(rules, family)}-restore --noflush"
            yield from lines.splitlines()
    if owners is None:
        yield "# for: nft -f -"
        yield from program.build(rules.parameters).bridge.splitlines()


def _entries(found: Elements, layout: Layout) -> Iterator[str]:
    yield from map(ipsets.create_list, sorted(set(ipsets.sets_of(found, layout))))
    for key, data in sorted(found.items()):
        if ipsets.holds(key):
            yield from ipsets.additions(key, data, layout)


def _tables(rules: Rules, family: Family, dynamic: dict[str, Chains]) -> Iterator[str]:
    static = xtables.program(rules.parameters, family)
    version = xtables.version(static)
    for table, each in static.items():
        canary = (f"-m comment --comment {version}",)
        chains = {xtables.CANARY: canary, **each.chains, **dynamic.get(table, {})}
        jumps = xtables.hook_commands(each, xtables.Saved({}))
        yield xtables.restore(table, Delta({}, chains), jumps)


def _program(rules: Rules, family: Family) -> str:
    """With the flavour, where that is known."""
    _, dash, flavour = rules.backend.partition("-")
    return f"{_PROGRAMS[family]}{dash}{flavour}"

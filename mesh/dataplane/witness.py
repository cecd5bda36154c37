"""A second reader of the legacy tables: python-iptables, in a process of its own.

Looks only, and asks for no table that does not exist: that would create it.  Raises CommandFailed
if the other process fails; what it saw is compared by mesh.rules.xtables_witness.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mesh.dataplane import command
from mesh.model.address import FAMILIES, Family
from mesh.rules import xtables, xtables_witness

if TYPE_CHECKING:
    from mesh.rules.program import Parameters

_PROGRAMS: Final = {Family.V4: "iptables-legacy-save", Family.V6: "ip6tables-legacy-save"}
_CHILD: Final = "mesh.dataplane.witness_child"
_PATIENCE: Final = 60.0
"""Seconds: it takes one for 1000 rules."""

_ATTEMPTS: Final = 3
"""How often both look again because the tables changed meanwhile."""


class Compared(NamedTuple):
    """How many rules of ours both saw, and what they saw differently."""

    rules: int
    disagreements: tuple[str, ...]


def is_installed() -> bool:
    """Whether there is a python-iptables to ask."""
    return importlib.util.find_spec("iptc") is not None


async def tell(family: Family, tables: tuple[str, ...]) -> Any:
    """What python-iptables sees in our chains of some tables.  Raises CommandFailed."""
    argv = (sys.executable, "-m", _CHILD, family.suffix, *tables)
    return json.loads(await command.run(*argv, timeout=_PATIENCE))


async def compare(parameters: Parameters) -> Compared:
    """Read the legacy tables of this host twice.  Raises CommandFailed."""
    count, lines = 0, list[str]()
    for family in FAMILIES:
        for attempt in range(1, _ATTEMPTS + 1):
            saved = xtables.parse(await command.run(_PROGRAMS[family]))
            ours = _ours(parameters, family, saved)
            told = await tell(family, tuple(ours)) if ours else {}
            found = [*xtables_witness.disagreements(ours, saved, told)]
            if not found or attempt == _ATTEMPTS:
                break
        program = _PROGRAMS[family].partition("-")[0]
        lines += (f"{program} {line}" for line in found)
        count += sum(len(saved[t].chains[name]) for t, names in ours.items() for name in names)
    return Compared(count, tuple(lines))


def _ours(
    parameters: Parameters, family: Family, saved: dict[str, xtables.Saved]
) -> dict[str, set[str]]:
    """Our chains by table, where there are any."""
    static = xtables.program(parameters, family)
    found = {t: xtables.ours(t, static[t], saved[t]) for t in static if t in saved}
    return {table: names for table, names in found.items() if names}

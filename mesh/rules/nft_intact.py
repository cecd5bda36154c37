"""What somebody changed of the nftables program, told from what the kernel lists of it.

Elements are not its business: whoever reads them compares them.  Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mesh.model.report import Problem
from mesh.rules import extras, trace_program

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mesh.rules.program import Program

_TABLE = "table inet mesh"


class Loaded(NamedTuple):
    """How a program in the kernel is recognised; None for what it does not say."""

    schema: int | None
    version: int | None
    witness: int | None


class Seen(NamedTuple):
    """What the kernel lists: a witness of now, the pool sizes dispatched on, and how many rules
    each chain has.
    """

    witness: int | None
    sizes: frozenset[int]
    rules: Mapping[str, int]


def differences(wanted: Program, loaded: Loaded, seen: Seen) -> Iterator[Problem]:
    """What is not as the driver left it; nothing if the program is the wanted one, untouched."""
    if loaded.schema is None or loaded.version is None:
        message = "the program in the kernel has no fingerprint: the agent will reload it"
        yield Problem(about=_TABLE, message=message)
    elif (loaded.schema, loaded.version) != (wanted.schema, wanted.version):
        message = (
            "the program in the kernel is not this version's: an agent of this version "
            "will replace it"
        )
        yield Problem(about=_TABLE, message=message)
    elif loaded.witness != seen.witness:
        message = "the program in the kernel was changed by somebody: the agent will reload it"
        yield Problem(about=_TABLE, message=message)
        yield from _of_chains(wanted, seen)


def _of_chains(wanted: Program, seen: Seen) -> Iterator[Problem]:
    """Which chains, as far as counting tells."""
    more = extras.loaded(seen.rules, seen.sizes, wanted.layout)
    loaded = trace_program.load(extras.whole(wanted, more))
    counts = {name: len(rules) for name, rules in loaded.chains.items()}
    for name in sorted(counts.keys() | seen.rules.keys()):
        have, should = seen.rules.get(name), counts.get(name)
        if have == should:
            continue
        if have is None:
            message = "is gone"
        elif should is None:
            message = "is not the mesh's: the agent will remove it"
        else:
            message = f"has {have} rules instead of {should}"
        yield Problem(about=f"{_TABLE}, chain {name}", message=message)

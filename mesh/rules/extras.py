"""What of the program is loaded only because some elements need it: nobody else pays.

Chains for large pools, a hook for policies, counts for limits of connections.  Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mesh.rules import connlimits, elements, nft, program

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.rules.elements import Elements
    from mesh.rules.marks import Layout
    from mesh.rules.program import Program


class Extras(NamedTuple):
    """Pool sizes beyond those that are dispatched on from the start, as `Layout.size` has them in
    marks; whether policies select replicas; the limits of connections that services have.
    """

    sizes: frozenset[int] = frozenset()
    guards: bool = False
    limits: frozenset[int] = frozenset()

    def without(self, other: Extras) -> Extras:
        """What of these is not among others."""
        guards = self.guards and not other.guards
        return Extras(self.sizes - other.sizes, guards, self.limits - other.limits)

    def __str__(self) -> str:
        told = (
            f"pools of sizes {sorted(self.sizes)}" if self.sizes else "",
            "policies" if self.guards else "",
            f"limits of connections {sorted(self.limits)}" if self.limits else "",
        )
        return ", ".join(filter(None, told))

    def __or__(self, other: Extras) -> Extras:
        guards = self.guards or other.guards
        return Extras(self.sizes | other.sizes, guards, self.limits | other.limits)


NONE = Extras()


def needed(found: Elements, layout: Layout) -> Extras:
    """What some elements need."""
    return Extras(
        nft.sizes(found, layout) - program.static_sizes(layout),
        elements.guarded(found),
        elements.connlimits(found),
    )


def loaded(chains: Iterable[str], sizes: frozenset[int], layout: Layout) -> Extras:
    """What a program has that has these chains and dispatches on these sizes."""
    names = frozenset(chains)
    return Extras(
        sizes - program.static_sizes(layout), program.GUARD in names, connlimits.loaded(names)
    )


def whole(made: Program, extras: Extras) -> str:
    """`inet` of a program with them."""
    return made.inet + added(made, extras)


def added(made: Program, extras: Extras, known: Extras = NONE) -> str:
    """The text that adds them to a program that has those that are `known`."""
    text = program.size_chains(extras.sizes, made.layout)
    text += connlimits.added(extras.limits, known.limits, made.counting)
    return text + (made.guard if extras.guards else "")


def removed(made: Program, extras: Extras, kept: Extras) -> str:
    """The text that takes guard and limits out of a program that keeps those others."""
    text = program.UNGUARD if extras.guards else ""
    if extras.limits:
        text += connlimits.removed(extras.limits, kept.limits, made.counting)
    return text


def chains(made: Program, extras: Extras) -> frozenset[str]:
    """Every chain of a program that has them."""
    names = {program.chain(size, made.layout) for size in extras.sizes}
    if extras.guards:
        names.add(program.GUARD)
    if extras.limits:
        names |= {connlimits.SURPLUS, *map(connlimits.chain, extras.limits)}
    return made.chains | names

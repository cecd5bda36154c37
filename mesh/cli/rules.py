"""`mesh rules`: what a node's rules are or would be, and where its kernel differs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from mesh import errors
from mesh.cli import engine, options, output
from mesh.rules import dump, elements

if TYPE_CHECKING:
    from mesh.cli.engine import Engine, Loaded
    from mesh.rules.dump import Rules
    from mesh.rules.elements import Elements


@click.group(cls=options.Noun)
def rules() -> None:
    """Show a node's rules; compare them with its kernel."""


@rules.command()
@engine.NODE
@click.option("--service", metavar="NAME", help="Only the elements of this service.")
@click.option("--backend", type=click.Choice(["nftables"]), default="nftables", show_default=True)
@click.option("--kernel", is_flag=True, help="What this node's kernel holds, instead.")
@click.option("--offline", metavar="FILE", help="Of a dump (`--json`), without etcd; - is stdin.")
def show(
    node: str | None, service: str | None, backend: str, kernel: bool, offline: str | None
) -> None:
    """Print a node's rules as `nft -f` takes them: the program, then the elements by service.

    They are what the node's agent would install now.  With --json: a dump that --offline reads.
    """
    if offline is not None:
        if node is not None or kernel:
            raise errors.BadUsage("--offline FILE has its own node: leave out --node and --kernel")
        found = engine.offline(offline)
    else:
        read = engine.read(node)
        found = read.read_back() if kernel else read.desired
    if service is not None:
        found = _only(found, service)
    if options.as_json():
        output.document(dump.dump(found))
        return
    output.line(f"# {backend} of node {found.node}, {_SOURCES[found.source]}")
    for line in dump.text(found, None if service is None else found.owners):
        output.line(line)


_SOURCES = {"desired": "as its agent would install them", "kernel": "as its kernel holds them"}


def _only(found: Rules, service: str) -> Rules:
    if service not in found.owners:
        raise errors.NotFound(
            f"service {service!r} has no element on node {found.node}: "
            f"see `mesh service inspect {service}`"
        )
    return replace(found, owners={service: found.owners[service]})


@rules.command()
@engine.NODE
def diff(node: str | None) -> None:
    """Compare what this node's rules should be with what its kernel holds; run it as root there.

    `-` is in the kernel and should not be, `+` is missing.  Exits with 1 if they differ.
    """
    found = engine.read(node)
    delta = found.delta
    same_program = found.loaded == found.wanted
    if options.as_json():
        output.document(
            {
                "node": found.desired.node,
                "equal": not delta and same_program,
                "program": {"loaded": _hex(found.loaded), "wanted": _hex(found.wanted)},
                "remove": _listed(delta.remove),
                "add": _listed(delta.add),
            }
        )
    else:
        _print(found, same_program=same_program)
    if delta or not same_program:
        options.exit_with(1)


def _print(found: Engine, *, same_program: bool) -> None:
    delta = found.delta
    if not same_program:
        output.line("! the program in the kernel is not this version's: see the agent's log", "red")
    lines = [("-", elements.describe(*each)) for each in delta.remove.items()]
    lines += [("+", elements.describe(*each)) for each in delta.add.items()]
    for sign, text in sorted(lines, key=_order):
        output.line(f"{sign} {text}", "red" if sign == "-" else "green")
    if not lines and same_program:
        count = len(found.desired.elements)
        output.done(f"the kernel of {found.desired.node} holds what it should: {count} elements")


def _order(line: tuple[str, str]) -> tuple[str, bool]:
    """By key; what goes stands before what takes its place."""
    sign, text = line
    return text.partition(" : ")[0], sign == "+"


def _listed(part: Elements) -> list[str]:
    return sorted(elements.describe(key, data) for key, data in part.items())


def _hex(loaded: Loaded | None) -> dict[str, Any] | None:
    if loaded is None or loaded.schema is None or loaded.version is None:
        return None
    return {"schema": f"0x{loaded.schema:x}", "version": f"0x{loaded.version:x}"}

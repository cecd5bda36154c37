"""`mesh rules`: what a node's rules are or would be, and where its kernel differs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
import msgspec

from mesh import errors
from mesh.cli import engine, options, output
from mesh.rules import dump, elements, xtables_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.cli.engine import Engine
    from mesh.dataplane.protocol import Examined
    from mesh.rules.dump import Rules
    from mesh.rules.elements import Elements


@click.group(cls=options.Noun)
def rules() -> None:
    """Show a node's rules; compare them with its kernel."""


@rules.command()
@engine.NODE
@click.option("--service", metavar="NAME", help="Only what belongs to this service.")
@click.option(
    "--backend", type=click.Choice(dump.BACKENDS), help="In whose language (default: the node's)."
)
@click.option("--kernel", is_flag=True, help="What this node's kernel holds, instead.")
@click.option("--offline", metavar="FILE", help="Of a dump (`--json`), without etcd; - is stdin.")
def show(
    node: str | None, service: str | None, backend: str | None, kernel: bool, offline: str | None
) -> None:
    """Print a node's rules in the language of the backend that drives it.

    They are what the node's agent would install now, as `nft -f` takes it, or `ipset restore` and
    `iptables-restore`: the program and the services.  With --json: a dump that --offline reads.
    """
    if offline is not None:
        if node is not None or kernel:
            raise errors.BadUsage("--offline FILE has its own node: leave out --node and --kernel")
        found = engine.offline(offline)
    elif kernel:
        found = _of_kernel(engine.read(node, backend or ""))
    else:
        found = engine.read(node).desired
    if service is not None:
        found = _only(found, service)
    language = backend or found.backend
    if found.source == "desired":
        found = replace(found, backend=msgspec.convert(language, dump.Backend))
    if options.as_json():
        output.document(dump.dump(found))
        return
    output.line(f"# {language} of node {found.node}, {_source(found, language)}")
    render = dump.text if language == engine.NFTABLES else xtables_text.text
    for line in render(found, None if service is None else list(found.owners)):
        output.line(line)


def _of_kernel(read: Engine) -> Rules:
    held = read.read_back()
    if read.differences:
        output.warn("somebody changed more than elements, which is not shown: `mesh rules diff`")
    return held


def _source(found: Rules, language: str) -> str:
    """Whose word it is, and what he said it in where that is another language."""
    if found.source == "desired":
        return "as its agent would install them"
    same = language in (found.backend, found.backend.partition("-")[0])
    return f"as its kernel holds them{'' if same else f' in {found.backend}'}"


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

    `-` is in the kernel and should not be, `+` is missing, `!` is wrong with the program itself:
    foreign rules, missing jumps, another version.  Exits with 1 if they differ.
    """
    found = engine.read(node)
    delta = found.delta
    if options.as_json():
        output.document(
            {
                "node": found.desired.node,
                "backend": found.desired.backend,
                "equal": not delta and not found.differences,
                "program": _programs(found.examined),
                "differences": found.differences,
                "remove": _listed(delta.remove),
                "add": _listed(delta.add),
            }
        )
    else:
        _print(found)
    if delta or found.differences:
        options.exit_with(1)


def _print(found: Engine) -> None:
    delta = found.delta
    for problem in found.differences:
        output.line(f"! {problem.about}: {problem.message}", "red")
    lines = [("-", elements.describe(*each)) for each in delta.remove.items()]
    lines += [("+", elements.describe(*each)) for each in delta.add.items()]
    for sign, text in sorted(lines, key=_order):
        output.line(f"{sign} {text}", "red" if sign == "-" else "green")
    if not lines and not found.differences:
        desired = found.desired
        output.done(
            f"the kernel of {desired.node} holds what it should: "
            f"{len(desired.elements)} elements in {desired.backend}"
        )


def _order(line: tuple[str, str]) -> tuple[str, bool]:
    """By key; what goes stands before what takes its place."""
    sign, text = line
    return text.partition(" : ")[0], sign == "+"


def _listed(part: Elements) -> list[str]:
    return sorted(elements.describe(key, data) for key, data in part.items())


def _programs(examined: Examined | None) -> dict[str, Mapping[str, Any] | None]:
    """How the program in the kernel is recognised, and how this version's would be."""
    if examined is None:
        return {"loaded": None, "wanted": None}
    known = all(value is not None for value in examined.loaded.values())
    return {"loaded": examined.loaded if known else None, "wanted": examined.wanted}

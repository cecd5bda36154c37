"""`mesh node update`: the labels that operators give a node, beside those of its configuration."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from mesh import errors
from mesh.cli import options, output

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.cli.options import Session


@click.command(cls=options.Verb)
@click.argument("name")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Repeatable.")
@click.option("--label-rm", "removed", multiple=True, metavar="KEY", help="Repeatable.")
def update(name: str, labels: tuple[str, ...], removed: tuple[str, ...]) -> None:
    """Change the labels of a node, at once and while its agent is down.

    They win over [labels] of its configuration, and --label-rm hides one that is there.
    """
    if not labels and not removed:
        raise errors.BadUsage(f"node {name}: nothing to change; give --label or --label-rm")
    given = options.labels(labels)
    now = options.in_store(lambda session: _update(session, name, given, removed))
    if options.as_json():
        output.document({"node": name, "labels": now})
        return
    output.done(f"Node updated: {name}")
    for key, value in sorted(now.items()):
        output.line(f"  {key}={value}")


async def _update(
    session: Session, name: str, given: Mapping[str, str], removed: tuple[str, ...]
) -> dict[str, str]:
    """The labels that the node has then."""
    from mesh.cli import world
    from mesh.model.maintenance import NodeLabels
    from mesh.store import schema
    from mesh.store.protocol import Compare, Put

    seen = await world.read(session)
    if name not in seen.nodes:
        raise errors.NotFound(f"no node {name!r}: `mesh node ls` lists them")
    key, own = session.keys.labels(name), seen.nodes[name].labels
    item = await session.store.get(key)
    before: dict[str, str] = {}
    if item is not None:
        with contextlib.suppress(errors.InvalidRecord):  # that is replaced
            before = schema.decode(key, item.value, NodeLabels).labels
    for label in removed:
        if not {**own, **before}.get(label):
            raise errors.NotFound(f"--label-rm: node {name} has no label {label!r}")
    now = {**before, **given, **dict.fromkeys(removed, "")}
    now = {label: value for label, value in now.items() if value or label in own}
    with options.naming("--label"):
        record = NodeLabels(labels=now)
    written = await session.store.transact(
        (Compare(key, item.mod_revision if item is not None else 0),),
        (Put(key, schema.encode(record)),),
    )
    if not written.succeeded:
        raise errors.Conflict(f"labels of node {name!r} changed meanwhile: try again")
    return {label: value for label, value in {**own, **now}.items() if value}

"""`mesh schema`: what may be written to etcd, as JSON Schema."""

from __future__ import annotations

import click

from mesh import errors
from mesh.cli import options, output


@click.command(cls=options.Verb)
@click.argument("kind", required=False)
def schema(kind: str | None) -> None:
    """Print the JSON Schema of one KIND of record, or of all (always JSON)."""
    from mesh.store import schema as records

    whole = records.json_schema()
    if kind is None:
        output.document(whole)
        return
    kinds = whole["properties"]
    assert isinstance(kinds, dict)
    if kind not in kinds:
        raise errors.NotFound(f"no kind {kind!r}: choose one of {', '.join(kinds)}")
    output.document({"$schema": whole["$schema"], **kinds[kind], "$defs": whole["$defs"]})

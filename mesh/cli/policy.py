"""`mesh policy`: who may connect to which tasks; policies are applied from files, as elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from mesh import errors
from mesh.cli import options, output

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.cli.options import Session
    from mesh.cli.world import World
    from mesh.model.policy import IngressRule, NetworkPolicy

_KIND: Final = "NetworkPolicy"


@click.group(cls=options.Noun)
def policy() -> None:
    """Say who may connect to which tasks.

    A task that no policy selects is open to all.  One that some policy selects is closed, but for
    what a rule of any of them lets in.
    """


@policy.command()
@click.option(
    "-f",
    "--file",
    "paths",
    multiple=True,
    required=True,
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="YAML or JSON with policies, - for standard input; repeatable.",
)
def apply(paths: tuple[str, ...]) -> None:
    """Create policies, or replace those of the same name."""
    found = [each for path in paths for each in _read(path)]
    seen = options.in_store(lambda session: _write(session, found))
    for each in found:
        if not seen.selected(each):
            output.warn(f"policy {each.name} selects no task yet: `mesh task ls`")
    if options.as_json():
        output.document(found)
        return
    for each in found:
        output.done(f"Policy applied: {each.name}, {_count(len(seen.selected(each)), 'task')}")


def _read(path: str) -> list[NetworkPolicy]:
    """The policies of a file.  Raises BadUsage that names the document and the field."""
    import yaml

    with click.open_file(path) as file:
        text = file.read()
    try:
        documents = [each for each in yaml.safe_load_all(text) if each is not None]
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise errors.BadUsage(f"{path}: not YAML: {where}") from None
    if not documents:
        raise errors.BadUsage(f"{path}: no policy in it")
    return [_parsed(each, f"{path}, policy {n}") for n, each in enumerate(documents, 1)]


def _parsed(document: Any, where: str) -> NetworkPolicy:
    """A policy as etcd has it, or in the shape of Kubernetes with `kind` and `metadata`."""
    import msgspec

    from mesh.model.policy import NetworkPolicy

    if isinstance(document, dict) and "kind" in document:
        document = _unwrapped(document, where)
    try:
        return msgspec.convert(document, NetworkPolicy)
    except msgspec.ValidationError as error:
        raise errors.BadUsage(f"{where}: {error}") from None


def _unwrapped(document: dict[str, Any], where: str) -> dict[str, Any]:
    if document["kind"] != _KIND:
        raise errors.BadUsage(f"{where}: kind {document['kind']!r}: only {_KIND} can be applied")
    metadata, spec = (document.get(part) for part in ("metadata", "spec"))
    if not isinstance(metadata, dict) or not isinstance(spec, dict) or "name" not in metadata:
        raise errors.BadUsage(f"{where}: metadata.name and spec are needed")
    stray = document.keys() - {"apiVersion", "kind", "metadata", "spec"}
    if stray or "name" in spec:
        raise errors.BadUsage(f"{where}: {', '.join(sorted(stray)) or 'spec.name'} is not known")
    return {"name": metadata["name"], **spec}


async def _write(session: Session, policies: Iterable[NetworkPolicy]) -> World:
    from mesh.cli import world
    from mesh.store import schema
    from mesh.store.protocol import Put

    world.cluster(session)
    puts = {p.name: Put(session.keys.policy(p.name), schema.encode(p)) for p in policies}
    await session.store.transact((), tuple(puts.values()))
    return await world.read(session)


@policy.command("ls")
def list_() -> None:
    """List all policies."""
    from mesh.cli import world

    seen = options.in_store(world.read)
    found = [seen.policies[name] for name in sorted(seen.policies, key=world.natural)]
    if options.as_json():
        output.document([_describe(seen, each) for each in found])
        return
    rows = [
        [each.name, _labels(each), str(len(seen.selected(each))), _rules(each)] for each in found
    ]
    output.table(("POLICY", "SELECTS", "TASKS", "LETS IN"), rows)


@policy.command()
@click.argument("name")
def inspect(name: str) -> None:
    """Show a policy, and the tasks it selects."""
    from mesh.cli import world

    seen = options.in_store(world.read)
    if name not in seen.policies:
        key = seen.state.keys.policy(name)
        if key in seen.state.invalid:
            raise errors.InvalidRecord(key, seen.state.invalid[key].message)
        raise errors.NotFound(f"no policy {name!r}: `mesh policy ls` lists them")
    found = _describe(seen, seen.policies[name])
    if options.as_json():
        output.document(found)
    else:
        output.fields(found)


def _describe(seen: World, found: NetworkPolicy) -> dict[str, Any]:
    """A policy as one JSON object: its record, and the tasks it selects."""
    import msgspec

    tasks = sorted(f"{task.service}/{task.id}" for task in seen.selected(found))
    return {**msgspec.to_builtins(found), "tasks": tasks}


def _labels(found: NetworkPolicy) -> str:
    labels = found.pod_selector.match_labels
    return ",".join(f"{key}={value}" for key, value in labels.items()) or "every task"


def _rules(found: NetworkPolicy) -> str:
    return "; ".join(map(_rule, found.ingress)) or "nobody"


def _rule(rule: IngressRule) -> str:
    """A rule in a few words: "service=web, 192.0.2.0/24 to 80/tcp"."""
    peers = []
    for peer in rule.from_:
        if peer.ip_block is not None:
            peers.append(" but ".join((peer.ip_block.cidr, *peer.ip_block.except_)))
        elif peer.pod_selector is not None:
            labels = peer.pod_selector.match_labels.items()
            peers.append(",".join(f"{key}={value}" for key, value in labels) or "every task")
    ports = []
    for port in rule.ports:
        first, last = port.span
        span = "any" if port.port is None else f"{first}" if first == last else f"{first}-{last}"
        ports.append(f"{span}/{port.protocol.protocol.value}")
    return f"{', '.join(peers) or 'everybody'}{' to ' if ports else ''}{', '.join(ports)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@policy.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
def rm(names: tuple[str, ...]) -> None:
    """Remove policies; tasks that no other one selects are open again."""
    options.in_store(lambda session: _remove(session, names))
    if options.as_json():
        output.document({"removed": list(names)})
        return
    for name in names:
        output.done(f"Policy removed: {name}")


async def _remove(session: Session, names: tuple[str, ...]) -> None:
    missing = [n for n in names if not await session.store.delete(session.keys.policy(n))]
    if missing:
        raise errors.NotFound(f"no policy {', '.join(missing)}: `mesh policy ls` lists them")

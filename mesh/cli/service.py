"""`mesh service`: publish services, change and remove them; show what became of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from mesh import errors
from mesh.cli import options, output, port_owners, spec_options

if TYPE_CHECKING:
    from mesh.cli.options import Session
    from mesh.cli.spec_options import Changes
    from mesh.cli.world import World
    from mesh.model.service import ServiceSpec
    from mesh.model.view import ServiceView

ALLOCATION_WAIT: Final = 3.0
"""Seconds that `create` waits for the controller: an election takes less."""


@click.group(cls=options.Noun)
def service() -> None:
    """Publish services; list and inspect them."""


@service.command()
@click.argument("name")
@spec_options.apply
def create(name: str, no_wait: bool, **given: Any) -> None:
    """Create a service, and wait up to 3 seconds for its VIP and ports.

    Its replicas are added with `mesh task add` or `mesh task run`.
    """
    from mesh.model.service import ServiceSpec

    changes = spec_options.changes(given)
    with options.naming(f"service {name}"):
        wanted = changes.made(ServiceSpec(name=name))

    async def write_and_read(session: Session) -> tuple[World, ServiceSpec]:
        spec, revision = await _write_new(session, wanted, changes)
        return await _read_back(session, spec, revision, wait=not no_wait), spec

    _report(*options.in_store(write_and_read), "created", waited=not no_wait)


@service.command()
@click.argument("name")
@spec_options.apply_changes
def update(name: str, no_wait: bool, **given: Any) -> None:
    """Change a service: what is given replaces what was, the rest stays.

    One --publish replaces all published ports, one --allow all allowed prefixes.
    """
    changes = spec_options.changes(given)
    if not changes:
        raise errors.BadUsage(
            f"service {name}: nothing to change; see `mesh service update --help`"
        )

    async def write_and_read(session: Session) -> tuple[World, ServiceSpec]:
        spec, revision = await _replace(session, name, changes)
        return await _read_back(session, spec, revision, wait=not no_wait), spec

    _report(*options.in_store(write_and_read), "updated", waited=not no_wait)


async def _write_new(
    session: Session, wanted: ServiceSpec, changes: Changes
) -> tuple[ServiceSpec, int]:
    """Write a spec if it and its ports are free; it, and the revision of the write."""
    from mesh.cli import listeners, world
    from mesh.store import schema
    from mesh.store.protocol import Compare, Put

    occupied = await listeners.read(session)
    spec = changes.allowed(wanted, (), world.cluster(session), occupied)
    key = session.keys.service(spec.name)
    written = await session.store.transact(
        (Compare(key, 0), *await port_owners.free(session, spec)), (Put(key, schema.encode(spec)),)
    )
    if not written.succeeded:
        await port_owners.free(session, spec)
        raise errors.Conflict(
            f"service {spec.name!r} exists: change it with `mesh service update`, or remove it "
            "with `mesh service rm`"
        )
    return spec, written.revision


async def _replace(session: Session, name: str, changes: Changes) -> tuple[ServiceSpec, int]:
    """Write the changed spec; what it is now, and the revision of the write."""
    from mesh.cli import listeners, world
    from mesh.store import schema
    from mesh.store.protocol import Compare, Put

    found = await session.store.get(session.keys.service(name))
    if found is None:
        raise errors.NotFound(f"no service {name!r}: `mesh service create` makes one")
    with options.naming(f"service {name}"):
        old = schema.parse_service(found.key, found.value)
        spec = changes.made(old)
    occupied = await listeners.read(session)
    spec = changes.allowed(spec, old.ports, world.cluster(session), occupied)
    written = await session.store.transact(
        (Compare(found.key, found.mod_revision), *await port_owners.free(session, spec)),
        (Put(found.key, schema.encode(spec)),),
    )
    if not written.succeeded:
        raise errors.Conflict(f"service {name!r} changed meanwhile: look at it and try again")
    return spec, written.revision


def _report(seen: World, spec: ServiceSpec, what: str, *, waited: bool) -> None:
    """Print what the service has; if that was waited for, say what is missing.

    Raises Conflict if the controller refused something.
    """
    from mesh.cli import ports

    view = seen.service(spec.name)
    if options.as_json():
        output.document(describe(seen, view))
    else:
        output.done(f"Service {what}: {spec.name}")
        if spec.vip != "none":
            output.line(f"  VIP: {', '.join(view.vips) or 'not allocated yet'}")
        if spec.ports:
            click.echo("  Published Ports:")
        for text in ports.warren(ports.assign(view)):
            output.line(f"    {text}")
    if not waited or _has_everything(seen, spec):
        return
    for problem in seen.problems_of(spec.name):
        raise errors.Conflict(f"service {spec.name!r} was {what}, but: {problem.message}")
    output.warn(
        f"no manager has allocated everything yet: see `mesh service inspect {spec.name}` and "
        "`mesh status`"
    )


async def _read_back(session: Session, spec: ServiceSpec, written: int, *, wait: bool) -> World:
    """The world once the controller has answered what was `written` at a revision.

    As it is after `ALLOCATION_WAIT` if there is no answer, and as it is now if not to `wait`.
    """
    import asyncio

    from mesh.cli import world
    from mesh.store.protocol import Compacted, WatchLost

    keys = session.keys
    seen = await world.read(session)
    if not wait:
        return seen
    since = dict.fromkeys((keys.under("allocations"), keys.under("status")), seen.revision)
    try:
        with output.patience("a manager to allocate VIP and ports"):
            async with asyncio.timeout(ALLOCATION_WAIT):
                async for _ in session.store.watch(since):
                    seen = await world.read(session)
                    if _has_everything(seen, spec) or seen.problems_of(spec.name, written):
                        break
    except (TimeoutError, Compacted, WatchLost):
        seen = await world.read(session)
    return seen


def _has_everything(seen: World, spec: ServiceSpec) -> bool:
    from mesh.cli import ports

    view = seen.service(spec.name)
    has_ports = all(item.granted for item in ports.assign(view))
    has_ports = has_ports and view.local_health == (spec.local_health_port or None)
    return has_ports and (spec.vip == "none" or bool(view.vips))


@service.command("ls")
def list_() -> None:
    """List services: replicas that take new connections of all, VIPs, published ports."""
    from mesh.cli import ports, world

    seen = options.in_store(world.read)
    views = [seen.service(name) for name in sorted(seen.state.services(), key=world.natural)]
    if options.as_json():
        output.document([describe(seen, view) for view in views])
        return
    output.table(
        ("NAME", "REPLICAS", "VIP", "PORTS"),
        [
            (
                view.spec.name,
                seen.replicas(view),
                ", ".join(view.vips) or "-",
                ports.notation(ports.assign(view)) or "-",
            )
            for view in views
        ],
    )


@service.command()
@click.argument("name")
def ps(name: str) -> None:
    """List the tasks of a service."""
    from mesh.cli import task, world

    seen = options.in_store(world.read)
    view = seen.service(name)
    if options.as_json():
        output.document([task.describe(seen, item) for item in view.tasks])
    else:
        task.print_table(seen, view.tasks)


@service.command()
@click.argument("name")
def inspect(name: str) -> None:
    """Print everything known of a service."""
    from mesh.cli import world

    seen = options.in_store(world.read)
    found = describe(seen, seen.service(name))
    if options.as_json():
        output.document(found)
    else:
        output.fields(found)


def describe(seen: World, view: ServiceView) -> dict[str, Any]:
    """A service as one JSON object; `endpoint` is in the words of Swarm's API."""
    from mesh.cli import ports, task

    return {
        "spec": view.spec,
        "vip": list(view.vips),
        "publishedOn": seen.publishing(view) if view.spec.publish_on else None,
        "endpoint": ports.endpoint(view, seen.state.cluster),
        "tasks": [task.describe(seen, item) for item in view.tasks],
        "problems": seen.problems_of(view.spec.name) + seen.problems_on_nodes(view.spec.name),
    }


@service.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@click.option("--tasks", is_flag=True, help="Remove their tasks too.")
def rm(names: tuple[str, ...], tasks: bool) -> None:
    """Remove services: they stop answering on every node.

    Their tasks belong to whoever wrote them and stay, unless --tasks is given.
    """
    left = options.in_store(lambda session: _remove(session, names, with_tasks=tasks))
    if left and not tasks:
        output.warn(
            f"tasks without a service: {', '.join(left)}; `mesh task rm` removes them, and a new "
            "service of the same name gets them"
        )
    if options.as_json():
        output.document({"removed": list(names), "tasks": left if tasks else []})
        return
    for name in names:
        output.done(f"Service removed: {name}")


async def _remove(session: Session, names: tuple[str, ...], *, with_tasks: bool) -> list[str]:
    """Remove all of `names` or, if one is missing, none; returns the tasks they had."""
    from mesh.store.protocol import MAX_OPERATIONS, Delete

    keys = session.keys
    missing = [name for name in names if await session.store.get(keys.service(name)) is None]
    if missing:
        raise errors.NotFound(
            f"no service {', '.join(map(repr, missing))}: nothing was removed; "
            "`mesh service ls` lists them"
        )
    under = {keys.tasks_of(name) for name in names}
    tasks = [item.key for item in (await session.store.list(*under)).items]
    doomed = [keys.service(name) for name in dict.fromkeys(names)] + (tasks if with_tasks else [])
    for start in range(0, len(doomed), MAX_OPERATIONS):
        await session.store.transact(
            (), [Delete(key) for key in doomed[start : start + MAX_OPERATIONS]]
        )
    return [key.removeprefix(keys.under("tasks")) for key in tasks]

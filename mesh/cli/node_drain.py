"""`mesh node drain|activate`: maintenance of a node, so that nothing fails when it is stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mesh import errors
from mesh.cli import draining, options, output

if TYPE_CHECKING:
    from mesh.cli.options import Session
    from mesh.cli.world import World
    from mesh.model.maintenance import Duty


@click.command(cls=options.Verb)
@click.argument("name")
@draining.WAIT
@draining.TIMEOUT
def drain(name: str, wait: bool, timeout: str | None) -> None:
    """Give the tasks of a node no new connections, and wait for those that they have.

    They go on until they end, or until their service's --drain is over; then both sides are reset.
    The node itself forwards to other nodes' tasks until its agent is stopped, and its own ports of
    mode host answer until then: nobody else can.
    """
    alone = options.in_store(lambda session: _drain(session, name, timeout, wait=wait))
    for service in alone:
        output.warn(
            f"service {service} has no other task that may be given connections: clients are "
            f"refused; start one elsewhere, or `mesh node activate {name}`"
        )
    if options.as_json():
        output.document({"drained" if wait else "draining": [name], "unserved": alone})
    else:
        output.done(f"Node {'drained' if wait else 'drains'}: {name}")


async def _drain(session: Session, name: str, timeout: str | None, *, wait: bool) -> list[str]:
    """Which services nobody serves then."""
    from mesh.cli import world
    from mesh.model.maintenance import Duty

    seen = await world.read(session)
    tasks = {(task.service, task.id) for task in seen.tasks_on(name)}
    services = {service for service, _ in tasks}
    seconds = draining.patience(timeout, seen, services)
    revision = await _write(session, seen, name, Duty.DRAINING)
    if wait:
        await draining.wait(session, tasks, revision, seconds)
    return sorted(service for service in services if _only_on(seen, service, name))


def _only_on(seen: World, service: str, node: str) -> bool:
    view = seen.state.service_view(service)
    if view is None:
        return False
    nodes = {task.node for task in view.eligible(seen.alive)}
    return not nodes - {node}


@click.command(cls=options.Verb)
@click.argument("name")
def activate(name: str) -> None:
    """Have the tasks of a node get new connections again."""
    options.in_store(lambda session: _activate(session, name))
    if options.as_json():
        output.document({"active": [name]})
    else:
        output.done(f"Node active: {name}")


async def _activate(session: Session, name: str) -> None:
    from mesh.cli import world
    from mesh.model.maintenance import Duty

    await _write(session, await world.read(session), name, Duty.ACTIVE)


async def _write(session: Session, seen: World, name: str, state: Duty) -> int:
    """Write what is wanted of a node; the revision since when it is."""
    from datetime import UTC, datetime

    from mesh.model.maintenance import Maintenance
    from mesh.store import schema

    if name not in seen.nodes:
        raise errors.NotFound(f"no node {name!r}: `mesh node ls` lists them")
    key = session.keys.maintenance(name)
    item = await session.store.get(key)
    if item is not None:
        try:
            if schema.parse_maintenance(key, item.value).state is state:
                return item.mod_revision
        except errors.InvalidRecord:
            pass  # it is replaced
    since = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return await session.store.put(key, schema.encode(Maintenance(state=state, since=since)))

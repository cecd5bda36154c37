"""`mesh task drain|activate|rm`: how a replica leaves the pools of its service, and comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mesh import errors
from mesh.cli import draining, options, output

if TYPE_CHECKING:
    from mesh.cli.options import Session


@click.command(cls=options.Verb)
@click.argument("service")
@click.argument("id")
@draining.WAIT
@draining.TIMEOUT
def drain(service: str, id: str, wait: bool, timeout: str | None) -> None:
    """Give a task no new connections, and wait for those that it has.

    They go on until they end, or until the service's --drain is over; then both sides are reset.
    The task's record stays: `mesh task activate` has it take part again.
    """
    options.in_store(lambda session: _drain(session, service, id, timeout, wait=wait))
    if options.as_json():
        output.document({"drained" if wait else "draining": [f"{service}/{id}"]})
    else:
        output.done(f"Task {'drained' if wait else 'drains'}: {service}/{id}")


async def _drain(
    session: Session, service: str, name: str, timeout: str | None, *, wait: bool
) -> None:
    from mesh.cli import world
    from mesh.model.task import TaskState

    seen = await world.read(session)
    seconds = draining.patience(timeout, seen, (service,))
    _, revision = await draining.change_task(session, service, name, state=TaskState.DRAINING)
    if wait:
        await draining.wait(session, {(service, name)}, revision, seconds)


@click.command(cls=options.Verb)
@click.argument("service")
@click.argument("id")
def activate(service: str, id: str) -> None:
    """Have a task that drains, or has drained, get new connections again."""
    from mesh.model.task import TaskState

    options.in_store(
        lambda session: draining.change_task(session, service, id, state=TaskState.RUNNING)
    )
    if options.as_json():
        output.document({"active": [f"{service}/{id}"]})
    else:
        output.done(f"Task active: {service}/{id}")


@click.command(cls=options.Verb)
@click.argument("service")
@click.argument("id")
@click.option("--drain", "drains", is_flag=True, help="Wait until it has drained, then remove it.")
@click.option("--wait", is_flag=True, help="Wait until no node begins a connection to it.")
@draining.TIMEOUT
def rm(service: str, id: str, drains: bool, wait: bool, timeout: str | None) -> None:
    """Remove a task's record: it gets no new connections.

    Connections that it has go on for as long as they like; with --drain for the service's --drain,
    and the record goes when they have ended.  What runs under `mesh task run` is stopped there, and
    then removes its record itself.
    """
    if timeout is not None and not (drains or wait):
        raise errors.BadUsage("--timeout is for --drain or --wait: else nothing is waited for")

    async def remove(session: Session) -> None:
        if drains:
            await _drain(session, service, id, timeout, wait=True)
        revision = await _remove(session, service, id)
        if wait:
            await draining.wait(session, (), revision, draining.patience(timeout, None, ()))

    options.in_store(remove)
    if options.as_json():
        output.document({"removed": [f"{service}/{id}"]})
    else:
        output.done(f"Task removed: {service}/{id}")


async def _remove(session: Session, service: str, name: str) -> int:
    """The revision at which it is gone."""
    from mesh.store.protocol import Delete

    key = session.keys.task(service, name)
    if await session.store.get(key) is None:
        raise errors.NotFound(f"no task {service}/{name}: `mesh task ls {service}` lists them")
    return (await session.store.transact((), (Delete(key),))).revision

"""`mesh task`: the replicas of services, added by hand or run here; listed, drained and removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mesh import errors
from mesh.cli import options, output, task_drain

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.cli.options import Session
    from mesh.cli.world import World
    from mesh.model.report import Health
    from mesh.model.task import Task


@click.group(cls=options.Noun)
def task() -> None:
    """Add, run, list, drain and remove replicas of services."""


_WEIGHT = click.option(
    "--weight",
    type=click.IntRange(0, 255),
    default=1,
    show_default=True,
    help="Its share of new connections; 0: none.",
)


@task.command()
@click.argument("service")
@click.argument("id")
@click.option("--node", required=True, metavar="NAME", help="Where it runs.")
@click.option(
    "-a",
    "--address",
    "addresses",
    multiple=True,
    required=True,
    metavar="ADDR",
    help="Its address, one of each family; repeatable.",
)
@_WEIGHT
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="For policies.")
@click.option("--netns", metavar="PATH", help="Its network namespace, for checks of type exec.")
def add(
    service: str,
    id: str,
    node: str,
    addresses: tuple[str, ...],
    weight: int,
    labels: tuple[str, ...],
    netns: str | None,
) -> None:
    """Register a replica that something else runs."""
    from msgspec import UNSET

    from mesh.model.address import parse_address
    from mesh.model.task import Task

    with options.naming("--address"):
        parsed = tuple(parse_address(text) for text in addresses)
    with options.naming(f"task {service}/{id}"):
        record = Task(
            service=service,
            id=id,
            node=node,
            addresses=parsed,
            weight=weight,
            labels=options.labels(labels),
            netns=UNSET if netns is None else netns,
        )
    stray = options.in_store(lambda session: _write(session, record))
    for address in stray:
        output.warn(f"--address {address} is outside the container subnets of node {node}")
    if options.as_json():
        output.document(record)
    else:
        output.done(f"Task added: {service}/{id} on {node}, {', '.join(parsed)}")


async def _write(session: Session, record: Task) -> list[str]:
    """Write a new task; returns those of its addresses that are not of its node's subnets."""
    from mesh.cli import world
    from mesh.model.address import contains
    from mesh.store import schema
    from mesh.store.protocol import Compare, Put

    keys, seen = session.keys, await world.read(session)
    seen.service(record.service)
    if record.node not in seen.nodes:
        raise errors.NotFound(f"--node: no node {record.node!r}: `mesh node ls` lists them")
    key = keys.task(record.service, record.id)
    written = await session.store.transact((Compare(key, 0),), (Put(key, schema.encode(record)),))
    if not written.succeeded:
        raise errors.Conflict(
            f"task {record.service}/{record.id} exists: choose another ID, or remove it with "
            f"`mesh task rm {record.service} {record.id}`"
        )
    network = seen.network(record.node)
    subnets = network.subnets if network is not None else ()
    return [a for a in record.addresses if subnets and not any(contains(s, a) for s in subnets)]


@task.command()
@click.argument("service")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD…")
@click.option("--id", metavar="ID", help="Its name (default: the service's and six digits).")
@_WEIGHT
@click.option("--no-restart", is_flag=True, help="End when the command ends.")
def run(
    service: str, command: tuple[str, ...], id: str | None, weight: int, no_restart: bool
) -> None:
    """Run CMD in a container on this node's bridge, as a replica of SERVICE.

    It is registered while it runs and withdrawn before it is stopped (SIGTERM or Ctrl-C).
    Exits with the command's code.
    """
    import logging
    import random

    import msgspec

    from mesh.containers.run import RunOptions, default_id, run_task

    logging.basicConfig(format="mesh: %(message)s", level=logging.WARNING)
    logging.getLogger("mesh.containers").setLevel(logging.INFO)  # says when it is registered
    config = msgspec.structs.replace(options.agent_config(), etcd=options.etcd_config())
    wanted = RunOptions(
        service=service,
        id=id if id is not None else default_id(service, random.Random()),
        command=command,
        weight=weight,
        restart=not no_restart,
    )

    async def supervise(session: Session) -> int:
        if await session.store.get(session.keys.service(service)) is None:
            output.warn(
                f"no service {service!r} yet: nothing is sent to its tasks until "
                f"`mesh service create {service}`"
            )
        return await run_task(session.store, session.keys, config, wanted)

    options.exit_with(options.in_store(supervise))


@task.command("ls")
@click.argument("service", required=False)
def list_(service: str | None) -> None:
    """List the tasks of a service, or of all."""
    from mesh.cli import world

    seen = options.in_store(world.read)
    if service is not None and service not in {known for known, _ in seen.tasks}:
        seen.service(service)
    names = sorted(seen.tasks, key=lambda name: (world.natural(name[0]), world.natural(name[1])))
    found = [seen.tasks[name] for name in names if service in (None, name[0])]
    if options.as_json():
        output.document([describe(seen, item) for item in found])
    else:
        print_table(seen, found, with_service=True)


def print_table(seen: World, tasks: Iterable[Task], *, with_service: bool = False) -> None:
    """Print tasks, one a line."""
    from mesh.cli import ports

    def row(item: Task) -> list[output.Cell]:
        health = seen.health_of(item)
        return [
            *([item.service] if with_service else []),
            item.id,
            item.node,
            ", ".join(item.addresses),
            _state(seen, item),
            "-" if health is None else _health(health),
            ports.notation(ports.of_task(seen.published_of(item))) or "-",
        ]

    columns = ("TASK", "NODE", "ADDRESSES", "STATE", "HEALTH", "PORTS")
    output.table(("SERVICE", *columns) if with_service else columns, [row(t) for t in tasks])


def _state(seen: World, item: Task) -> output.Cell:
    """What the task wants, unless its node is gone or drains."""
    from mesh.model.task import TaskState

    if item.node not in seen.alive:
        return output.Styled("node down", "red")
    if item.state is not TaskState.RUNNING or item.node in seen.draining:
        return output.Styled("draining", "yellow")
    if item.weight == 0:
        return output.Styled(f"{item.state.value}, weight 0", "yellow")
    return str(item.state.value)


def _health(health: Health) -> output.Cell:
    """What HEALTH says of a task: its standing, since when, and why."""
    name, style = ("healthy", "green") if health.healthy else ("unhealthy", "red")
    if health.starting:
        name, style = "starting", "yellow"
    since = _ago(health.since)
    return output.Styled(name + since + (f": {health.reason}" if health.reason else ""), style)


def _ago(since: str) -> str:
    """How long ago a time of a record was; nothing for one that nobody can read."""
    from datetime import UTC, datetime

    try:
        passed = (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds()
    except (ValueError, TypeError):
        return ""
    return f" {output.lasted(passed)}"


def describe(seen: World, item: Task) -> dict[str, Any]:
    """A task as one JSON object: its record, its health and host ports, and whether it gets new
    connections.
    """
    import msgspec

    from mesh.cli import ports

    view = seen.state.service_view(item.service)
    return {
        **msgspec.to_builtins(item),
        "health": seen.health_of(item),
        "ports": ports.swarm(ports.of_task(seen.published_of(item))),
        "nodeAlive": item.node in seen.alive,
        "eligible": view is not None and seen.serves(view, item),
    }


task.add_command(task_drain.drain)
task.add_command(task_drain.activate)
task.add_command(task_drain.rm)

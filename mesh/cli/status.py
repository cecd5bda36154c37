"""`mesh status`: how the whole mesh is, and what to do about what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from mesh.cli import options, output

if TYPE_CHECKING:
    from mesh.agent.config import EtcdConfig
    from mesh.cli.options import Session
    from mesh.cli.world import World
    from mesh.model.report import Peers, Problem


PATIENCE: Final = 1.0
"""Seconds that a node may be behind without being called so."""


@click.command(cls=options.Verb)
@click.option("--check", is_flag=True, help="Exit with 1 if there is any problem.")
def status(check: bool) -> None:
    """Say how the whole mesh is: etcd, nodes, services, and every known problem."""
    from mesh.cli import peers

    seen, etcd = options.in_store(_read)
    problems, told = _problems(seen), peers.read()
    if options.as_json():
        output.document(_describe(seen, etcd, problems, told))
    else:
        _print(seen, etcd, problems, told)
    if check and problems:
        options.exit_with(1)


async def _read(session: Session) -> tuple[World, EtcdConfig]:
    """The world, in which a node is behind only if it was so a second ago too."""
    import asyncio

    from mesh.cli import world

    world.cluster(session)
    seen = await world.read(session)
    if any(seen.is_behind(name) for name in seen.alive):
        await asyncio.sleep(PATIENCE)
        needed, seen = seen.needed, await world.read(session)
        seen.needed = needed
    return seen, session.etcd


def _problems(seen: World) -> list[Problem]:
    from mesh.cli import world
    from mesh.model.report import Problem

    found = list(seen.problems)
    if seen.leader is None:
        message = "no manager leads, nothing is allocated: start an agent with role manager"
        found.append(Problem(about="controller", message=message))
    for name in sorted(seen.nodes, key=world.natural):
        found += (Problem(about=f"node {name}", message=text) for text in _of_node(seen, name))
    for name in sorted(seen.state.services(), key=world.natural):
        found += (
            Problem(about=f"service {name}", message=text) for text in _of_service(seen, name)
        )
    return found


def _of_node(seen: World, name: str) -> list[str]:
    from mesh.cli import peers

    if name not in seen.alive:
        return [f"down: start `mesh agent` there, or forget it with `mesh node rm {name}`"]
    found = []
    if seen.network(name) is None:
        found.append("has no number yet: it carries no traffic until a manager gives it one")
    applied = seen.applied.get(name)
    if applied is None:
        found.append("has applied nothing yet: see the log of its agent")
    elif seen.is_behind(name):
        text = f"has applied revision {applied.revision} of {seen.needed}"
        found.append(f"{text}: see the log of its agent")
    if applied is not None:
        found += [f"{problem.about}: {problem.message}" for problem in applied.problems]
    found += [problem.message for problem in seen.reports.get(("nodes", name), ())]
    if away := peers.unreached_by(seen, name):
        found.append(
            f"cannot be reached over the overlay by {', '.join(away)}: its tasks get no "
            "connections from there; run `mesh doctor` on both"
        )
    return found


def _of_service(seen: World, name: str) -> list[str]:
    from mesh.cli import ports

    view = seen.service(name)
    found = [problem.message for problem in seen.problems_of(name)]
    if not found and seen.leader is not None:
        if view.spec.vip != "none" and not view.vips:
            found.append("has no VIP yet")
        waiting = ports.warren(item for item in ports.assign(view) if not item.granted)
        if view.spec.local_health_port and view.local_health is None:
            waiting.append(f"{view.spec.local_health_port}/tcp (local health)")
        if waiting:
            found.append(f"waits for {', '.join(waiting)}")
    if view.tasks and not view.eligible(seen.alive):
        found.append(f"none of its {len(view.tasks)} tasks takes connections: `mesh service ps`")
    return found


def _security(etcd: EtcdConfig) -> tuple[str, bool]:
    """How etcd is protected, and whether anybody who reaches it may write."""
    tls = all(url.startswith("https://") for url in etcd.endpoints)
    who = "client certificate" if etcd.cert else f"user {etcd.user}" if etcd.user else None
    if not tls:
        return f"open: no TLS, {who or 'no authentication'}", True
    return f"TLS, {who or 'open: no authentication'}", who is None


def _describe(
    seen: World, etcd: EtcdConfig, problems: list[Problem], told: Peers | None
) -> dict[str, Any]:
    from mesh.cli import node, ports, world

    views = [view for name in seen.state.services() if (view := seen.state.service_view(name))]
    names = sorted(seen.nodes, key=world.natural)
    return {
        "ok": not problems,
        "etcd": {
            "endpoints": etcd.endpoints,
            "prefix": etcd.prefix,
            "revision": seen.revision,
            "security": _security(etcd)[0],
            "open": _security(etcd)[1],
        },
        "cluster": seen.state.cluster.id if seen.state.cluster is not None else None,
        "leader": seen.leader,
        "nodes": [node.describe(seen, name, told) for name in names],
        "services": len(views),
        "ports": sum(len(ports.assign(view)) for view in views),
        "tasks": len(seen.tasks),
        "eligibleTasks": sum(len(view.eligible(seen.alive)) for view in views),
        "unhealthyTasks": sum(seen.is_unhealthy(task) for task in seen.tasks.values()),
        "problems": problems,
    }


def _print(seen: World, etcd: EtcdConfig, problems: list[Problem], told: Peers | None) -> None:
    from mesh.cli import node, peers

    facts = _describe(seen, etcd, problems, told)
    security, is_open = _security(etcd)
    where = f"{', '.join(etcd.endpoints)}  prefix {etcd.prefix}  revision {seen.revision}"
    click.echo(f"etcd      {output.printable(where)}  ", nl=False)
    output.line(security, "red" if is_open else "green")
    output.line(f"cluster   {facts['cluster'] or '?'}  leader {seen.leader or 'none'}")
    unhealthy = facts["unhealthyTasks"]
    output.line(
        f"services  {facts['services']} with {facts['ports']} published ports, "
        f"{facts['eligibleTasks']} of {facts['tasks']} tasks take connections"
        + (f", {unhealthy} unhealthy" if unhealthy else ""),
        "yellow" if unhealthy else None,
    )
    if facts["nodes"]:
        _print_backends(seen)
        _print_healings(seen)
        click.echo()
        output.table(node.COLUMNS, [node.row(seen, known["name"]) for known in facts["nodes"]])
        peers.show(told)
    else:
        click.echo("nodes     none: run `mesh node join NAME` on every host")
    click.echo()
    if not problems:
        output.done("no known problem")
    for problem in problems:
        output.line(f"! {problem.about}: {problem.message}", "red")


def _print_backends(seen: World) -> None:
    """Which backends drive the nodes, and why these."""
    from mesh.cli import world

    by_reason: dict[str, list[str]] = {}
    for name in sorted(seen.applied.keys() & seen.nodes.keys(), key=world.natural):
        applied = seen.applied[name]
        why = f": {applied.reason}" if applied.reason else ""
        by_reason.setdefault(f"{applied.backend}{why}", []).append(name)
    title = "backend "
    for told, names in by_reason.items():
        output.line(f"{title}  {told} ({', '.join(names)})")
        title = " " * len(title)


def _print_healings(seen: World) -> None:
    """Which nodes had to put right what others changed."""
    from mesh.cli import world

    title = "healed  "
    for name in sorted(seen.applied.keys() & seen.nodes.keys(), key=world.natural):
        healings = seen.applied[name].healings
        if healings.total:
            times = "once" if healings.total == 1 else f"{healings.total} times"
            last = healings.last
            when = f", last {last.at}: {last.what}, by {last.by}" if last is not None else ""
            output.line(f"{title}  {name} {times}{when}", "yellow")
            title = " " * len(title)

"""`mesh publish`, `unpublish` and `published`: ports of containers on this host, without etcd."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from mesh import errors
from mesh.cli import options, output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mesh.hostports import HostPortPublisher
    from mesh.hostports.publications import Publication
    from mesh.model.mapping import PortMapping
    from mesh.model.publish import PublishedPort
    from mesh.model.report import Problem

    Command = Callable[..., Any]

_OPTIONS = (
    click.option(
        "--state-dir",
        default="/var/lib/mesh/hostports",
        show_default=True,
        envvar="MESH_HOSTPORTS_DIR",
        metavar="DIR",
        help="What remembers the ports [env: MESH_HOSTPORTS_DIR].",
    ),
    click.option(
        "--backend",
        default="auto",
        show_default=True,
        envvar="MESH_BACKEND",
        metavar="NAME",
        help="nftables, iptables, iptables-legacy, iptables-nft or auto [env: MESH_BACKEND].",
    ),
    click.option(
        "--firewall",
        default="forward",
        show_default=True,
        metavar="MODE",
        help="What may be done about a firewall that drops: report, forward or open.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
)


def _with_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@contextmanager
def _publisher(
    state_dir: str, backend: str, firewall: str, **more: Any
) -> Iterator[HostPortPublisher]:
    """A publisher for one verb; says why the next step takes a while, and what is wrong."""
    from mesh.hostports import HostPortPublisher

    with HostPortPublisher(state_dir, backend=backend, firewall=firewall, **more) as publisher:
        yield publisher
        for problem in publisher.problems:
            output.warn(f"{problem.about}: {problem.message}")


@click.command()
@click.argument("task")
@click.argument("addresses", nargs=-1, required=True, metavar="ADDRESS [ADDRESS]")
@click.option(
    "-p",
    "--publish",
    "texts",
    multiple=True,
    required=True,
    metavar="PORT",
    help="[hostIP:][published[-end]:]target[-end][/tcp|udp|sctp], or "
    "target=CTR,published=PUB with protocol=, host_ip=, name=; repeatable.  Without a published "
    "port, or with 0, one is chosen; with `random`, at random.",
)
@click.option(
    "--force", is_flag=True, help="Publish ports too that are protected (22, 2379, 2380) or in use."
)
@click.option(
    "--dynamic",
    default="32000-32999",
    show_default=True,
    metavar="FIRST-LAST",
    help="Where ports are chosen from.",
)
@_with_options
def publish(
    task: str,
    addresses: tuple[str, ...],
    texts: tuple[str, ...],
    force: bool,
    dynamic: str,
    as_json: bool,
    **host: str,
) -> None:
    """Lead ports of this host to the container of TASK at ADDRESS (one of each family), without
    etcd.

    These ports and no others: a task that is published again has its ports replaced, all at once.
    The same again changes nothing, and puts back what was lost in a reboot.
    """
    wanted = _ports(texts, force=force)
    with _publisher(**host, dynamic=_range(dynamic)) as publisher:
        mappings = publisher.publish_ports(task, addresses, wanted)
        done, problems = publisher.published()[task], publisher.problems
    if as_json or options.as_json():
        output.document(_described(done, problems))
    else:
        output.done(f"Published: {task}: {_notation(mappings)}")


@click.command()
@click.argument("task", required=False)
@click.option("--all", "everything", is_flag=True, help="Every task's, and all that serves them.")
@click.option(
    "--force", is_flag=True, help="With --all: also what another state directory published."
)
@_with_options
def unpublish(task: str | None, everything: bool, force: bool, as_json: bool, **host: str) -> None:
    """Take the ports of TASK back: new connections are refused."""
    if (task is None) != everything or (force and not everything):
        raise errors.BadUsage("name one TASK, or give --all (with --force, if need be)")
    with _publisher(**host) as publisher:
        gone = sorted(publisher.published()) if task is None else [task]
        if task is None:
            publisher.cleanup(force=force)
        elif not publisher.unpublish_ports(task):
            raise _unknown(task)
    if as_json or options.as_json():
        output.document({"unpublished": gone})
    elif task is None:
        output.done("Unpublished: everything; no rule and no file is left")
    else:
        output.done(f"Unpublished: {task}")


@click.command()
@click.argument("task", required=False)
@click.option("--check", is_flag=True, help="Put right what somebody else did to the rules.")
@click.option(
    "--restore",
    is_flag=True,
    help="Install what is remembered: after a reboot, or in a new network namespace.",
)
@_with_options
def published(task: str | None, check: bool, restore: bool, as_json: bool, **host: str) -> None:
    """List the ports of TASK, or of all."""
    repaired = False
    with _publisher(**host) as publisher:
        if restore:
            publisher.restore()
        if check:
            repaired = bool(publisher.check().repaired)
        problems = publisher.problems
        known = publisher.published()
    if task is not None and task not in known:
        raise _unknown(task)
    found = [known[name] for name in sorted(known) if task in (None, name)]
    if repaired:
        output.warn("somebody had changed the rules: they are as they should be again")
    if as_json or options.as_json():
        output.document([_described(each, problems) for each in found])
    else:
        output.table(("TASK", "ADDRESSES", "PORTS"), [_row(each) for each in found])


def _row(publication: Publication) -> list[output.Cell]:
    shown = ", ".join(publication.addresses)
    return [publication.task, shown, _notation(publication.mappings)]


def _unknown(task: str) -> errors.NotFound:
    return errors.NotFound(f"no task {task!r} has ports here: `mesh published` lists those that do")


def _ports(texts: Iterable[str], *, force: bool) -> list[PublishedPort]:
    import msgspec

    from mesh.hostports import asked

    found = asked.ports(texts)
    return [msgspec.structs.replace(port, force=force) for port in found]


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not (low.isdecimal() and high.isdecimal()):
        raise errors.BadUsage(f"--dynamic {text!r}: write FIRST-LAST, as 32000-32999")
    return int(low), int(high)


def _notation(mappings: Iterable[PortMapping]) -> str:
    """As Swarm has it: "*:32000->80/tcp"."""
    from mesh.cli import ports

    return ports.plain(ports.of_task(mappings))


def _described(publication: Publication, problems: Iterable[Problem]) -> dict[str, Any]:
    """Galaxy's `[]Port`, and what it is about."""
    return {
        "task": publication.task,
        "addresses": publication.addresses,
        "ports": publication.mappings,
        "problems": list(problems),
    }

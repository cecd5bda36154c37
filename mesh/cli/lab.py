"""`mesh lab`: a whole cluster in namespaces of this machine; start, inspect, disturb and end it."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from mesh.agent.config import BACKENDS
from mesh.cli import lab_demo, options, output

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from mesh.lab.client import Lab, OwnLab
    from mesh.lab.wire import LabStatus

T = TypeVar("T")

_ETCD: Final = "etcd"


@click.group(cls=options.Noun)
def lab() -> None:
    """A whole cluster in namespaces of this machine.

    It touches nothing of this machine's network, and nothing of it is left when it ends.
    """


_NAME: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--name",
    default="lab",
    show_default=True,
    envvar="MESH_LAB",
    help="Which lab; several run side by side [env: MESH_LAB].",
)


@lab.command()
@_NAME
@click.option("--nodes", type=click.IntRange(1, 50), default=3, show_default=True)
@click.option("--keep", is_flag=True, help="Only `mesh lab down` ends it.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", help="What drives rules.")
@click.option("--foreground", is_flag=True, help="Stay; Ctrl-C or any end of the caller ends it.")
def up(name: str, nodes: int, keep: bool, foreground: bool, backend: str) -> None:
    """Start a lab and wait until all of its nodes forward.

    It ends with `mesh lab down`, and when a process above this one is killed by a signal: its
    shell, terminal or test.
    """
    if keep and foreground:
        raise click.UsageError("--keep and --foreground exclude each other")
    from mesh.lab import ancestry, client

    watched = [] if keep else ancestry.above(any_end_of_caller=foreground)
    own = client.launch(name, nodes, watched, backend)
    options.exit_with(_run(_stay(own) if foreground else _leave(own)))


async def _leave(own: OwnLab) -> int:
    try:
        await _ready(own)
    except BaseException:
        await own.end()
        raise
    own.release()
    return 0


async def _stay(own: OwnLab) -> int:
    import asyncio

    loop, work = asyncio.get_running_loop(), asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, lambda: work.cancel() if work else None)
    try:
        await _ready(own)
        await own.ended()
    except asyncio.CancelledError:
        return 0
    finally:
        await own.end()
    output.fail(f"lab {own.name} ended")
    return 1


async def _ready(own: OwnLab) -> None:
    await own.built()
    await own.form()
    _show(await own.status())
    sys.stdout.flush()


lab.add_command(lab_demo.demo)


@lab.command()
@_NAME
def status(name: str) -> None:
    """Show a lab's nodes and clients, and how to enter them."""
    _show(_run(_lab(name).status()))


@lab.command("ls")
def list_() -> None:
    """List the labs that run here."""
    from mesh.lab import control

    names = control.names()
    if options.as_json():
        output.document(names)
    else:
        output.table(("LAB",), [(name,) for name in names])


@lab.command("exec")
@_NAME
@click.argument("machine")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(name: str, machine: str, command: tuple[str, ...]) -> None:
    """Run COMMAND on MACHINE: a node, a client, `router` or `switch`; write it after --.

    Exits with the command's code.
    """
    import os

    from mesh.lab import control, environment, inside, wire

    pid = _run(control.call(name, wire.Where(machine=machine)))
    options.exit_with(inside.run(pid, command, environment.inside(os.environ)))


@lab.command()
@_NAME
@click.argument("service")
@click.argument("node")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--id", metavar="ID", help="The task's name (default: the service's and a number).")
def task(name: str, service: str, node: str, command: tuple[str, ...], id: str | None) -> None:
    """Run COMMAND in a container on NODE, registered as a replica of SERVICE.

    Returns when every node sends it connections; `mesh lab logs ID` has its output.
    """
    started = _run(_lab(name).run_task(service, node, command, id))
    if options.as_json():
        output.document(started)
    else:
        output.done(f"Task started: {started.id} of {service} on {node}")


@lab.command()
@_NAME
@click.argument("target")
@click.option("--agent", is_flag=True, help="Only the agent of the node; forwarding goes on.")
def kill(name: str, target: str, agent: bool) -> None:
    """Power a node off, or kill a task or `etcd` (SIGKILL)."""
    from mesh.lab import client

    _run(client.kill(name, target, agent_only=agent))
    _tell(f"Killed: {'the agent of ' if agent else ''}{target}", {"killed": target})


@lab.command()
@_NAME
@click.argument("target")
def stop(name: str, target: str) -> None:
    """Stop the agent of a node, a task or `etcd`, as if it hung (SIGSTOP)."""
    _signal(name, target, signal.SIGSTOP)
    _tell(f"Stopped: {target}", {"stopped": target})


@lab.command()
@_NAME
@click.argument("target")
def cont(name: str, target: str) -> None:
    """Let what `stop` stopped go on (SIGCONT)."""
    _signal(name, target, signal.SIGCONT)
    _tell(f"Goes on: {target}", {"continued": target})


@lab.command()
@_NAME
@click.argument("target")
def start(name: str, target: str) -> None:
    """Power a node on, or start its killed agent, or `etcd`; wait until it works."""
    from mesh.lab import control, wire

    if target == _ETCD:
        _run(control.call(name, wire.Start(target=target)))
    else:
        _run(_lab(name).power_on(target))
    _tell(f"Started: {target}", {"started": target})


@lab.command()
@_NAME
@click.argument("source", metavar="NODE|TASK|etcd|lab")
def logs(name: str, source: str) -> None:
    """Print the end of a log: of a node's agent, a task, `etcd`, or the lab itself."""
    from mesh.lab import control, wire

    text = _run(control.call(name, wire.Logs(name=source)))
    if options.as_json():
        output.document({"log": text})
    else:
        for line in text.splitlines():
            output.line(line)


@lab.command()
@_NAME
def down(name: str) -> None:
    """End a lab; returns when nothing of it is left."""
    from mesh.lab import control

    _run(control.down(name))
    _tell(f"Lab ended: {name}", {"ended": name})


def _lab(name: str) -> Lab:
    from mesh.lab.client import Lab

    return Lab(name)


def _run(work: Coroutine[Any, Any, T]) -> T:
    import asyncio

    return asyncio.run(work)


def _signal(name: str, target: str, number: int) -> None:
    from mesh.lab import control, wire

    _run(control.call(name, wire.Signal(target=target, number=number)))


def _tell(text: str, document: dict[str, str]) -> None:
    if options.as_json():
        output.document(document)
    else:
        output.done(text)


def _show(status: LabStatus) -> None:
    if options.as_json():
        output.document(status)
        return
    output.line(f"lab {status.name}, etcd {status.etcd}")
    rows: list[tuple[str, ...]] = [
        (n.name, n.underlay4, n.underlay6, n.overlay4 or "-", n.subnet4 or "-", _agent(n.agent_pid))
        for n in status.nodes
    ]
    rows += [(c.name, c.address4, c.address6, "-", "-", "-") for c in status.clients]
    output.table(("MACHINE", "IPV4", "IPV6", "OVERLAY", "CONTAINERS", "AGENT"), rows)


def _agent(pid: int | None) -> str:
    return "not running" if pid is None else str(pid)

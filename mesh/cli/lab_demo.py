"""`mesh lab demo`: what the mesh does, shown and checked in a lab of its own, in half a minute."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mesh.cli import options, output

if TYPE_CHECKING:
    from mesh.cli.lab_demo_screen import Screen
    from mesh.lab.client import OwnLab
    from mesh.lab.demo import Outcome


@click.command(cls=options.Verb)
@click.option("--name", default="demo", show_default=True, help="What the lab is called.")
@click.option("--keep", is_flag=True, help="Leave the lab running, to look around in it.")
def demo(name: str, keep: bool) -> None:
    """Show what the mesh does: every row is asked for, and compared with what is right.

    Three nodes, two clients outside, `web` in ingress mode, `db` in host mode; then an agent, a
    replica and a node are killed.  Exits with 1 and the reasons if something is not as it should.
    """
    import asyncio

    from mesh.cli import lab_demo_screen
    from mesh.lab import client, demo_rows

    began = time.monotonic()
    own = client.launch(name, demo_rows.NODES, ())
    with lab_demo_screen.opened(as_json=options.as_json()) as screen:
        outcome = asyncio.run(_perform(own, screen, keep=keep))
        seconds = time.monotonic() - began
        screen.end(outcome, seconds)
    if options.as_json():
        output.document(_document(outcome, seconds))
    if keep:
        _tell_how_to_go_on(name)
    options.exit_with(0 if all(check.ok for check in outcome.checks) else 1)


async def _perform(own: OwnLab, screen: Screen, *, keep: bool) -> Outcome:
    """Run the demo; the lab ends with it, and on any signal, unless it is to be kept."""
    import asyncio

    from mesh.lab import demo

    loop, work = asyncio.get_running_loop(), asyncio.current_task()
    received: list[int] = []

    def cancel(number: int) -> None:
        if work and not received:  # a second one would disturb the clearing up
            work.cancel()
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, cancel, number)
    try:
        outcome = await demo.run(own, screen)
    except asyncio.CancelledError:
        await own.end()
        options.exit_with(128 + received[0])
    except BaseException:
        await own.end()
        raise
    if keep:
        own.release()
    else:
        await own.end()
    return outcome


def _document(outcome: Outcome, seconds: float) -> dict[str, Any]:
    document: dict[str, Any] = {
        "ok": all(check.ok for check in outcome.checks),
        "seconds": round(seconds, 1),
        "checks": [check._asdict() for check in outcome.checks],
    }
    return document | ({"logs": outcome.logs} if outcome.logs else {})


def _tell_how_to_go_on(name: str) -> None:
    """On stderr, so that it may stand beside a JSON document."""
    called = Path(sys.argv[0])
    mesh = str(called.absolute()) if called.name == "mesh" else f"{sys.executable} -m mesh"
    for what, verb in {
        "End the lab": "down",
        "Its machines": "status",
        "Power the node on": "start n2",
        "Ask from outside": "exec c2 -- curl -s http://192.168.50.13:8080",
        "Work on a node": f"exec n1 -- {mesh} status",
    }.items():
        word, _, rest = verb.partition(" ")
        command = f"{mesh} lab {word} --name {name} {rest}".rstrip()
        click.echo(f"{what + ':':18} {command}", err=True)

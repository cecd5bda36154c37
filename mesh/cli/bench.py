"""`mesh bench`: what the mesh costs on this machine, as a table or JSON.  Prints, never asserts."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@click.group()
def bench() -> None:
    """Measure the mesh on this machine, in namespaces of its own."""


_SERVICES: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--services",
    "sizes",
    multiple=True,
    type=click.IntRange(1, 65000),
    default=(10000,),
    show_default=True,
    help="How many services; repeatable.",
)


@bench.command()
@_SERVICES
@click.option("--rounds", type=click.IntRange(10, 100000), default=2000, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def engine(sizes: tuple[int, ...], rounds: int, *, as_json: bool) -> None:
    """From an event in the agent to the kernel's acknowledgement, without etcd.

    Three replicas per service, IPv4 and IPv6, a VIP and an ingress port each.
    """
    import asyncio

    from mesh.bench import engine as measured
    from mesh.bench import isolated, records
    from mesh.dataplane.nftables import NftablesDriver
    from mesh.rules.program import Devices, Parameters

    isolated.isolate()

    async def measure() -> list[dict[str, object]]:
        found = []
        for size in sizes:
            devices = Devices("warren0", "warren-x0", "warren-br0", "02:4d:45:53:00:01")
            driver = NftablesDriver(Parameters.of(records.CLUSTER, 1, devices))
            try:
                found.append(await measured.run(driver, size, rounds))
            finally:
                await driver.remove()
                driver.close()
        return found

    _print(asyncio.run(measure()), as_json=as_json)


@bench.command()
@_SERVICES
@click.option("--rounds", type=click.IntRange(10, 100000), default=500, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def live(sizes: tuple[int, ...], rounds: int, *, as_json: bool) -> None:
    """From a write to etcd to the kernel, and to a connection, in a lab of one node."""
    import asyncio

    from mesh.bench import live as measured

    def tell(what: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r\033[K{what} …", nl=False, err=True)

    async def measure() -> list[dict[str, object]]:
        return [await measured.run(size, rounds, tell) for size in sizes]

    found = asyncio.run(measure())
    tell("done")
    _print(found, as_json=as_json)


def _print(found: list[dict[str, object]], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found))
        return
    for figures in found:
        for name, value in figures.items():
            click.echo(f"{name:18} {_shown(value)}")
        click.echo()


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return _pairs(value)
    return str(value)


def _pairs(values: Mapping[str, object]) -> str:
    return "  ".join(f"{name} {value}" for name, value in values.items())

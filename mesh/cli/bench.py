"""`mesh bench`: what the mesh costs on this machine, as tables, JSON and pictures.

Prints, never asserts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mesh.bench import names
from mesh.cli import bench_show, options, output

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mesh.bench.variants import Variant

    Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _numbers(option: str, default: str, what: str, least: int, most: int = 9000) -> Decorator:
    def parsed(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> list[int]:
        parts = [part.strip() for text in given for part in text.split(",")]
        sizes = [int(part) if part.isdecimal() else -1 for part in parts]
        if not all(least <= size <= most for size in sizes):
            shown = ",".join(parts)
            said = f"{shown!r}: write numbers from {least} to {most}, as 10,1000"
            raise click.BadParameter(said)
        return list(dict.fromkeys(sizes))

    return click.option(
        option,
        multiple=True,
        callback=parsed,
        default=(default,),
        metavar="N,N,…",
        show_default=True,
        help=what,
    )


def _services(default: str) -> Decorator:
    what = "How many services; repeatable."
    return _numbers("--services", default, what, 1, names.MOST)


def _backend(default: str) -> Decorator:
    return click.option(
        "--backend",
        type=click.Choice((*names.BACKENDS, "all")),
        default=default,
        show_default=True,
        help="What drives the rules.",
    )


def _rounds(low: int, default: int, what: str) -> Decorator:
    return click.option(
        "--rounds",
        type=click.IntRange(low, 100000),
        default=default,
        show_default=True,
        help=what,
    )


_ALL_SIZES: Decorator = click.option(
    "--all-sizes",
    is_flag=True,
    help="Also those that take many minutes.",
)

_FAMILY: Decorator = click.option(
    "--family", type=click.Choice(("4", "6")), default="4", show_default=True
)

_JSON: Decorator = click.option(
    "--json",
    "to",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Print one JSON array; or write it to FILE, beside the table.",
)


@click.group()
def bench() -> None:
    """Measure the mesh on this machine, in namespaces of its own."""


@bench.command()
@_services("10000")
@_backend("nftables")
@_rounds(2, 2000, "How many single changes, at most; 20 seconds of each kind.")
@_ALL_SIZES
@_JSON
def engine(services: list[int], backend: str, rounds: int, all_sizes: bool, to: str | None) -> None:
    """From an event in the agent to the kernel's acknowledgement, without etcd.

    Three replicas per service, IPv4 and IPv6, a VIP and an ingress port each.
    """
    from mesh.bench import isolated

    results = bench_show.Results(_target(to))
    for name, size in _cases(services, backend, all_sizes=all_sizes):
        arguments = {"backend": name, "services": size, "rounds": rounds}
        with results.excusing(names.case(name, size)):
            results.add([isolated.measure("mesh.bench.engine", arguments)])
    _finish(results, bench_show.by_size)


@bench.command()
@_services("10,1000,10000")
@_backend("all")
@_rounds(1, 20, "How often every rule set has its turn.")
@_FAMILY
@click.option("--kube-proxy/--no-kube-proxy", default=True, help="Compare with kube-proxy's rules.")
@_ALL_SIZES
@_JSON
def dataplane(
    services: list[int],
    backend: str,
    rounds: int,
    family: str,
    kube_proxy: bool,
    all_sizes: bool,
    to: str | None,
) -> None:
    """What a new connection costs through a node, against plain routing.

    Beside our program, on each backend and at each size, in the same run: conntrack alone, one DNAT
    rule, and the rules that kube-proxy writes for the same services.  All replicas are on the node;
    every fourth service is UDP.  Quick: --rounds 3 --services 10,100 --backend nftables.
    """
    from mesh.bench import dataplane as measured
    from mesh.bench import isolated

    chosen = _names(backend)
    every = measured.planned(chosen, services, kube_proxy=kube_proxy, slow=True)
    variants = measured.planned(chosen, services, kube_proxy=kube_proxy, slow=all_sizes)
    _tell_left_out(_as_cases(variants), _as_cases(every))
    results = bench_show.Results(_target(to))
    arguments = {
        "variants": _as_cases(variants),
        "family": int(family),
        "rounds": rounds,
    }
    results.add(isolated.measure("mesh.bench.dataplane", arguments))
    _finish(results, bench_show.by_variant)


@bench.command()
@_backend("all")
@_rounds(1, 20, "How often every way has its turn.")
@_FAMILY
@_JSON
def across(backend: str, rounds: int, family: str, to: str | None) -> None:
    """What it costs to reach a replica on another node, against plain routing.

    A service that masquerades its clients, and one that keeps their addresses; connections,
    datagrams, and bytes on an open connection.  A veth stands in for WireGuard, which costs the
    same on every way.
    """
    from mesh.bench import isolated

    results = bench_show.Results(_target(to))
    arguments = {"backends": _names(backend), "family": int(family), "rounds": rounds}
    results.add(isolated.measure("mesh.bench.across", arguments))
    _finish(results, bench_show.by_way)


@bench.command()
@_services("10000")
@_backend("nftables")
@_rounds(2, 500, "How many single changes, at most.")
@_ALL_SIZES
@_JSON
def live(services: list[int], backend: str, rounds: int, all_sizes: bool, to: str | None) -> None:
    """From a write to etcd to the kernel, and to a connection, in a lab of one node."""
    import asyncio

    from mesh.bench import live as measured
    from mesh.bench.progress import tell

    results = bench_show.Results(_target(to))
    for name, size in _cases(services, backend, all_sizes=all_sizes):
        with results.excusing(names.case(name, size)):
            results.add([asyncio.run(measured.run(name, size, rounds))])
        tell("")
    _finish(results, bench_show.by_size)


@bench.command()
@click.option("--checks", type=click.IntRange(1, 50000), default=1000, show_default=True)
@click.option(
    "--interval", type=click.FloatRange(0.1, 3600), default=5.0, show_default=True, help="Seconds."
)
@click.option(
    "--seconds", type=click.FloatRange(1, 3600), default=20.0, show_default=True, help="Of each."
)
@click.option(
    "--type",
    "types",
    type=click.Choice(names.CHECKS),
    multiple=True,
    default=("tcp", "http"),
    show_default=True,
    help="Repeatable.",
)
@_JSON
def health(
    checks: int, interval: float, seconds: float, types: tuple[str, ...], to: str | None
) -> None:
    """What health checks cost a node: processor and memory of the agent's prober."""
    from mesh.bench import isolated

    results = bench_show.Results(_target(to))
    arguments = {"checks": checks, "interval": interval, "seconds": seconds, "types": types}
    results.add(isolated.measure("mesh.bench.health", arguments))
    _finish(results, bench_show.by_check)


@bench.command()
@_numbers("--mappings", "0,1000", "How many ports there are before; repeatable.", 0)
@_numbers("--ports", "1,10", "How many ports come at once; repeatable.", 1)
@_backend("all")
@_rounds(2, 20, "How often each way has its turn.")
@_JSON
def portmap(
    mappings: list[int], ports: list[int], backend: str, rounds: int, to: str | None
) -> None:
    """To publish a container's ports without etcd, beside the CNI plugin portmap.

    As a library in a process that lives on, and by `mesh publish` as a whole process; the plugin is
    the one of the package containernetworking-plugins.
    """
    from mesh.bench import isolated

    results = bench_show.Results(_target(to))
    for name in _names(backend):
        arguments = {"backend": name, "mappings": mappings, "ports": ports, "rounds": rounds}
        with results.excusing(name):
            results.add(isolated.measure("mesh.bench.portmap", arguments))
    _finish(results, bench_show.by_ports)


@bench.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--out", required=True, type=click.Path(file_okay=False), help="A directory.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def plot(files: tuple[str, ...], out: str, as_json: bool) -> None:
    """Draw what `--json FILE` wrote, as PNG and SVG.

    Of several results for the same thing the last one counts.
    """
    from pathlib import Path

    from mesh.bench import plot as pictures

    written = pictures.draw([Path(name) for name in files], Path(out))
    if as_json or options.as_json():
        output.document({"files": [str(path) for path in written]})
    else:
        for path in written:
            output.line(str(path))


def _names(backend: str) -> tuple[str, ...]:
    return names.BACKENDS if backend == "all" else (backend,)


def _cases(sizes: Sequence[int], backend: str, *, all_sizes: bool) -> list[tuple[str, int]]:
    """What to measure one after the other; says what it leaves out."""
    every = [(name, size) for name in _names(backend) for size in sizes]
    wanted = [case for case in every if all_sizes or not names.is_slow(*case)]
    _tell_left_out(wanted, every)
    return wanted


def _tell_left_out(
    wanted: Sequence[tuple[str, int | None]], every: Sequence[tuple[str, int | None]]
) -> None:
    left_out = [names.case(*each) for each in every if each not in wanted]
    if left_out:
        output.warn(f"left out, for they take minutes (--all-sizes): {'; '.join(left_out)}")


def _as_cases(variants: Sequence[Variant]) -> list[tuple[str, int | None]]:
    return [(each.backend, each.services) for each in variants]


def _target(to: str | None) -> str | None:
    return to or ("-" if options.as_json() else None)


def _finish(results: bench_show.Results, show: Callable[[list[dict[str, Any]]], None]) -> None:
    """Print what was measured; the verb fails if something could not be."""
    if results.on_stdout:
        results.print()
    else:
        show(results.found)
    if results.failed:
        options.exit_with(1)

"""From JSON that `mesh bench` wrote to pictures: which there are, what each shows, what it says.

Every title states what the figures say, so it is made from them.  Drawing is mesh.bench.pictures'.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mesh.bench import names
from mesh.errors import BadUsage, HostNotReady

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    Record = dict[str, Any]

MAIN: Final = "mesh nftables"
"""Whose figures the titles tell."""

_BASELINES: Final = ("conntrack only", "one DNAT rule")
_FLAT: Final = 1.5
"""A measure whose largest value is less than so many times its smallest is called flat."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line: points of (services, value), in order."""

    name: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes; `levels` are values that do not depend on services, by name."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    levels: tuple[tuple[str, float], ...] = ()
    logarithmic: bool = True


@dataclass(frozen=True, slots=True)
class Picture:
    """One file, in two formats.  With `same_scale` its panels can be compared."""

    name: str
    title: str
    note: str
    panels: tuple[Panel, ...]
    same_scale: bool = False


def draw(files: Sequence[Path], directory: Path) -> list[Path]:
    """Draw every picture the files have figures for; the files written.

    Raises BadUsage (no figures in them), HostNotReady (no matplotlib).
    """
    found = [record for file in files for record in _read(file)]
    wanted = list(planned(found))
    if not wanted:
        raise BadUsage(
            f"{', '.join(map(str, files))}: nothing to draw; `mesh bench engine --json FILE`, "
            "`dataplane` and `live` write what can be drawn"
        )
    try:
        from mesh.bench import pictures
    except ImportError:
        raise HostNotReady(
            "drawing needs matplotlib: pip install 'warren-mesh[bench]', or pip install matplotlib"
        ) from None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return [file for each in wanted for file in pictures.save(each, directory)]
    except OSError as error:
        raise BadUsage(f"--out {directory}: {error.strerror}") from None


def _read(file: Path) -> list[Record]:
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BadUsage(f"{file}: not the JSON that `mesh bench` writes: {error}") from None
    if not (
        isinstance(records, list) and all(isinstance(r, dict) and "bench" in r for r in records)
    ):
        raise BadUsage(f"{file}: not the JSON that `mesh bench` writes: a list of records")
    return records


def planned(found: Sequence[Record]) -> Iterator[Picture]:
    """The pictures that these records are enough for."""
    engine = [record for record in found if record["bench"] == "engine"]
    live = [record for record in found if record["bench"] == "live"]
    if engine:
        yield _change(engine)
    if engine or live:
        yield _bulk(engine, live)
    if live:
        yield _put(live)
    for family in (4, 6):
        plane = [r for r in found if r["bench"] == "dataplane" and r["family"] == family]
        if plane:
            yield _ratio(plane, family)
            yield _latency(plane, family)


# ---- lines


def _lines(records: Iterable[Record], where: str, scale: float = 1.0) -> tuple[Line, ...]:
    """A line for each backend; of several records for one point the last one counts."""
    points: dict[str, dict[int, float]] = {}
    for record in records:
        value: Any = record
        for part in where.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and record["services"] is not None:
            points.setdefault(record["backend"], {})[record["services"]] = value * scale
    return tuple(Line(_shown(name), tuple(sorted(each.items()))) for name, each in points.items())


def _shown(backend: str) -> str:
    return f"mesh {backend}" if backend in names.BACKENDS else backend


def _main(lines: Sequence[Line]) -> Line:
    """The line that titles tell of."""
    return next((line for line in lines if line.name == MAIN), lines[0])


def _course(line: Line, show: Any) -> str:
    """What becomes of a line, in words."""
    (few, first), (many, last) = line.points[0], line.points[-1]
    values = [value for _, value in line.points]
    if few == many:
        return f"{show(first)} with {few:,} services"
    if max(values) < _FLAT * min(values):
        return f"{show(last)}, with {few:,} services or {many:,}"
    return f"{show(first)} with {few:,} services, {show(last)} with {many:,}"


def _milliseconds(value: float) -> str:
    if value < 1:
        return f"{value * 1e3:.0f} µs"
    return f"{value:.3g} ms" if value < 1e3 else f"{value / 1e3:.3g} s"


# ---- pictures


def _change(engine: Sequence[Record]) -> Picture:
    replaced = _lines(engine, "change_us.p50", 1e-3)
    main = _main(replaced)
    panels = (
        Panel("One replica replaced", "ms", replaced),
        Panel("The ready change applied", "ms", _lines(engine, "apply_us.p50", 1e-3)),
        Panel("One replica more or less", "ms", _lines(engine, "count_change_us.p50", 1e-3)),
        Panel("One source range of 1000", "ms", _lines(engine, "allow_change_us.p50", 1e-3)),
    )
    return Picture(
        "change",
        f"{main.name}: replacing one replica takes {_course(main, _milliseconds)}",
        "From the event in the agent, or the ready change, until the kernel has it; median.",
        tuple(panel for panel in panels if panel.lines),
    )


_BULK: Final = (
    ("install_ms", "Everything installed", "ms"),
    ("batch1000_ms", "1000 services changed at once", "ms"),
    ("apply_batch1000_ms", "The ready 1000 applied", "ms"),
    ("resync_ms", "Everything written again", "ms"),
    ("repair_ms.1", "Somebody's change until repaired", "ms"),
    ("rss_mb", "Memory of the process", "MiB"),
)


def _bulk(engine: Sequence[Record], live: Sequence[Record]) -> Picture:
    panels = [Panel(title, unit, _lines(engine, where)) for where, title, unit in _BULK]
    panels.insert(1, Panel("An agent's cold start", "ms", _lines(live, "cold_start_ms")))
    shown = tuple(panel for panel in panels if panel.lines)
    main = _main(shown[0].lines)
    return Picture(
        "bulk",
        f"{main.name}: {shown[0].title.lower()} in {_course(main, _milliseconds)}",
        "Each panel has its own scale.",
        shown,
    )


def _put(live: Sequence[Record]) -> Picture:
    kernel = _lines(live, "put_to_kernel_ms.p50")
    main = _main(kernel)
    return Picture(
        "put",
        f"{main.name}: from etcd to the kernel in {_course(main, _milliseconds)}",
        "A replica's record is put in etcd on a node whose agent runs; median.",
        (
            Panel("Until the kernel has it", "ms", kernel),
            Panel("Until it answers", "ms", _lines(live, "put_to_reachable_ms.p50")),
        ),
    )


_PATHS: Final = (("port", "By a published port"), ("vip", "By VIP"))


def _ratio(plane: Sequence[Record], family: int) -> Picture:
    """Kernel time of a connection."""
    title = "What a connection's kernel time is, beside plain routing's"
    port = [record for record in plane if record["path"] == "port"]
    if lines := _lines(port, "cpu_ratio_to_direct"):
        main = _main(lines)
        title = (
            f"Kernel time of a new connection, plain routing ÷ {main.name}: "
            f"{_course(main, '{:.2f}'.format)}"
        )
    return Picture(
        _of_family("connect-cpu", family),
        title,
        f"{_what(family)}; kernel time of direct ÷ that of these rules. 1 is free.",
        _by_path(plane, "cpu_ratio_to_direct", "ratio", logarithmic=False),
        same_scale=True,
    )


def _latency(plane: Sequence[Record], family: int) -> Picture:
    title = "What rules add to a connection"
    port = [record for record in plane if record["path"] == "port"]
    if lines := _lines(port, "added_us.p50"):
        main = _main(lines)
        adds = _course(main, "{:.1f} µs".format)
        title = f"What {main.name} adds to a new connection: {adds}"
    return Picture(
        _of_family("connect-latency", family),
        title,
        f"{_what(family)}; connect(2) one after the other, median, less that of direct.",
        _by_path(plane, "added_us.p50", "µs", logarithmic=True),
        same_scale=True,
    )


def _by_path(
    plane: Sequence[Record], where: str, unit: str, *, logarithmic: bool
) -> tuple[Panel, ...]:
    levels = tuple(
        (record["backend"], _at(record, where))
        for record in plane
        if record["backend"] in _BASELINES
    )
    panels = (
        Panel(
            title,
            unit,
            _lines((r for r in plane if r["path"] == path), where),
            levels=levels,
            logarithmic=logarithmic,
        )
        for path, title in _PATHS
    )
    return tuple(panel for panel in panels if panel.lines)


def _at(record: Record, where: str) -> float:
    value: Any = record
    for part in where.split("."):
        value = value[part]
    return float(value)


def _of_family(name: str, family: int) -> str:
    return name if family == 4 else f"{name}-ipv6"


def _what(family: int) -> str:
    return f"New TCP connections over IPv{family} through one node, three replicas per service"

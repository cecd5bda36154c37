"""How `mesh bench` shows what was measured: JSON as it comes, tables when all is there."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from mesh.cli import output
from mesh.errors import BadUsage, MeshError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Record = dict[str, Any]

_MEASURES: Final = (
    ("cold start to all rules live", "cold_start_ms", 1e-3),
    ("put in etcd to kernel, p50", "put_to_kernel_ms.p50", 1e-3),
    ("put in etcd to kernel, p99", "put_to_kernel_ms.p99", 1e-3),
    ("put in etcd to first answer, p50", "put_to_reachable_ms.p50", 1e-3),
    ("put in etcd to first answer, p99", "put_to_reachable_ms.p99", 1e-3),
    ("one port published to first answer, p50", "publish_port_ms.p50", 1e-3),
    ("1000 ports published to first answer, p50", "publish_range_ms.p50", 1e-3),
    ("install", "install_ms", 1e-3),
    ("one replica replaced, p50", "change_us.p50", 1e-6),
    ("one replica replaced, p99", "change_us.p99", 1e-6),
    ("the ready change applied, p50", "apply_us.p50", 1e-6),
    ("the ready change applied, p99", "apply_us.p99", 1e-6),
    ("one replica more or less, p50", "count_change_us.p50", 1e-6),
    ("one replica more or less, p99", "count_change_us.p99", 1e-6),
    ("1000 services changed at once", "batch1000_ms", 1e-3),
    ("the ready 1000 applied", "apply_batch1000_ms", 1e-3),
    ("one source range, p50", "allow_change_us.p50", 1e-6),
    ("one source range, p99", "allow_change_us.p99", 1e-6),
    ("read back and compare", "drift_ms", 1e-3),
    ("1 foreign change, until repaired", "repair_ms.1", 1e-3),
    ("100 foreign changes, until repaired", "repair_ms.100", 1e-3),
    ("write everything again", "resync_ms", 1e-3),
    ("etcd lists everything again", "relist_ms", 1e-3),
)
"""What people call a measure, where it is in a record, and its unit in seconds."""

_SIZES: Final = (("memory of the process", "rss_mb"), ("memory of the kernel", "kernel_mb"))


class Results:
    """What was found so far.  `target` is a file, "-" for standard output, or None."""

    def __init__(self, target: str | None) -> None:
        self.found: list[Record] = []
        self.failed = False
        self.on_stdout = target == "-"
        self._file = Path(target) if target and target != "-" else None
        if self._file is not None:
            self._write(self._file)  # before the minutes it takes to have something to write

    def add(self, records: Sequence[Record]) -> None:
        """Take in records; a file has them at once."""
        self.found += records
        if self._file is not None:
            self._write(self._file)

    @contextmanager
    def excusing(self, what: str) -> Iterator[None]:
        """Go on with the next case if this one cannot be measured, and say why."""
        try:
            yield
        except MeshError as error:
            output.fail(f"{what}: {error}")
            self.failed = True

    def print(self) -> None:
        """Print one JSON array."""
        click.echo(json.dumps(self.found))

    def _write(self, file: Path) -> None:
        text = ",\n ".join(json.dumps(record) for record in self.found)
        try:
            file.write_text(f"[{text}]\n")
        except OSError as error:
            raise BadUsage(f"--json {file}: {error.strerror}") from None


def by_size(found: list[Record]) -> None:
    """A table for each backend: a line per measure, a column per number of services."""
    for backend in dict.fromkeys(record["backend"] for record in found):
        records = [record for record in found if record["backend"] == backend]
        head = (backend.upper(), *(f"{record['services']} SERVICES" for record in records))
        rows = [
            (title, *(_duration(_at(record, where), unit) for record in records))
            for title, where, unit in _MEASURES
            if any(_at(record, where) is not None for record in records)
        ]
        rows += [
            (title, *(_memory(record.get(where)) for record in records))
            for title, where in _SIZES
            if any(where in record for record in records)
        ]
        output.table(head, rows)
        output.line("")


def by_variant(found: list[Record]) -> None:
    """A line for every way through every rule set."""
    head = (
        "RULES", "SERVICES", "BY", "CONNECT p50", "p10", "ADDED p50", "p10", "CPU", "ADDED",
        "RATIO", "TO SMALLEST", "UDP p50", "ADDED", "FAILED", "LOADED IN",
    )  # fmt: skip
    rows = []
    for record in found:
        udp, udp_added = record["udp_us"] or {}, record["udp_added_us"] or {}
        services = record["services"]
        rows.append((
            record["backend"],
            "-" if services is None else str(services),
            record["path"],
            *(_us(record["connect_us"].get(share)) for share in ("p50", "p10")),
            *(_us(record["added_us"].get(share)) for share in ("p50", "p10")),
            _us(record["cpu_us"]),
            _us(record["cpu_added_us"]),
            f"{record['cpu_ratio_to_direct']:.2f}",
            "-" if services is None else f"{record['cpu_ratio_to_smallest']:.2f}",
            _us(udp.get("p50")),
            _us(udp_added.get("p50")),
            str(record["failed"]),
            _duration(record["load_ms"], 1e-3),
        ))  # fmt: skip
    output.table(head, rows)
    output.line("Times are microseconds.  RATIO: kernel time of a connection, direct to this.")


def by_way(found: list[Record]) -> None:
    """A line for every way to a replica on another node."""
    head = (
        "RULES", "CLIENT", "CONNECT p50", "ADDED", "CPU", "ADDED", "RATIO", "UDP p50", "ADDED",
        "MiB", "RATIO", "FAILED",
    )  # fmt: skip
    rows = [
        (
            record["backend"],
            record["path"],
            _us(record["connect_us"]["p50"]),
            _us(record["added_us"]["p50"]),
            _us(record["cpu_us"]),
            _us(record["cpu_added_us"]),
            f"{record['cpu_ratio_to_direct']:.2f}",
            _us(_at(record, "udp_us.p50")),
            _us(_at(record, "udp_added_us.p50")),
            _us(record["mebibyte_us"]),
            f"{record['mebibyte_ratio_to_direct']:.2f}",
            str(record["failed"]),
        )
        for record in found
    ]
    output.table(head, rows)
    output.line("Times are microseconds.  RATIO: kernel time, direct to this.")


def by_check(found: list[Record]) -> None:
    """A line for each type of check."""
    head = ("CHECK", "TASKS", "INTERVAL", "CPU", "PER PROBE", "ALL HEALTHY AFTER", "RSS", "ADDED")
    rows = [
        (
            record["type"],
            str(record["checks"]),
            f"{record['interval_s']:g} s",
            f"{record['cpu_percent']} %",
            _duration(record["us_per_check"], 1e-6),
            _duration(record["all_healthy_ms"], 1e-3),
            _memory(record["rss_mb"]),
            _memory(record["rss_added_mb"]),
        )
        for record in found
    ]
    output.table(head, rows)


def by_ports(found: list[Record]) -> None:
    """A line for each backend, number of ports there were before and of ports at once."""
    ways = (("LIBRARY", "library_ms"), ("mesh publish", "command_ms"), ("PORTMAP", "portmap_ms"))
    head = [f"{title} {what}" for what in ("ADD", "DEL") for title, _ in ways]
    rows = []
    for record in found:
        cells = [
            _duration(_at(record, f"{way}.{verb}.p50"), 1e-3)
            for verb in ("publish", "unpublish")
            for _, way in ways
        ]
        rows.append((record["backend"], str(record["mappings"]), str(record["ports"]), *cells))
    output.table(("BACKEND", "MAPPINGS", "PORTS", *head), rows)
    output.line(
        "Medians.  LIBRARY: a call in a process that lives on; the others: whole processes."
    )


def _at(record: Record, where: str) -> float | None:
    value: Any = record
    for part in where.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None


def _duration(value: float | None, unit: float) -> str:
    if value is None:
        return "-"
    seconds = value * unit
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _memory(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} MiB"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"

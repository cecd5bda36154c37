"""What people and programs read: tables, JSON documents, notes on stderr.

Colour only on a terminal.  Text from etcd never reaches the terminal unescaped.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PATIENCE: Final = 1.0
"""Seconds of silence after which a waiting verb says what it waits for."""


class Styled(NamedTuple):
    """A cell in colour; `style` is a colour that both click and rich know."""

    text: str
    style: str


Cell = str | Styled


def printable(text: str) -> str:
    """`text` on one line, with control and direction characters escaped as Python writes them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _text(cell: Cell) -> str:
    return printable(cell.text if isinstance(cell, Styled) else cell)


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Print rows under their columns: aligned words for a pipe, colour and folding for people."""
    if sys.stdout.isatty():
        _rich_table(columns, rows)
        return
    lines = [list(columns), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        click.echo("  ".join(map(str.ljust, line, widths)).rstrip())


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        styles = (cell.style if isinstance(cell, Styled) else "" for cell in row)
        grid.add_row(*(Text(_text(c), style=s) for c, s in zip(row, styles, strict=True)))
    Console(highlight=False).print(grid)


def lasted(seconds: float) -> str:
    """A time as people say it: 90s, 5m, 3h, 2d."""
    whole = max(0, round(seconds))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if whole >= 2 * size:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def document(value: object) -> None:
    """Print one JSON document; everything beyond ASCII is escaped, so terminals are safe."""
    import json

    import msgspec

    click.echo(json.dumps(msgspec.to_builtins(value, str_keys=True), indent=2))


def fields(values: object, indent: int = 0) -> None:
    """Print nested records for people: one field a line, lists as items, nothing for null."""
    import msgspec

    _print_fields(msgspec.to_builtins(values, str_keys=True), indent)


def _print_fields(values: Any, indent: int) -> None:
    pad = " " * indent
    for name, value in values.items():
        if value in (None, [], {}, ()):
            click.echo(f"{pad}{printable(str(name))}: -")
        elif isinstance(value, dict):
            click.echo(f"{pad}{printable(str(name))}:")
            _print_fields(value, indent + 2)
        elif isinstance(value, list | tuple) and isinstance(value[0], dict):
            click.echo(f"{pad}{printable(str(name))}:")
            for item in value:
                click.echo(f"{pad}  -")
                _print_fields(item, indent + 4)
        else:
            many = isinstance(value, list | tuple)
            text = ", ".join(map(str, value)) if many else _scalar(value)
            click.echo(f"{pad}{printable(str(name))}: {printable(text)}")


def _scalar(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def line(text: str, style: str | None = None) -> None:
    """Print one line of result."""
    click.echo(printable(text) if style is None else click.style(printable(text), fg=style))


def done(text: str) -> None:
    """Print that something was done."""
    mark = "✓" if _speaks_unicode() else "OK"
    click.echo(f"{click.style(mark, fg='green')} {printable(text)}")


def _speaks_unicode() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def warn(text: str) -> None:
    """Say on stderr what the user should look at; the verb goes on."""
    click.secho(f"mesh: warning: {printable(text)}", fg="yellow", err=True)


def fail(text: str) -> None:
    """Say on stderr why the verb failed, in one line."""
    click.echo(f"{click.style('mesh:', fg='red')} {printable(text)}", err=True)


@contextmanager
def patience(waiting_for: str) -> Iterator[None]:
    """Say on stderr what the verb waits for, once it has waited `PATIENCE` seconds."""
    import asyncio

    text = f"mesh: waiting for {printable(waiting_for)} …"
    timer = asyncio.get_running_loop().call_later(PATIENCE, lambda: click.echo(text, err=True))
    try:
        yield
    finally:
        timer.cancel()

"""How the demo's rows look: a table that fills on a terminal, plain lines in a pipe.

Knows nothing of what is shown.  A program that reads JSON is shown nothing on stdout; its user is,
on stderr, if that is a terminal.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

import click

from mesh.cli import output

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    from mesh.lab.demo import Outcome
    from mesh.lab.demo_checks import Verdict

_NAME_WIDTH: Final = 29
"""The longest name a row has; longer ones fold on a terminal, and only shift a line in a pipe."""


class Screen(Protocol):
    """An audience that also sees the end."""

    def group(self, title: str) -> None:
        """Head the next rows."""

    def begin(self, name: str) -> None:
        """Show that a row is worked on."""

    def row(self, name: str, verdict: Verdict) -> None:
        """Show a row."""

    def end(self, outcome: Outcome, seconds: float) -> None:
        """Show what came of it."""


@contextmanager
def opened(*, as_json: bool) -> Iterator[Screen]:
    """The screen for whoever reads stdout."""
    stream = sys.stderr if as_json else sys.stdout
    if stream.isatty():
        with _live(stream) as screen:
            yield screen
    elif as_json:
        yield _Nothing()
    else:
        yield _Lines()


class _Nothing:
    def group(self, title: str) -> None:
        pass

    def begin(self, name: str) -> None:
        pass

    def row(self, name: str, verdict: Verdict) -> None:
        pass

    def end(self, outcome: Outcome, seconds: float) -> None:
        pass


class _Lines:
    """One line a row as it comes, for a pipe or a file."""

    def __init__(self) -> None:
        self._any = False

    def group(self, title: str) -> None:
        self._line(f"\n{title}" if self._any else title)
        self._any = True

    def begin(self, name: str) -> None:
        pass

    def row(self, name: str, verdict: Verdict) -> None:
        mark = "ok  " if verdict.ok else "FAIL"
        self._line(f"{mark}  {name:{_NAME_WIDTH}}  {output.printable(verdict.detail)}")

    def end(self, outcome: Outcome, seconds: float) -> None:
        self._line("")
        for line in _last_words(outcome):
            self._line(line)
        self._line(_summary(outcome, seconds))

    def _line(self, text: str) -> None:
        click.echo(text)
        sys.stdout.flush()


@contextmanager
def _live(stream: TextIO) -> Iterator[_Table]:
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream, highlight=False, markup=False)
    with Live(console=console, transient=True, refresh_per_second=8) as live:
        yield _Table(console, live)


class _Table:
    """Rows that stay, above one that shows what is worked on."""

    def __init__(self, console: Console, live: Live) -> None:
        self._console = console
        self._live = live
        self._any = False

    def group(self, title: str) -> None:
        if self._any:
            self._console.print()
        self._console.print(title, style="bold")
        self._any = True

    def begin(self, name: str) -> None:
        from rich.spinner import Spinner

        self._live.update(Spinner("dots", f" {name} …", style="cyan"))

    def row(self, name: str, verdict: Verdict) -> None:
        from rich.text import Text

        self._live.update(Text())
        mark = Text("✓", style="green") if verdict.ok else Text("✗", style="red")
        style = "" if verdict.ok else "red"
        detail = Text(output.printable(verdict.detail), style=style)
        self._console.print(_grid(mark, Text(name), detail))

    def end(self, outcome: Outcome, seconds: float) -> None:
        from rich.text import Text

        self._live.update(Text())
        self._console.print()
        for line in _last_words(outcome):
            self._console.print(line, style="dim")
        style = "red" if any(not check.ok for check in outcome.checks) else "green"
        self._console.print(_summary(outcome, seconds), style=f"bold {style}")


def _grid(*cells: object) -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    for width in (1, _NAME_WIDTH, None):
        grid.add_column(width=width, overflow="fold")
    grid.add_row(*cells)  # type: ignore[arg-type]
    return grid


def _last_words(outcome: Outcome) -> Iterator[str]:
    """Where to look: what the agents said last, if something failed."""
    for node, lines in outcome.logs.items():
        yield f"The agent of {node} said last:"
        yield from (f"  {output.printable(line)}" for line in lines)
        yield ""


def _summary(outcome: Outcome, seconds: float) -> str:
    checks = outcome.checks
    failed = [check.name for check in checks if not check.ok]
    if failed:
        return (
            f"FAILED: {len(failed)} of {len(checks)} checks in {seconds:.1f} s: "
            f"{'; '.join(failed)}.  --keep leaves the lab running to look around in it."
        )
    return f"ok: {len(checks)} of {len(checks)} checks in {seconds:.1f} s"

"""Draws the pictures of mesh.bench.plot with matplotlib, as PNG and SVG.

Colours are Okabe and Ito's, which people with any kind of colour vision can tell apart; every line
is labelled at its end.  Decides nothing about what is shown.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from mesh.bench.plot import Line, Panel, Picture

_STYLES: Final[dict[str, dict[str, Any]]] = {
    "mesh nftables": {"color": "#0072B2", "linewidth": 2.6, "marker": "o"},
    "mesh iptables-legacy": {"color": "#D55E00", "linewidth": 1.8, "marker": "o"},
    "mesh iptables-nft": {"color": "#E69F00", "linewidth": 1.8, "marker": "o"},
    "kube-proxy nftables": {"color": "#56B4E9", "linestyle": "--", "marker": "s"},
    "kube-proxy iptables-legacy": {"color": "#CC79A7", "linestyle": "--", "marker": "s"},
    "kube-proxy iptables-nft": {"color": "#009E73", "linestyle": "--", "marker": "s"},
}
_OTHER: Final[dict[str, Any]] = {"color": "#555555", "marker": "o"}
_GREY: Final = "#777777"

_LABEL_POINTS: Final = 12.0
"""The least distance between two labels, in points."""

_PER_ROW: Final = 3
_WIDTH, _HEIGHT = 5.3, 3.9
_LEFT, _LABELS = 0.7, 1.9
"""Of one panel, and of what is left and right of its axes, in inches."""


def save(picture: Picture, directory: Path) -> list[Path]:
    """Draw a picture; the files written.  Raises OSError."""
    settings: Any = {"font.size": 10.0, "svg.fonttype": "none", "svg.hashsalt": picture.name}
    with mpl.rc_context(settings):
        figure = _figure(picture)
        files = [directory / f"{picture.name}.{kind}" for kind in ("png", "svg")]
        for file in files:
            when = {"Date": None} if file.suffix == ".svg" else None
            figure.savefig(file, dpi=150, metadata=when)
    return files


def _figure(picture: Picture) -> Figure:
    columns = min(len(picture.panels), _PER_ROW)
    rows = -(-len(picture.panels) // columns)
    width, height = _WIDTH * columns, _HEIGHT * rows + 0.9
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=picture.same_scale)
    all_axes = grid.flatten()
    for axes in all_axes[len(picture.panels) :]:
        axes.set_visible(False)
    title = textwrap.fill(picture.title, int(width * 8.5))
    figure.suptitle(title, x=0.015, ha="left", fontsize=14, fontweight="bold")
    figure.text(0.015, 0.015, picture.note, color=_GREY, fontsize=9)
    top = 1 - (0.45 + 0.24 * (title.count("\n") + 1)) / height
    figure.subplots_adjust(
        left=_LEFT / width, right=1 - _LABELS / width, bottom=0.85 / height, top=top,
        wspace=(_LEFT + _LABELS) / (_WIDTH - _LEFT - _LABELS), hspace=0.42,
    )  # fmt: skip
    pairs = list(zip(all_axes, picture.panels, strict=False))
    for axes, panel in pairs:
        _panel(axes, panel, picture.panels if picture.same_scale else (panel,))
    for axes, panel in pairs:  # when no scale changes any more
        _label(figure, axes, panel)
    return figure


def _panel(axes: Axes, panel: Panel, beside: Sequence[Panel]) -> None:
    """Draw a panel on a scale that suits all of `beside`."""
    axes.set_title(f"{panel.title} ({panel.unit})", loc="left", fontsize=10.5)
    sizes = sorted({size for line in panel.lines for size, _ in line.points})
    axes.set_xscale("log")
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(*_limits(beside))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for line in panel.lines:
        style = {"markersize": 4.5, "linewidth": 1.5, **_STYLES.get(line.name, _OTHER)}
        axes.plot(*zip(*line.points, strict=True), **style)
    for _, level in panel.levels:
        axes.axhline(level, color=_GREY, linewidth=0.8, linestyle=":", zorder=0)
    if not panel.logarithmic:
        axes.set_ylim(0, 1)
    axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)
    axes.set_xticks(sizes)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlabel("services")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _thousands(value: float, _: object) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _limits(panels: Sequence[Panel]) -> tuple[float, float]:
    """The steps of a 1, 2, 5 scale around every value."""
    values = [value for panel in panels for _, value in panel.levels]
    values += [value for panel in panels for line in panel.lines for _, value in line.points]
    known = [value for value in values if value > 0] or [1.0]
    steps = [m * 10.0**e for e in range(-9, 10) for m in (1, 2, 5)]
    low = max(step for step in steps if step < min(known))
    return low, min(step for step in steps if step > max(known))


def _label(figure: Figure, axes: Axes, panel: Panel) -> None:
    """The name of each line beside its end, moved apart where they would overlap."""
    last = axes.get_xlim()[1]
    wanted = [(_end(line), line.name, _color(line.name)) for line in panel.lines]
    wanted += [((last, level), name, _GREY) for name, level in panel.levels]
    wanted.sort(key=lambda each: each[0][1])
    points = figure.dpi / 72
    heights = [axes.transData.transform((1, y))[1] / points for (_, y), _, _ in wanted]
    right = axes.transData.transform((last, 1))[0] / points
    for ((x, y), name, color), height in zip(wanted, _apart(heights), strict=True):
        at = axes.transData.transform((x, y)) / points
        axes.annotate(
            name,
            (x, y),
            (right - at[0] + 12, height - at[1]),
            textcoords="offset points",
            color=color,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5},
        )


def _color(name: str) -> str:
    return str(_STYLES.get(name, _OTHER)["color"])


def _end(line: Line) -> tuple[float, float]:
    return line.points[-1]


def _apart(heights: Sequence[float]) -> list[float]:
    """Ascending heights, moved so far that neighbours do not touch, around where they were."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _low(groups[-1]) - _high(groups[-2]) < _LABEL_POINTS:
            upper = groups.pop()
            groups[-1] += upper
    return [_low(group) + index * _LABEL_POINTS for group in groups for index in range(len(group))]


def _low(group: Sequence[float]) -> float:
    return sum(group) / len(group) - (len(group) - 1) * _LABEL_POINTS / 2


def _high(group: Sequence[float]) -> float:
    return _low(group) + (len(group) - 1) * _LABEL_POINTS

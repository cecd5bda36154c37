"""Medians, percentiles and memory, rounded as they are printed."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence


def median(values: Sequence[float]) -> float:
    """The middle value; the lower one of two."""
    return percentile(values, 50)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` percent do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, round(share / 100 * len(ordered)) - 1))]


def percentiles(
    values: Sequence[float], scale: float, shares: Sequence[int] = (50, 99)
) -> dict[str, float]:
    """Some percentiles by name ("p50"), each value times `scale`."""
    return {f"p{p}": round(percentile(values, p) * scale, 1) for p in shares}


def milliseconds(seconds: float) -> float:
    """Seconds as milliseconds with one decimal."""
    return round(seconds * 1e3, 1)


def rss_mb(pid: int | str) -> float:
    """Resident memory of a process, in MiB (proc(5), statm)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return round(pages * resource.getpagesize() / 2**20, 1)


_KERNEL: Final = ("SUnreclaim", "VmallocUsed", "Percpu")
"""Where the kernel keeps rules, chains, sets and their elements (proc(5), meminfo)."""


def kernel_mb() -> float | None:
    """The kernel's own memory, of the whole machine, in MiB; None where it does not tell."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    sizes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    if not sizes.keys() >= set(_KERNEL):
        return None
    return sum(sizes[name] for name in _KERNEL) / 1024

"""Pictures from benchmark results: which there are, what they say, and what is refused."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

import mesh.bench
from mesh.bench import figures, plot
from mesh.store.memory import MemoryStore
from tests.support.commands import CommandLine

if TYPE_CHECKING:
    from pathlib import Path

PNG, SVG = b"\x89PNG", b"<?xml"


@pytest.fixture
def cli() -> CommandLine:
    return CommandLine(MemoryStore())


def _engine(backend: str, services: int, microseconds: float) -> dict[str, Any]:
    spread = {"p50": microseconds, "p99": 2 * microseconds}
    return {
        "bench": "engine",
        "backend": backend,
        "services": services,
        "install_ms": services / 2,
        "change_us": spread,
        "apply_us": spread,
        "count_change_us": spread,
        "allow_change_us": spread,
        "batch1000_ms": 10.0,
        "apply_batch1000_ms": 3.0,
        "resync_ms": float(services),
        "repair_ms": {"1": 60.0, "100": 70.0},
        "rss_mb": 50.0,
    }


def _connect(backend: str, services: int | None, path: str, ratio: float) -> dict[str, Any]:
    return {
        "bench": "dataplane",
        "backend": backend,
        "services": services,
        "path": path,
        "family": 4,
        "cpu_ratio_to_direct": ratio,
        "added_us": {"p10": 5.0, "p50": 10 * (1 - ratio)},
    }


def _live(services: int) -> dict[str, Any]:
    spread = {"p50": 1.0, "p99": 2.0}
    return {
        "bench": "live",
        "backend": "nftables",
        "services": services,
        "cold_start_ms": 100.0 + services,
        "put_to_kernel_ms": spread,
        "put_to_reachable_ms": spread,
    }


ENGINE = [
    *(_engine("nftables", n, us) for n, us in ((10000, 150), (10, 140))),
    *(_engine("iptables-legacy", n, us) for n, us in ((10, 5000), (10000, 200000))),
]
DATAPLANE = [
    _connect("direct", None, "routed", 1.0),
    _connect("conntrack only", None, "routed", 0.9),
    _connect("one DNAT rule", None, "port", 0.87),
    *(_connect("nftables", n, path, 0.8) for n in (10, 1000) for path in ("port", "vip")),
    *(_connect("kube-proxy iptables-legacy", n, "port", r) for n, r in ((10, 0.8), (1000, 0.2))),
]


def _write(directory: Path, name: str, records: object) -> str:
    file = directory / name
    file.write_text(json.dumps(records))
    return str(file)


def test_every_picture_is_drawn_in_both_formats(cli: CommandLine, tmp_path: Path) -> None:
    files = [
        _write(tmp_path, "engine.json", ENGINE),
        _write(tmp_path, "rest.json", [*DATAPLANE, _live(10), _live(1000)]),
    ]
    out = tmp_path / "new" / "pictures"

    found = cli.json("bench", "plot", *files, "--out", str(out))["files"]

    names = ("change", "bulk", "put", "connect-cpu", "connect-latency")
    assert found == [str(out / f"{name}.{kind}") for name in names for kind in ("png", "svg")]
    for name in names:
        assert (out / f"{name}.png").read_bytes().startswith(PNG)
        assert (out / f"{name}.svg").read_bytes().startswith(SVG)


def test_one_size_is_enough_for_a_picture(cli: CommandLine, tmp_path: Path) -> None:
    file = _write(tmp_path, "engine.json", ENGINE[:1])

    cli.ok("bench", "plot", file, "--out", str(tmp_path))

    assert (tmp_path / "change.svg").exists()


def test_a_title_says_that_a_measure_is_flat() -> None:
    change = next(plot.planned(ENGINE))

    assert change.title == (
        "mesh nftables: replacing one replica takes 150 µs, with 10 services or 10,000"
    )


def test_a_title_says_that_a_measure_grows() -> None:
    change = next(plot.planned(ENGINE[2:]))

    assert change.title == (
        "mesh iptables-legacy: replacing one replica takes "
        "5 ms with 10 services, 200 ms with 10,000"
    )


def test_lines_are_in_the_order_of_services_and_the_last_result_counts() -> None:
    again = _engine("nftables", 10, 99)

    change = next(plot.planned([*ENGINE, again]))

    lines = {line.name: line.points for line in change.panels[0].lines}
    assert lines["mesh nftables"] == ((10, 0.099), (10000, 0.15))
    assert lines["mesh iptables-legacy"] == ((10, 5.0), (10000, 200.0))


def test_what_has_no_services_is_a_level() -> None:
    cpu, latency = plot.planned(DATAPLANE)

    port, vip = cpu.panels
    assert port.levels == vip.levels == (("conntrack only", 0.9), ("one DNAT rule", 0.87))
    assert [line.name for line in port.lines] == ["mesh nftables", "kube-proxy iptables-legacy"]
    assert [line.name for line in vip.lines] == ["mesh nftables"]
    added = dict(latency.panels[0].lines[0].points)
    assert added == pytest.approx({10: 2.0, 1000: 2.0})


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[{}]", "[]"])
def test_other_files_are_refused(cli: CommandLine, tmp_path: Path, text: str) -> None:
    file = tmp_path / "odd.json"
    file.write_text(text)

    result = cli.run("bench", "plot", str(file), "--out", str(tmp_path))

    assert result.exit_code == 2
    assert "odd.json" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_without_matplotlib_the_command_that_installs_it_is_told(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mesh.bench.pictures", raising=False)
    monkeypatch.delattr(mesh.bench, "pictures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = _write(tmp_path, "engine.json", ENGINE)

    result = cli.run("bench", "plot", file, "--out", str(tmp_path))

    assert result.exit_code == 1
    assert "pip install" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("share", "expected"), [(1, 1), (10, 1), (50, 5), (90, 9), (99, 10), (100, 10)]
)
def test_percentiles_are_values_that_occurred(share: float, expected: float) -> None:
    values = [7.0, 3, 10, 1, 9, 2, 8, 4, 6, 5]

    assert figures.percentile(values, share) == expected

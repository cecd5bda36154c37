"""`mesh bench portmap` at tiny sizes: what it prints is whole, and the plugin left out is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mesh.bench import names, portmap
from mesh.store.memory import MemoryStore
from tests.support.commands import CommandLine

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("backend", names.BACKENDS)
def test_every_backend_is_measured_beside_the_plugin(backend: str) -> None:
    cli = CommandLine(MemoryStore())
    words = ("--mappings", "1", "--ports", "1,2", "--rounds", "2", "--backend", backend)

    found = cli.json("bench", "portmap", *words)

    assert [(r["backend"], r["mappings"], r["ports"]) for r in found] == [
        (backend, 1, 1),
        (backend, 1, 2),
    ]
    plugin = portmap.PLUGIN.exists() and backend != "nftables"
    for record in found:
        ways = ["library_ms", "command_ms", *(["portmap_ms"] if plugin else [])]
        for way in ways:
            for verb in ("publish", "unpublish"):
                assert 0 < record[way][verb]["p50"] <= record[way][verb]["p99"]
        assert plugin or backend == "nftables" or record["portmap_ms"] is None


def test_a_plugin_that_is_not_there_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(portmap, "PLUGIN", tmp_path / "portmap")

    assert portmap._Portmap.open(portmap._Place("none"), "iptables-nft", tmp_path / "p") is None
    assert "apt install containernetworking-plugins" in capsys.readouterr().err

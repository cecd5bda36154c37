"""`mesh bench` at tiny sizes: what it prints is whole and possible; and what it compares with
forwards as it should.  Never how fast: that is for people to look at.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mesh.bench import across, dataplane, names, records, topology, variants
from mesh.bench.connections import Server
from mesh.bench.names import KUBE_PROXY
from mesh.bench.pair import Pair
from mesh.bench.topology import Topology
from mesh.bench.variants import Variant
from mesh.dataplane import netns
from mesh.lab import environment
from mesh.model.address import FAMILIES, Family
from mesh.model.publish import Protocol
from mesh.store.memory import MemoryStore
from tests.support.commands import CommandLine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.bench.connections import Target

pytestmark = pytest.mark.netns

SERVICES = 8
NETWORK = records.CLUSTER.network(1)
LIMIT = 60.0


@pytest.fixture
def cli() -> CommandLine:
    return CommandLine(MemoryStore())


@pytest.mark.parametrize("backend", names.BACKENDS)
def test_engine_measures_every_backend(cli: CommandLine, backend: str) -> None:
    arguments = ("--services", "1,12", "--rounds", "4", "--backend", backend)

    found = cli.json("bench", "engine", *arguments)

    assert [(r["bench"], r["backend"], r["services"]) for r in found] == [
        ("engine", backend, 1),
        ("engine", backend, 12),
    ]
    for record in found:
        for name in ("change_us", "apply_us", "count_change_us", "allow_change_us"):
            assert 0 < record[name]["p50"] <= record[name]["p99"]
        for name in ("install_ms", "batch1000_ms", "drift_ms", "resync_ms", "rss_mb"):
            assert record[name] > 0
        assert record["relist_ms"] >= 0
        assert record["apply_batch1000_ms"] >= 0
        assert all(record["repair_ms"][str(count)] > 0 for count in (1, 100))
    assert [record["allow_ranges"] for record in found] == [0, 990]


def test_engine_shows_a_table_beside_the_file(cli: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "found.json"

    shown = cli.ok("bench", "engine", "--services", "3", "--rounds", "2", "--json", str(file))

    assert shown.splitlines()[0].split() == ["NFTABLES", "3", "SERVICES"]
    assert [record["services"] for record in json.loads(file.read_text())] == [3]


def test_dataplane_measures_every_backend_beside_kube_proxy(cli: CommandLine) -> None:
    arguments = ("--services", f"{SERVICES},4", "--rounds", "1", "--backend", "all")

    found = cli.json("bench", "dataplane", *arguments)

    wanted = {(name, None) for name in variants.BASELINES} | {
        (prefix + name, size)
        for prefix in ("", KUBE_PROXY)
        for name in names.BACKENDS
        for size in (4, SERVICES)
    }
    assert {(record["backend"], record["services"]) for record in found} == wanted
    for record in found:
        assert record["failed"] == 0
        assert record["connections"] > 0
        for name in ("connect_us", "udp_us"):
            assert 0 < record[name]["p10"] <= record[name]["p50"]
        assert record["cpu_us"] > 0
        assert record["cpu_ratio_to_direct"] > 0
    ours = [record for record in found if record["services"] is not None]
    assert {record["path"] for record in ours} == {"port", "vip"}
    assert found[0]["backend"] == variants.DIRECT
    assert found[0]["cpu_ratio_to_direct"] == 1
    assert all(r["cpu_ratio_to_smallest"] == 1 for r in ours if r["services"] == 4)


def test_dataplane_measures_ipv6(cli: CommandLine) -> None:
    arguments = ("--services", "4", "--rounds", "1", "--family", "6", "--backend", "nftables")

    found = cli.json("bench", "dataplane", *arguments)

    assert {record["family"] for record in found} == {6}
    assert [record["failed"] for record in found] == [0] * len(found)


def test_dataplane_shows_a_line_for_every_way(cli: CommandLine) -> None:
    arguments = ("--services", "4", "--rounds", "1", "--backend", "nftables", "--no-kube-proxy")

    lines = cli.ok("bench", "dataplane", *arguments).splitlines()

    assert lines[0].split()[:3] == ["RULES", "SERVICES", "BY"]
    assert [line.split()[:3] for line in lines[-3:-1]] == [
        ["nftables", "4", "port"],
        ["nftables", "4", "vip"],
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_across_measures_every_backend_both_ways(cli: CommandLine, family: Family) -> None:
    arguments = ("--rounds", "1", "--family", family.suffix)

    found = cli.json("bench", "across", *arguments)

    ways = [(name, path) for name in names.BACKENDS for path in ("masquerade", "preserve")]
    assert [(r["backend"], r["path"]) for r in found] == [
        (variants.DIRECT, "routed"),
        (variants.AGAIN, "routed"),
        *ways,
    ]
    for record in found:
        assert record["failed"] == 0
        assert record["family"] == family.value
        for name in ("connect_us", "udp_us"):
            assert 0 < record[name]["p10"] <= record[name]["p50"]
        for name in ("cpu_us", "cpu_ratio_to_direct", "mebibyte_us", "mebibyte_ratio_to_direct"):
            assert record[name] > 0


def test_across_shows_a_line_for_every_way(cli: CommandLine) -> None:
    lines = cli.ok("bench", "across", "--rounds", "1", "--backend", "nftables").splitlines()

    assert [line.split()[:2] for line in lines[-3:-1]] == [
        ["nftables", "masquerade"],
        ["nftables", "preserve"],
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", names.BACKENDS)
def test_across_goes_the_ways_that_it_names(backend: str, family: Family) -> None:
    stage = across.meshed(backend, 0, family)
    seen = {}
    for lane in stage.lanes:
        with netns.entered(stage.client):
            client = socket.create_connection(lane.tcp[-1], LIMIT)
        served = stage.server.accept()
        assert served is not None
        with client, served:
            seen[lane.path] = served.getpeername()[0]
    stage.server.close()
    Pair("m0").remove()

    assert seen == {
        "masquerade": NETWORK.overlay_address(family),
        "preserve": topology.OUTSIDE[family],
    }


def test_slow_sizes_are_left_out_and_told() -> None:
    sizes = (10, names.LIMIT + 1)

    planned = dataplane.planned(names.BACKENDS, sizes, kube_proxy=True, slow=False)
    asked_for = dataplane.planned(names.BACKENDS, sizes, kube_proxy=True, slow=True)

    assert [v.backend for v in planned if v.services == names.LIMIT + 1] == ["nftables"]
    assert len(asked_for) == len(planned) + 5


def test_a_size_beyond_the_limit_is_explained(cli: CommandLine) -> None:
    size = str(names.LIMIT + 1)

    result = cli.run("bench", "engine", "--services", size, "--backend", "iptables-nft", "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout) == []
    assert "--all-sizes" in result.stderr


# ---- what is compared


class Way:
    """A rule set in place, and who answers behind it."""

    def __init__(self, variant: Variant, family: Family) -> None:
        self._topology = Topology("way")
        self._topology.build()
        self._family = family
        with netns.entered(self._topology.node):
            variant.load(family)
        self._server = Server(self._topology.server, family)

    def reached(self, targets: list[Target]) -> Iterator[tuple[str, str]]:
        """For each connection the replica's address, and the client's as it sees it."""
        domain = socket.AF_INET6 if self._family is Family.V6 else socket.AF_INET
        for target in targets:
            with netns.entered(self._topology.client):
                client = socket.socket(domain, socket.SOCK_STREAM)
            with client:
                client.settimeout(LIMIT)
                client.connect(target)
                served = self._server.accept()
                assert served is not None
                with served:
                    yield served.getsockname()[0], served.getpeername()[0]

    def close(self) -> None:
        self._server.close()
        for role in ("client", "node", "server"):
            topology.run("ip", "netns", "del", f"way-{role}")


def _replicas(index: int, family: Family) -> set[str]:
    tasks = (records.task(index, r, shape=records.LOCAL) for r in range(records.REPLICAS))
    return {task.addresses[FAMILIES.index(family)] for task in tasks}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", [p + n for p in ("", KUBE_PROXY) for n in names.BACKENDS])
@pytest.mark.parametrize("path", ["port", "vip"])
def test_rules_balance_over_the_replicas_of_the_service(
    backend: str, family: Family, path: str
) -> None:
    variant = Variant(backend, SERVICES)
    first = variant.targets(path, Protocol.TCP, family)[0]
    # kube-proxy's Cluster policy hides who came from outside; the mesh and VIPs never do.
    hidden = backend.startswith(KUBE_PROXY) and path == "port"
    seen_as = {
        "port": NETWORK.gateway(family) if hidden else topology.OUTSIDE[family],
        "vip": topology.inside(family),
    }[path]

    way = Way(variant, family)
    try:
        found = list(way.reached([first] * 60))
    finally:
        way.close()

    assert {replica for replica, _ in found} == _replicas(0, family)
    assert {client for _, client in found} == {seen_as}


# ---- nothing stays


def _running(module: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if module.encode() in words:
                found.append(entry.name)
    return found


def test_nothing_is_left_of_a_benchmark_that_is_killed() -> None:
    before = Path("/proc/self/mountinfo").read_text(), os.listdir("/run/netns")
    # So many take minutes: it does not end by itself while the test waits.
    argv = (sys.executable, "-m", "mesh", "bench", "engine", "--services", str(names.MOST))
    with subprocess.Popen(
        argv,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment.with_this_package(os.environ),
    ) as benchmark:
        assert benchmark.stderr is not None
        benchmark.stderr.readline()
        assert _running("mesh.bench.engine")

        benchmark.send_signal(signal.SIGKILL)

        _wait_until_gone("mesh.bench.engine")
    assert (Path("/proc/self/mountinfo").read_text(), os.listdir("/run/netns")) == before


def _wait_until_gone(module: str) -> None:
    ends = time.monotonic() + LIMIT
    while left := _running(module):
        assert time.monotonic() < ends, left
        time.sleep(0.02)


def test_the_machine_sees_no_rule_of_a_benchmark(cli: CommandLine) -> None:
    cli.json("bench", "engine", "--services", "2", "--rounds", "2")

    done = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True)
    assert "table inet mesh" not in done.stdout


def test_a_file_that_cannot_be_written_is_refused_first(cli: CommandLine, tmp_path: Path) -> None:
    result = cli.run("bench", "engine", "--json", str(tmp_path / "no" / "file"))

    assert result.exit_code == 2
    assert "no/file" in result.stderr

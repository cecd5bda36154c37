"""The metrics as text: all that are documented, and none besides; and how things are tallied."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Final

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from mesh.agent import metrics
from mesh.agent.metrics import Facts
from mesh.agent.rules import Installed
from mesh.agent.tally import BOUNDS, Tally
from mesh.dataplane import command, observe
from mesh.dataplane.cttraffic import Statistics
from mesh.delta import Delta
from mesh.errors import CommandFailed
from mesh.model.report import Healings, Problem
from mesh.reach.judge import Reach, Standing
from mesh.rules.traffic import Port, Volume

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "metrics.md"
WEB: Final = Port("web", "ingress", "tcp", 8080)
OPENMETRICS: Final = "application/openmetrics-text;version=1.0.0"


PEERS: Final = {
    "n2": Standing(Reach.REACHABLE, 0, 9, trip=0.002),
    "n3": Standing(Reach.UNREACHABLE, 5, 4, trip=0.5),
    "n4": Standing(Reach.UNKNOWN, 0),
}


def facts(tally: Tally | None = None) -> Facts:
    problems = (
        Problem(about="service web", message="no port"),
        Problem(about="task web-1 of service web", message="no port"),
        Problem(about="admin", message="taken"),
    )
    return Facts(
        tally=tally or changed(),
        etcd_connected=True,
        etcd_revision=12,
        applied_revision=10,
        is_leader=False,
        is_forwarding=True,
        services=3,
        nodes=2,
        live_nodes=1,
        problems=problems,
        installed=Installed("nftables", 99, lambda: iter(()), Healings(total=2, elements=2)),
        published={WEB, Port("dns", "host", "udp", 53)},
        volumes={WEB: Volume(3, 30, 300)},
        statistics=Statistics(5, 100, {"early_drop": 1, "drop": 0, "insert_failed": 0}),
        lost=0,
        surplus={"web": 4},
        peers=PEERS,
    )


def changed() -> Tally:
    tally = Tally()
    tally.peer_changes["n3", "unreachable"] += 1
    return tally


STARTING: Final = facts()._replace(installed=None, statistics=None, published=set())


def text(of: Facts, accept: str = "") -> str:
    return metrics.rendered(of, accept).body.decode()


def test_the_documented_metrics_are_those_there_are() -> None:
    row = r"^\| `(\w+)` \| (gauge|counter|histogram) \|([^|]*)\|"
    found = re.findall(row, DOCUMENT.read_text(), re.MULTILINE)
    exported = text(facts())

    assert {name: kind for name, kind, _ in found} == dict(
        re.findall(r"^# TYPE (\w+) (\w+)$", exported, re.MULTILINE)
    )
    for name, kind, labels in found:
        shown = {"le"} if kind == "histogram" else set()
        for line in re.findall(rf"^{name}(?:_bucket)?{{(.*)}} ", exported, re.MULTILINE):
            assert set(re.findall(r"(\w+)=", line)) == {*re.findall(r"\w+", labels), *shown}, name


@pytest.mark.parametrize("of", [facts(), STARTING])
def test_both_formats_are_what_prometheus_reads(of: Facts) -> None:
    families = [family.name for family in openmetrics(text(of, OPENMETRICS))]  # type: ignore[no-untyped-call]

    assert [f.name.removesuffix("_info") for f in plain(text(of))] == families


def test_nodes_that_never_answer_are_neither_reachable_nor_not() -> None:
    shown = text(facts())

    assert re.findall(r"^mesh_peer_\w+{.*", shown, re.MULTILINE) == [
        'mesh_peer_reachable{peer="n2"} 1.0',
        'mesh_peer_reachable{peer="n3"} 0.0',
        'mesh_peer_rtt_seconds{peer="n2"} 0.002',
        'mesh_peer_rtt_seconds{peer="n3"} 0.5',
        'mesh_peer_changes_total{peer="n3",to="unreachable"} 1.0',
    ]


def test_ports_without_traffic_are_told_of_as_zero() -> None:
    shown = text(facts())

    of = 'service="web",mode="ingress",protocol="tcp",port="8080"'
    assert f"\nnetwork_published_port_connections{{{of}}} 3\n" in shown
    assert f'\nnetwork_published_port_bytes{{{of},direction="in"}} 30\n' in shown
    assert f'\nnetwork_published_port_bytes{{{of},direction="out"}} 300\n' in shown
    of = 'service="dns",mode="host",protocol="udp",port="53"'
    assert f"\nnetwork_published_port_connections{{{of}}} 0\n" in shown
    assert '\nnetwork_ports_published_total{mode="host",protocol="udp"} 1.0\n' in shown
    assert '\nnetwork_ports_published_total{mode="host",protocol="tcp"} 0.0\n' in shown


def test_problems_are_told_by_whose_they_are() -> None:
    shown = text(facts())

    assert '\nmesh_problems{of="node"} 1.0\n' in shown
    assert '\nmesh_problems{of="record"} 2.0\n' in shown
    assert "\nmesh_services_refused 1.0\n" in shown
    assert "\nmesh_revisions_behind 2.0\n" in shown


def test_durations_are_in_the_bucket_of_their_bound() -> None:
    tally = Tally()
    for seconds in (0.001, 0.0011, 1000.0):
        tally.publishing.add(seconds)

    shown = dict(tally.publishing.buckets())

    assert [shown[str(bound)] for bound in BOUNDS[:4]] == [0, 1, 2, 2]
    assert (shown[str(BOUNDS[-1])], shown["+Inf"]) == (2, 3)
    assert "\nnetwork_publish_duration_count 3.0\n" in text(facts(tally))


def test_a_refusal_counts_when_it_is_new() -> None:
    tally = Tally()
    one, other = (Problem(about=f"service {name}", message="taken") for name in ("web", "dns"))

    for problems in (
        (one,),
        (one, Problem(about="/mesh/tasks/x", message="")),
        (one, other),
        (),
        (one,),
    ):
        assert tally.refused(iter(problems)) == problems

    assert tally.publish_errors["refused"] == 3


def test_what_the_kernel_does_not_take_is_an_error_of_what_it_was_for() -> None:
    tally = Tally()
    key = ("known4", b"\n\x01\0\x01")

    tally.not_written(Delta({}, {key: b""}))
    tally.not_written(Delta({key: b""}, {}))
    tally.not_written(Delta({key: b""}, {key: b""}))

    assert (tally.publish_errors["kernel"], tally.unpublish_errors["kernel"]) == (2, 1)


def a_program(path: Path, name: str, status: int) -> str:
    found = path / name
    found.write_text(f"#!/bin/sh\nexit {status}\n")
    found.chmod(0o755)
    return str(found)


async def test_programs_are_counted_where_they_are_run(tmp_path: Path) -> None:
    tally = Tally()
    good, bad = a_program(tmp_path, "nft", 0), a_program(tmp_path, "iptables-legacy-restore", 1)
    other = a_program(tmp_path, "wg", 0)

    with observe.observed(tally.ran):
        working = asyncio.create_task(command.run(good))
        await command.run(other)
        with pytest.raises(CommandFailed):
            await command.run(bad)
    await command.run(good)
    await working

    assert tally.commands == {"nft": 1, "iptables-legacy-restore": 1}
    assert tally.command_errors["iptables-legacy-restore"] == 1
    assert tally.command_errors["nft"] == 0

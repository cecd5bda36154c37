"""What the doctor makes of etcd's answers: reachable, new enough, its clock, who is in it."""

from __future__ import annotations

import pytest

from mesh import __version__
from mesh.agent.config import AgentConfig
from mesh.doctor import check, store, subject
from mesh.doctor.subject import Known, Subject
from mesh.model.report import Applied, Problem
from mesh.store.etcd_version import Server
from tests.support import records
from tests.support.records import KEYS

EMPTY = Known(7, None, None, registered=False, alive=False, reports={}, peers={})


def server(version: str | None, ahead: float | None = 0.0, error: str = "") -> Server:
    return Server("http://192.0.2.5:2379", version, ahead, error)


@pytest.mark.parametrize(
    ("servers", "status", "words"),
    [
        ([server("3.5.16")], "ok", "3.5.16, revision 7"),
        ([server("3.6.0-rc.1")], "ok", "3.6.0-rc.1"),
        ([server("3.4.22"), server("3.5.6")], "ok", ""),
        ([server("3.4.21")], "warn", "3.4.21"),
        ([server("3.5.16"), server("3.5.2")], "warn", "3.5.2"),
        ([server("3.3.9")], "fail", "3.3.9"),
        ([], "ok", "version not told"),
        ([server(None, None, "404")], "ok", "version not told"),
        ([server("3.5.16"), server(None, None, "refused")], "warn", "refused"),
    ],
)
def test_versions_are_judged_and_silent_members_are_told(
    servers: list[Server], status: str, words: str
) -> None:
    etcd, *_ = store.of_etcd(EMPTY, "", servers)

    assert (etcd.name, etcd.status.value) == ("etcd", status)
    assert words in etcd.evidence


@pytest.mark.parametrize(
    ("ahead", "status", "words"),
    [(0.4, "ok", "within"), (-61.0, "warn", "61 s behind"), (9.0, "warn", "9 s ahead of")],
)
def test_a_clock_that_is_off_is_told(ahead: float, status: str, words: str) -> None:
    _, clock = store.of_etcd(EMPTY, "", [server("3.5.16", ahead)])

    assert (clock.name, clock.status.value) == ("clock", status)
    assert words in clock.evidence


def test_an_etcd_that_cannot_be_reached_is_a_problem_and_nothing_else_is_told() -> None:
    (etcd,) = store.of_etcd(None, "no etcd answers at http://x:1", [])

    assert (etcd.status, etcd.evidence) == (check.Status.FAIL, "no etcd answers at http://x:1")
    assert list(store.of_cluster(Subject(AgentConfig(node="n1"), True, None))) == []


REPORT = {"revision": 3, "backend": "nftables", "version": __version__, "problems": []}
OLD = {**REPORT, "version": "0.0.9"}
WORSE = {**REPORT, "problems": [{"about": "sysctl x", "message": "cannot be set"}]}


@pytest.mark.parametrize(
    ("more", "without", "expected"),
    [
        ({KEYS.applied("n1"): REPORT}, (), {"cluster": "ok", "node": "ok", "version": "ok"}),
        ({}, (KEYS.alive("n1"),), {"cluster": "ok", "node": "warn", "version": "ok"}),
        ({}, (KEYS.node("n1"),), {"cluster": "ok", "node": "warn", "version": "ok"}),
        ({}, (KEYS.node_allocation(1),), {"cluster": "ok", "node": "fail", "version": "ok"}),
        ({}, (KEYS.cluster,), {"cluster": "fail"}),
        ({KEYS.applied("n2"): OLD}, (), {"cluster": "ok", "node": "ok", "version": "warn"}),
        ({KEYS.applied("n2"): b"{"}, (), {"cluster": "ok", "node": "ok", "version": "ok"}),
        (
            {KEYS.applied("n1"): WORSE},
            (),
            {"cluster": "ok", "node": "ok", "version": "ok", "agent": "warn"},
        ),
    ],
)
def test_the_nodes_place_in_the_cluster_is_told(
    more: dict[str, records.Record], without: tuple[str, ...], expected: dict[str, str]
) -> None:
    there = {k: v for k, v in {**records.cluster(), **more}.items() if k not in without}

    known = subject.known(records.snapshot(there), KEYS, "n1")
    found = {c.name: c.status.value for c in store.of_cluster(_subject(known))}

    assert found == expected


def _subject(known: Known) -> Subject:
    return Subject(AgentConfig(node="n1"), True, known)


def test_the_program_is_that_of_the_nodes_own_number() -> None:
    known = subject.known(records.snapshot(records.cluster()), KEYS, "n2")

    here = Subject(AgentConfig(node="n2"), True, known)

    assert here.numbered
    assert here.parameters.network.number == 2
    assert set(known.peers.values()) <= {"n1", "n3"}
    assert not _subject(EMPTY).numbered


def test_a_report_is_kept_whole() -> None:
    report = Applied(
        revision=3, backend="x", version="1", problems=(Problem(about="a", message="b"),)
    )

    assert _subject(Known(7, None, None, True, True, {"n1": report}, {})).reported == report


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nftables v1.0.6 (Lester Gooch #5)", (1, 0, 6)),
        ("6.18.44-fc-v657", (6, 18, 44)),
        ("3.6.0-rc.1", (3, 6, 0)),
        ("no number", ()),
    ],
)
def test_versions_compare_as_numbers(text: str, expected: tuple[int, ...]) -> None:
    assert check.numbers(text) == expected

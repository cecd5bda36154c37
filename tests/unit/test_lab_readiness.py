"""When a lab counts as ready: pure, from one snapshot of etcd."""

from __future__ import annotations

from mesh.lab import readiness, topology
from mesh.model.allocation import NodeAllocation
from mesh.model.cluster import Cluster
from mesh.model.report import Applied
from mesh.store import schema
from mesh.store.protocol import KeyValue, Snapshot

CLUSTER = Cluster(id="test", prefix6="fd00:1:2::/48")
KEYS = readiness.KEYS


def progress(*items: tuple[str, bytes, int]) -> readiness.Progress:
    """What the keys, each with its value and revision, say."""
    stored = tuple(KeyValue(key, value, rev, rev, 1, 0) for key, value, rev in items)
    return readiness.of(Snapshot(items=stored, revision=99), CLUSTER)


def node(name: str, number: int, applied: int) -> tuple[tuple[str, bytes, int], ...]:
    """Everything a ready node has, if its kernel is at `applied`."""
    report = Applied(revision=applied, backend="nftables", version="1")
    return (
        (KEYS.node(name), b"{}", 10 + number),
        (KEYS.alive(name), b"", 10 + number),
        (
            KEYS.node_allocation(number),
            schema.encode(NodeAllocation(node=name)),
            20 + number,
        ),
        (KEYS.applied(name), schema.encode(report), 30 + number),
    )


def test_nodes_are_ready_when_their_kernels_know_of_all_others() -> None:
    seen = progress(*node("n1", 1, applied=22), *node("n2", 2, applied=22))

    assert seen.lacking(["n1", "n2"]) == {}
    assert seen.addresses()["n2"].overlay == ("10.0.0.2", "fd00:1:2::2")
    assert seen.addresses()["n2"].subnets == ("10.0.2.0/24", "fd00:1:2:2::/64")


def test_a_node_that_does_not_know_of_the_last_is_not_ready() -> None:
    seen = progress(*node("n1", 1, applied=21), *node("n2", 2, applied=22))

    assert seen.lacking(["n1", "n2"]).keys() == {"n1"}
    assert seen.behind(22) == {"n1"}


def test_what_cannot_be_read_disturbs_nobody() -> None:
    junk = (
        (KEYS.node_allocation(5000), b'{"node": "n3"}', 1),
        (KEYS.under("allocations/nodes") + "x", b'{"node": "n4"}', 1),
        (KEYS.node_allocation(7), b"\xff", 1),
        (KEYS.applied("n5"), b"[]", 1),
    )

    seen = progress(*node("n1", 1, applied=21), *junk)

    assert seen.lacking(["n1"]) == {}
    assert seen.networks.keys() == {"n1"}


def test_each_step_that_a_node_lacks_is_named() -> None:
    registered, alive, numbered, _ = node("n1", 1, applied=22)

    reasons = [
        progress(*steps).lacking(["n1"])["n1"]
        for steps in ((), (registered, alive), (registered, alive, numbered))
    ]

    assert len(set(reasons)) == 3


def test_machines_share_no_name_or_address() -> None:
    made = topology.machines(topology.NODE_COUNTS[-1])

    for values in (
        [m.name for m in made],
        [m.mac for m in made],
        [a for m in made for a in m.addresses],
    ):
        assert len(values) == len(set(values))
    assert topology.ETCD not in {a for m in made for a in m.addresses}

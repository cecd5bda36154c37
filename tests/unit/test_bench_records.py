"""The synthetic cluster that benchmarks fill etcd with."""

from __future__ import annotations

from mesh.bench import records
from mesh.model import protected
from mesh.model.publish import PORTS, Protocol


def test_the_controller_may_give_every_port_that_is_asked_for() -> None:
    asked = {records.published(index) for index in range(60_000)}

    assert asked <= set(PORTS)
    assert not asked & protected.barred(records.CLUSTER, Protocol.TCP)

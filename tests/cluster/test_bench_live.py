"""`mesh bench live` at a tiny size: a lab, etcd and an agent, measured from outside to inside."""

from __future__ import annotations

import asyncio

import pytest

from mesh.bench import live, names
from mesh.lab import control

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("backend", names.BACKENDS)
def test_live_measures_every_backend(backend: str) -> None:
    found = asyncio.run(live.run(backend, services=3, rounds=4))

    assert (found["bench"], found["backend"], found["services"]) == ("live", backend, 3)
    spreads = ("put_to_kernel_ms", "put_to_reachable_ms", "publish_port_ms", "publish_range_ms")
    for name in spreads:
        spread = found[name]
        assert isinstance(spread, dict)
        assert 0 < spread["p50"] <= spread["p99"]
    for name in ("cold_start_ms", "rss_mb"):
        value = found[name]
        assert isinstance(value, float)
        assert value > 0
    assert control.names() == []

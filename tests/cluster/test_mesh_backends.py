"""experiment"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support.cluster import PORT, Cluster, cluster, host, ingress, until
from tests.support.requests import Answer, Ask, again, ask_all, held, stream

pytestmark = pytest.mark.cluster
REPLICAS = ("a1", "b1", "d1")
ROUND = ("iptables-legacy", "iptables-nft", "nftables", "iptables-legacy", "nftables", "iptables-nft", "iptables-legacy")


@pytest.fixture(scope="module")
def mesh():
    placed = (("a1", "n1"), ("b1", "n2"), ("d1", "n3"), ("k1", "n1"), ("k2", "n2"))
    with cluster("backends", 3, *placed, backend=ROUND[0]) as made:
        asyncio.run(furnish(made))
        yield made


async def furnish(mesh):
    mesh.service("web", *ingress(8080))
    for r in REPLICAS:
        mesh.task("web", r)
    mesh.service("far", *ingress(8081))
    mesh.task("far", "b1")
    mesh.service("masq", *ingress(8082), source="masquerade")
    mesh.task("masq", "d1")
    mesh.service("hosted", *host(8083))
    mesh.task("hosted", "a1")
    await mesh.allocated("web", "far", "masq", "hosted")


def everything(mesh):
    out = []
    for port in (8080, 8081, 8082):
        out += mesh.from_outside(port)
    out += mesh.asks(("c1",), mesh.addresses("n1"), 8083)
    out += mesh.asks(("k1", "k2"), mesh.vips("web"), PORT)
    out += mesh.asks(("k1", "k2"), mesh.vips("far"), PORT)
    out += mesh.asks(("n1",), mesh.vips("web"), PORT)
    return out


async def test_round(mesh: Cluster) -> None:
    config = Path(mesh.node("n1").config)
    interval = float(os.environ.get("IVL", "0.002"))
    for old, new in zip(ROUND, ROUND[1:]):
        async with held(everything(mesh)) as first, stream(everything(mesh), interval, 8) as traffic:
            await traffic.more(200)
            text = re.sub(r'backend = ".*"', f'backend = "{new}"', config.read_text())
            config.write_text(text)
            began = time.monotonic()
            await mesh.signal("n1", signal.SIGTERM)
            await until(lambda: not mesh.agent_runs("n1"))
            sent0 = traffic.sent
            await mesh.start_again("n1")
            await mesh.settled()
            took = time.monotonic() - began
            sent1 = traffic.sent
            await traffic.more(200)
            afterwards = await again(first, 8)
        bad = {f.asked: (first[f], a) for f, a in afterwards.items() if a != first[f]}
        kinds = Counter((f.split()[0], f.split("protocol=")[-1], re.search(r"netns='([^']*)', address='([^']*)', port=(\d+)", f).groups()) for f in traffic.failures)
        print(f"\n{old} -> {new}: {took:.1f} s, {sent1-sent0} during, failures {len(traffic.failures)}, held bad {len(bad)} of {len(first)}")
        for k, n in list(kinds.items())[:30]:
            print("   ", n, k)
        for k, n in list(bad.items())[:10]:
            print("   HELD", k, n)
        left = {
            "nft": mesh.sh("n1", "nft", "list", "tables"),
            "sets": mesh.sh("n1", "ipset", "list", "-n"),
            "legacy": "\n".join(l for l in mesh.sh("n1", "iptables-legacy-save").splitlines() if "MESH" in l or "mesh" in l)[:300],
            "inft": "\n".join(l for l in mesh.sh("n1", "iptables-nft-save").splitlines() if "MESH" in l or "mesh" in l)[:300],
        }
        print({k: v[:160] for k, v in left.items()})
        log = mesh.lab.name
    names = {mesh.netns(n): n for n in ("n1", "n2", "n3", "c1", "c2", "k1", "k2")}
    print(names)

"""What the whole mesh costs, from a write to etcd: a lab of one node, real etcd, real kernel.

Fills etcd with services, starts the agent cold, then times single changes from inside the node.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Final

import msgspec

from mesh.bench import figures, names, records
from mesh.bench.progress import tell
from mesh.errors import MeshError
from mesh.lab import client, control, environment, readiness, wire
from mesh.store import schema
from mesh.store.protocol import MAX_OPERATIONS, Put

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.lab.client import OwnLab
    from mesh.store.protocol import Store

NODE: Final = "n1"
_LIMIT: Final = 300.0


async def run(backend: str, services: int, rounds: int) -> dict[str, object]:
    """The figures of one backend at one size; `rounds` single changes are timed, at most."""

    def say(what: str) -> None:
        tell(f"{names.case(backend, services)}: {what}")

    say("starting a lab")
    async with client.lab(f"bench-{os.getpid()}", 1, backend) as lab:
        url = (await lab.status()).etcd
        async with client.open_store(url) as store:
            say("writing to etcd")
            await _fill(store, services)
            say("waiting for the controller")
            await _allocated(store, services + 1)
            say("starting the agent cold")
            cold = await _cold_start(lab, store)
            for replica in ("a", "b"):
                server = (sys.executable, "-m", "mesh.lab.replica")
                await lab.run_task(records.TOGGLED, NODE, server, f"{records.TOGGLED}-{replica}")
        say("timing changes")
        found = json.loads(await _on_node(lab, "measure", backend, str(services), str(rounds)))
        pid = (await lab.status()).node(NODE).agent_pid
        rss = figures.rss_mb(pid) if pid is not None else None
    return {
        "bench": "live",
        "backend": backend,
        "services": services,
        "cold_start_ms": figures.milliseconds(cold),
        "put_to_kernel_ms": figures.percentiles(found["kernel"], 1e3),
        "put_to_reachable_ms": figures.percentiles(found["reachable"], 1e3),
        "publish_port_ms": figures.percentiles(found["port"], 1e3),
        "publish_range_ms": figures.percentiles(found["range"], 1e3),
        "rss_mb": rss,
    }


async def _on_node(lab: OwnLab, *arguments: str) -> str:
    """What mesh.bench.live_node prints on the node.  Raises MeshError with what it said."""
    done = await lab.run(NODE, (sys.executable, "-m", "mesh.bench.live_node", *arguments))
    if done.code:
        said = environment.last_line(done.stderr)
        raise MeshError(f"the measurement on the node ended with {done.code}: {said}")
    return done.stdout


def _records(services: int) -> Iterator[Put]:
    toggled = records.spec(records.TOGGLED, services)
    yield Put(records.KEYS.service(records.TOGGLED), schema.encode(toggled))
    for index in range(services):
        spec = records.spec(records.service_name(index), index)
        yield Put(records.KEYS.service(spec.name), schema.encode(spec))
        for replica in range(records.REPLICAS):
            record = msgspec.structs.replace(records.task(index, replica), node=NODE)
            yield Put(records.KEYS.task(record.service, record.id), schema.encode(record))


async def _fill(store: Store, services: int) -> None:
    batch: list[Put] = []
    for put in _records(services):
        batch.append(put)
        if len(batch) == MAX_OPERATIONS:
            await store.transact([], batch)
            batch = []
    await store.transact([], batch)


async def _allocated(store: Store, services: int) -> None:
    ports = records.KEYS.under("allocations/ports")

    async def all_there() -> bool:
        return len((await store.list(ports)).items) >= services

    await readiness.until(all_there, _LIMIT, lambda: "the controller has not allocated all ports")


async def _cold_start(lab: OwnLab, store: Store) -> float:
    """Seconds from the agent's start, on a host without rules of ours, to all rules live."""
    await client.kill(lab.name, NODE, agent_only=True)
    await _on_node(lab, "wipe")
    key = records.KEYS.applied(NODE)
    before = await store.get(key)

    async def reported() -> bool:
        now = await store.get(key)
        return now is not None and (before is None or now.mod_revision > before.mod_revision)

    began = time.perf_counter()
    await control.call(lab.name, wire.Start(target=NODE))
    await readiness.until(reported, _LIMIT, lambda: "the agent has reported nothing")
    return time.perf_counter() - began

"""The demo: a lab with two services, what they answer, and what happens when parts of it fail.

What is asked is data (`demo_rows`), what is right is judged by `demo_checks`, what is broken is in
`demo_faults`, and how it looks is up to its audience.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.errors import MeshError
from mesh.lab import client, demo_faults, demo_rows, environment, readiness
from mesh.lab.demo_checks import Check, Verdict
from mesh.lab.demo_client import innermost
from mesh.lab.demo_rows import Scene
from mesh.lab.demo_stage import Stage
from mesh.model.allocation import VipAllocation
from mesh.store import schema

if TYPE_CHECKING:
    from mesh.lab.client import OwnLab
    from mesh.lab.demo_stage import Audience
    from mesh.store.protocol import Store

_VIP_SECONDS: Final = 30.0
_LISTEN_SECONDS: Final = 30.0


class Outcome(NamedTuple):
    """All rows and, if one is not as it should be, the end of every agent's log."""

    checks: list[Check]
    logs: dict[str, list[str]]


async def run(lab: OwnLab, audience: Audience) -> Outcome:
    """Show everything in a lab that was launched just now; ends early where it cannot go on."""
    stage = Stage(lab, audience)
    try:
        await _play(stage)
    except MeshError as error:
        stage.tell(stage.current, Verdict(False, str(error)))
    finally:
        await stage.close()
    right = all(check.ok for check in stage.checks)
    return Outcome(stage.checks, {} if right else await stage.logs())


async def _play(stage: Stage) -> None:
    stage.group("lab", "A cluster in namespaces of this machine, and two services on it")
    await _start_lab(stage)
    async with client.open_store((await stage.lab.status()).etcd) as store:
        scene = await _start_services(stage, store)
        await _detour(stage, scene)
        for group in demo_rows.steady(scene):
            stage.group(group.key, group.title)
            for row in group.rows:
                await stage.ask(row)
        await demo_faults.kill_agent(stage, scene)
        await demo_faults.kill_replica(stage, scene, store)
        await demo_faults.kill_node(stage, scene, store)


async def _start_lab(stage: Stage) -> None:
    stage.begin("3 nodes, 2 clients, etcd")
    began = time.monotonic()
    await stage.lab.built()
    await stage.lab.form()
    took, status = time.monotonic() - began, await stage.lab.status()
    hosts = [f"{node.name} {node.underlay4}" for node in status.nodes]
    hosts += [f"{one.name} {one.address4}" for one in status.clients]
    stage.tell(stage.current, Verdict(True, f"{', '.join(hosts)}; ready in {took:.1f} s"))


async def _start_services(stage: Stage, store: Store) -> Scene:
    stage.begin("3 replicas of web, 1 of db")
    began = time.monotonic()
    for spec in demo_rows.SERVICES:
        await store.put(readiness.KEYS.service(spec.name), schema.encode(spec))
    await asyncio.gather(
        _start_clients(stage), *(_start_replica(stage, name) for name in demo_rows.TASKS)
    )
    scene = await _scene(stage, store)
    await _listening(stage, scene)
    where = ", ".join(f"{task} on {node}" for task, node in demo_rows.TASKS.items())
    took = time.monotonic() - began
    stage.tell(stage.current, Verdict(True, f"{where}; ready in {took:.1f} s"))
    return scene


async def _start_replica(stage: Stage, name: str) -> None:
    service = name.partition("-")[0]
    port = str(demo_rows.port_of(service))
    command = (sys.executable, "-m", "mesh.lab.replica", "--udp", "--port", port)
    task = await stage.lab.run_task(service, demo_rows.TASKS[name], command, name)
    if name in demo_rows.ASKING_REPLICAS:
        await stage.start_client(name, innermost(task.pid))


async def _start_clients(stage: Stage) -> None:
    status = await stage.lab.status()
    pids = {client.name: client.pid for client in status.clients}
    node = status.node(demo_rows.ASKING_NODE)
    if node.pid is None:
        raise MeshError(f"{node.name} is off")
    for name, pid in (*pids.items(), (node.name, node.pid)):
        await stage.start_client(name, pid)


async def _scene(stage: Stage, store: Store) -> Scene:
    """Who has which addresses, once web has its VIP."""
    vips: tuple[str, ...] = ()

    async def allocated() -> bool:
        nonlocal vips
        for item in (await store.list(readiness.KEYS.under("allocations/vips"))).items:
            vip = schema.decode(item.key, item.value, VipAllocation)
            vips = vip.addresses if vip.service == "web" else vips
        return bool(vips)

    await readiness.until(allocated, _VIP_SECONDS, lambda: "no manager has given web a VIP")
    status = await stage.lab.status()
    records = (await store.list(readiness.KEYS.under("tasks"))).items
    tasks = (schema.parse_task(item.key, item.value) for item in records)
    return Scene(
        nodes=status.nodes,
        clients={one.name: (one.address4, one.address6) for one in status.clients},
        vips=vips,
        tasks={task.id: task for task in tasks},
    )


async def _listening(stage: Stage, scene: Scene) -> None:
    """Wait for the replicas: they are registered from their start, before they listen."""
    lacking = ""

    async def all_answer() -> bool:
        nonlocal lacking
        lacking = await stage.silent(demo_rows.directly(scene.tasks.values()))
        return not lacking

    await readiness.until(all_answer, _LISTEN_SECONDS, lambda: f"{lacking} does not answer")


async def _detour(stage: Stage, scene: Scene) -> None:
    """Let c1 route through a node what is to be closed."""
    done = await stage.lab.run("c1", demo_rows.detour(scene))
    if done.code:
        raise MeshError(f"c1 cannot add its routes: {environment.last_line(done.stderr)}")

"""What the demo breaks while clients go on connecting: an agent, a replica, a node."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from typing import TYPE_CHECKING, Final

from mesh.errors import NotFound
from mesh.lab import client, control, demo_checks, demo_rows, readiness
from mesh.lab.demo_client import innermost
from mesh.lab.demo_prober import Ask
from mesh.lab.demo_rows import WEB
from mesh.model.cluster import Cluster
from mesh.store import schema

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.lab.demo_rows import Scene
    from mesh.lab.demo_stage import Stage
    from mesh.lab.wire import NodeStatus
    from mesh.store.protocol import Store

AGENT: Final = "n1"
REPLICA: Final = "web-2"
NODE: Final = "n2"

PAUSE: Final = 0.03
"""Seconds between two connections to a node."""

AGENTLESS: Final = 0.5
"""Seconds that a node goes without its agent, besides what the start of one takes."""

REPLICA_SECONDS: Final = 5.0
"""A killed replica is withdrawn at once; one started again refuses until it listens, and a crowded
machine may take seconds to start a program."""

RESTART_SECONDS: Final = 10.0
"""Its supervisor waits 0.2 s, and an interpreter starts in some tenths of a second."""

LIVENESS_SLACK: Final = 2.0
"""Seconds on top of the liveness time-out: etcd looks for ended leases every half second."""

_LIMIT: Final = 30.0


async def kill_agent(stage: Stage, scene: Scene) -> None:
    """Kill a node's agent and start it again: nothing is to fail."""
    stage.group("agent", f"The agent of {AGENT} is killed (SIGKILL) and started again")
    stage.begin("connections meanwhile")
    hosts = [node.underlay4 for node in scene.nodes]
    kept = [Ask(host=host, port=8080, count=None, pause=PAUSE, held=True) for host in hosts]

    async def disturb() -> float:
        at = time.monotonic()
        await client.kill(stage.lab.name, AGENT, agent_only=True)
        await asyncio.sleep(AGENTLESS)
        await stage.lab.power_on(AGENT)
        return at

    seen, _ = await stage.under_load([*_load(scene.nodes), *kept], disturb())
    new, old = seen[: -len(kept)], seen[-len(kept) :]
    stage.tell("new connections, every node", demo_checks.unbroken(_all(new)))
    stage.tell(f"{len(kept)} connections kept open", demo_checks.unbroken(_all(old)))


async def kill_replica(stage: Stage, scene: Scene, store: Store) -> None:
    """Kill a replica: the others take over, until its supervisor has started it again."""
    stage.group("replica", f"The replica {REPLICA} is killed (SIGKILL)")
    stage.begin("connections meanwhile")
    victim, dead = innermost(await stage.supervisor(REPLICA)), math.inf
    key = readiness.KEYS.task("web", REPLICA)
    before = await store.get(key)

    async def restarted() -> bool:
        now = await store.get(key)
        if now is None or now == before or (await readiness.read(store)).behind(now.mod_revision):
            return False
        task = schema.parse_task(now.key, now.value)
        return not await stage.silent(demo_rows.directly([task]))

    async def disturb() -> float:
        nonlocal dead
        at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        await control.gone(victim, _LIMIT)
        dead = time.monotonic()
        await readiness.until(restarted, _LIMIT, lambda: f"{REPLICA} is not started again")
        return at

    seen, at = await stage.under_load(_load(scene.nodes), disturb())
    answers = _all(seen)
    ends = (o.ended for o in answers if o.replica == REPLICA and o.began > dead)
    back = min(ends, default=math.inf)
    meanwhile = [one for one in answers if one.began > dead and one.ended < back]
    others = [task for task in WEB if task != REPLICA]
    stage.tell("connections, every node", demo_checks.settled(answers, at, REPLICA_SECONDS))
    stage.tell("answers while it is gone", demo_checks.taken_over(meanwhile, others))
    again = demo_checks.back(answers, dead, REPLICA, RESTART_SECONDS)
    stage.tell("started by its supervisor", again)


async def kill_node(stage: Stage, scene: Scene, store: Store) -> None:
    """Power a node off: within the liveness time-out the others answer without it."""
    liveness = await _liveness(store)
    stage.group("node", f"The node {NODE} is powered off; the liveness time-out is {liveness} s")
    stage.begin("connections until it is known to be gone")
    rest = [node for node in scene.nodes if node.name != NODE]

    async def known() -> bool:
        return NODE not in (await readiness.read(store)).alive

    async def disturb() -> float:
        at = time.monotonic()
        await client.kill(stage.lab.name, NODE, agent_only=False)
        await readiness.until(known, _LIMIT, lambda: f"{NODE} still counts as alive")
        return at

    seen, at = await stage.under_load(_load(rest), disturb())
    limit = liveness + LIVENESS_SLACK
    names = " and ".join(node.name for node in rest)
    stage.tell(f"connections, {names}", demo_checks.settled(_all(seen), at, limit))
    left = [task for task, node in demo_rows.TASKS.items() if task in WEB and node != NODE]
    for node in rest:
        await stage.ask(demo_rows.answered_by(f"{node.name} then", [node], left))


async def _liveness(store: Store) -> int:
    """The cluster's liveness time-out in seconds."""
    item = await store.get(readiness.KEYS.cluster)
    if item is None:
        raise NotFound(f"{readiness.KEYS.cluster} is missing in the lab's etcd: was it deleted?")
    return schema.decode(item.key, item.value, Cluster).liveness_ttl


def _load(nodes: Iterable[NodeStatus]) -> list[Ask]:
    return [Ask(host=node.underlay4, port=8080, count=None, pause=PAUSE) for node in nodes]


def _all(seen: Iterable[tuple[demo_checks.Seen, ...]]) -> list[demo_checks.Seen]:
    """Everything seen, in the order it began."""
    return sorted((one for many in seen for one in many), key=lambda one: one.began)

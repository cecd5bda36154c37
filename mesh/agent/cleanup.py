"""`mesh agent --cleanup`: takes the mesh off this host, all that is ours and nothing else.

The node's key and configuration stay, so that it can come back as the same node.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.agent import etcd, remark, writeback
from mesh.agent.network import Network
from mesh.agent.state import State
from mesh.dataplane import host, localports, sysctl, xttidy
from mesh.dataplane.firewall import Firewall
from mesh.engine import backend, lock, predecessor
from mesh.errors import StoreUnavailable
from mesh.health import memory
from mesh.reach import memory as unreachable
from mesh.rules.program import Devices
from mesh.store import schema

if TYPE_CHECKING:
    from mesh.agent.config import AgentConfig

log = logging.getLogger(__name__)

_ANY_MAC: Final = "02:00:00:00:00:00"


def run(config: AgentConfig, *, downgrade: bool = False) -> int:
    """Remove everything.  Raises MeshError naming what could not be removed.

    A later version may have left what this one does not know; to `downgrade` that stays.
    """
    host.check_rights()
    with lock.held(Path(config.state_dir)):  # an agent would put everything back
        asyncio.run(predecessor.check(downgrade=downgrade))
        asyncio.run(_remove(config))
    return 0


async def _remove(config: AgentConfig) -> None:
    keys = schema.Keys(config.etcd.prefix)
    network = Network(config, State(keys, config.node))
    try:
        devices = Devices(*network.names, _ANY_MAC)
        layout = await backend.layout(backend.anybody(devices))
        await backend.remove_all(devices)
        with closing(Firewall(ignored=0)) as firewall:
            await firewall.remove()
        xttidy.remove_empty()
        await network.remove()
        await remark.give_back(layout)
        localports.give_back(Path(config.state_dir))
        await writeback.withdraw(config)
        memory.forget(Path(config.state_dir))
        unreachable.forget(Path(config.state_dir))
    finally:
        await network.close()
    log.info("removed rules, links and routes")
    kept = " ".join(f"{key.replace('/', '.')}={value}" for key, value in sysctl.SHARED.items())
    log.info("kernel settings stay, others may count on them: %s", kept)
    await _sign_off(config, keys)


async def _sign_off(config: AgentConfig, keys: schema.Keys) -> None:
    """Tell the others at once; without etcd they notice when the lease runs out."""
    try:
        async with etcd.opened(config.etcd) as store:
            await store.delete(keys.alive(config.node))
            await store.delete(keys.applied(config.node))
            await store.delete(keys.listeners(config.node))
            own = keys.published(config.node), keys.health(config.node)
            for item in (await store.list(*own)).items:
                await store.delete(item.key)
    except StoreUnavailable as error:
        log.warning("etcd was not told: %s", error)

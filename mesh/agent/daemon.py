"""The agent as a process: the store it opens, the loop it runs on, the signals that end it.

Forwarding goes on when it ends; only `mesh agent --cleanup` takes it off the host.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.agent import etcd
from mesh.agent.agent import Agent
from mesh.engine import lock, predecessor
from mesh.errors import MeshError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from mesh.agent.config import AgentConfig

log = logging.getLogger(__name__)


_SWITCH_SECONDS: Final = 0.0005
"""How long a thread waits for Python while another computes: one that feeds the kernel is idle for
as long, which with Python's own 5 ms is half of the time in which a chunk of elements is planned.
"""


def run(config: AgentConfig, *, downgrade: bool = False) -> int:
    """Run the agent until SIGTERM or SIGINT.  Raises MeshError if it cannot run.

    Rules of a later version are taken over only to `downgrade`.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    with lock.held(Path(config.state_dir)):
        asyncio.run(predecessor.check(downgrade=downgrade))
        _run(_serve(config))
    return 0


def _run(main: Coroutine[None, None, None]) -> None:
    """On uvloop where it is installed: etcd traffic costs a third there (speed.md section 8)."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


async def _serve(config: AgentConfig) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with etcd.opened(config.etcd) as store:
        agent = asyncio.create_task(Agent(config, store).run())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({agent, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        agent.cancel()
        try:
            await agent
        except asyncio.CancelledError:
            log.info("stopped; forwarding goes on")
        except BaseExceptionGroup as group:
            raise _cause(group) from group


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first expected error among those that ended the agent, else the first of all."""
    expected, _ = group.split(MeshError)
    found: BaseException = expected or group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found

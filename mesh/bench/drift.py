"""Somebody else changes the mesh's rules; how long until all is as it was.

"Somebody else" is a second driver of the same backend.  The repair is the agent's own: notice,
let the burst settle, mend the program, dump, write the differences.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from mesh.agent.rules import SETTLE_SECONDS
from mesh.bench import backends, figures
from mesh.dataplane import command
from mesh.delta import Delta
from mesh.errors import MeshError
from mesh.model import address
from mesh.model.address import Family
from mesh.rules import xtables

if TYPE_CHECKING:
    from mesh.dataplane.protocol import Driver, ElementDelta
    from mesh.engine.reconciler import Reconciler
    from mesh.rules.elements import Elements

AMOUNTS: Final = (1, 100)
"""How many elements somebody removes, or adds."""

_STRANGERS: Final = "198.18.0.0/15"
"""Where the addresses come from that somebody adds."""

_NOTICE_SECONDS: Final = 60.0


async def repairs(
    backend: str, driver: Driver, reconciler: Reconciler, rounds: int
) -> dict[str, float]:
    """Milliseconds from a change to its repair, by how many elements were removed or added."""
    desired = await driver.read()
    found = {}
    for amount in AMOUNTS:
        changes = (_removal(desired, amount), _addition(amount))
        taken = [
            await _repaired(backend, reconciler, change)
            for _ in range(rounds)
            for change in changes
        ]
        found[str(amount)] = figures.milliseconds(figures.median(taken))
    if await driver.read() != desired:
        raise MeshError(f"{backend}: what somebody changed was not repaired")
    return found


def _removal(desired: Elements, amount: int) -> ElementDelta:
    names = [key for key in desired if key[0] == "vips4"]
    return Delta({key: desired[key] for key in names[:amount]}, {})


def _addition(amount: int) -> ElementDelta:
    strangers = (address.nth(_STRANGERS, number) for number in range(amount))
    return Delta({}, {("known4", address.packed(each)): b"" for each in strangers})


async def _repaired(backend: str, reconciler: Reconciler, change: ElementDelta) -> float:
    """Seconds from somebody's change to the repair."""
    somebody, watcher = backends.driver(backend), backends.driver(backend)
    try:
        await somebody.prepare()
        noticed = asyncio.create_task(watcher.tampered(SETTLE_SECONDS))
        await asyncio.sleep(0)  # it looks for the first time
        await somebody.apply(change)
        began = time.perf_counter()
        await asyncio.wait_for(noticed, _NOTICE_SECONDS)
        await reconciler.heal()
        if not reconciler.repaired():
            raise MeshError(f"{backend}: nothing differed after somebody's change")
        return time.perf_counter() - began
    finally:
        somebody.close()
        watcher.close()


async def rewrite(backend: str, driver: Driver, reconciler: Reconciler) -> float:
    """Seconds to write everything again that is there.

    With nftables one batch that removes and adds each element.  With iptables every chain, which
    is how it mends a jump of ours that somebody took out.
    """
    if backend == "nftables":
        desired = await driver.read()
        began = time.perf_counter()
        await driver.apply(Delta(desired, desired))
        return time.perf_counter() - began
    hook, chain = next(iter(xtables.program(backends.parameters(), Family.V4)["nat"].hooks.items()))
    await command.run(backend, "-w", "20", "-t", "nat", "-D", hook, "-j", chain)
    began = time.perf_counter()
    await reconciler.heal()
    return time.perf_counter() - began

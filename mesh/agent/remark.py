"""Takes a node that forwards to other bits of the marks, with all connections it has.

A flow's mark says whether, and through which node, it is steered.  So while some marks are of the
old layout and some of the new, no packet of the mesh passes (mesh.dataplane.hold): for a fraction
of a second, then connections go on.  An agent that is killed meanwhile leaves the hold behind.
Nobody can say then which marks were rewritten, and the next agent forgets these flows.
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from mesh.dataplane.conntrack import Conntrack
from mesh.dataplane.firewall import Firewall, Mode
from mesh.dataplane.hold import Held, Hold
from mesh.delta import Delta
from mesh.engine import backend
from mesh.errors import ApplyFailed, MeshError
from mesh.rules.needs import Wanted
from mesh.rules.remark import Remark

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mesh.dataplane.protocol import Driver
    from mesh.rules.elements import Elements
    from mesh.rules.marks import Layout
    from mesh.rules.program import Parameters

log = logging.getLogger(__name__)


async def settle(
    wanted: str,
    parameters: Parameters,
    start: Callable[[], Awaitable[None]],
    mode: Mode = Mode.FORWARD,
) -> None:
    """Bring rules and flows of another layout, if the host has any, to that of `parameters`, and
    then the network, by `start`.  `wanted` is the backend that is configured, `mode` says what may
    be done about firewalls.  Raises MeshError.
    """
    with closing(Hold()) as hold:
        doubtful = await hold.doubtful()
        old = await backend.layout(parameters) or parameters.layout
        if doubtful or old != parameters.layout:
            log.warning("marks change from=%r to=%r", str(old), str(parameters.layout))
            before = replace(parameters, layout=old)
            await _change(wanted, before, parameters.layout, hold, mode)
        await start()
        hold.end()


async def _change(wanted: str, before: Parameters, layout: Layout, hold: Hold, mode: Mode) -> None:
    """Rules and flows, of which nothing moves meanwhile."""
    doubtful = await hold.doubtful()
    elements = await backend.read_present(before)
    remark = Remark(elements, before.layout, layout)
    vips = tuple(vip for family in before.vips for vip in family)
    held = Held(doubtful | {before.layout.ours, layout.ours}, vips, elements)
    await hold.begin(held)
    try:
        await backend.remove_iptables(before)
        driver = (await backend.choose(wanted, replace(before, layout=layout))).driver
    except MeshError:
        if not doubtful:
            hold.end()  # no mark was rewritten
        raise
    try:
        await _rewrite(remark, doubtful)
        await hold.settle(held)
        await _take_along(driver, remark.elements(elements))
        await _accept(driver, replace(before, layout=layout), mode)
        await backend.retire_others(driver, before)
    finally:
        driver.close()


async def _rewrite(remark: Remark, doubtful: frozenset[int]) -> None:
    """Every flow's mark, but of those that nobody can tell the meaning of."""
    with closing(Conntrack(remark.new)) as conntrack:
        for bit in doubtful:
            await conntrack.forget_marked(bit)
        count = await conntrack.remark(remark.old.ours, remark.mask, remark.mark)
    log.info("marks changed flows=%d forgotten=%s", count, bool(doubtful))


async def _take_along(driver: Driver, elements: Elements) -> None:
    """Serve at once what was served; what changed since is the reconciler's."""
    try:
        await driver.apply(Delta.between(await driver.read(), elements))
    except ApplyFailed as error:
        log.warning("elements are written later: %s", error)
    await driver.attach()


async def _accept(driver: Driver, parameters: Parameters, mode: Mode) -> None:
    """Let a firewall that drops what others forward know the flows by their new mark."""
    flavour = driver.name.removeprefix("iptables-")
    with closing(Firewall(ignored=driver.port, own=flavour, mode=mode)) as firewall:
        await firewall.sync(Wanted.of(parameters, 0, frozenset()))
        for problem in firewall.failed:
            log.warning("%s: %s", problem.about, problem.message)


async def give_back(layout: Layout | None) -> None:
    """Leave the bits of all marks to the host again, once nothing reads them.  Raises MeshError.

    Where no rules were (None), what flows have there is not ours.
    """
    if layout is not None:
        with closing(Conntrack(layout)) as conntrack:
            await conntrack.remark(layout.ours, layout.ct_mark, lambda _mark: 0)
    with closing(Hold()) as hold:
        hold.end()

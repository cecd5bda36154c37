"""Published ports in one kernel: the rule engine, and what has to be looked after beside it.

Owns the driver and its sockets.  Never decides who may have a port, and knows no file.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from mesh.dataplane import sysctl, xttidy
from mesh.dataplane.conntrack import Conntrack
from mesh.dataplane.firewall import Firewall
from mesh.dataplane.nfnetlink import Socket
from mesh.engine import backend, predecessor
from mesh.engine.desired import Touched
from mesh.engine.flows import Flows
from mesh.engine.healing import Repair
from mesh.engine.reconciler import Reconciler
from mesh.errors import ApplyFailed, HostNotReady
from mesh.hostports import alone
from mesh.model.address import FAMILIES, Family, family_of
from mesh.model.report import Problem
from mesh.rules import needs
from mesh.rules.needs import FORWARD, Wanted
from mesh.rules.stale import Stale

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.dataplane.firewall import Mode
    from mesh.engine.backend import Chosen
    from mesh.hostports.alone import Published
    from mesh.rules.program import Parameters


class Installation:
    """What is published, as the kernel of the calling thread's network namespace has it."""

    def __init__(
        self, published: Published, chosen: Chosen, parameters: Parameters, mode: Mode
    ) -> None:
        layout = parameters.layout
        self.parameters = parameters
        self.backend = chosen.driver.name
        self._driver = chosen.driver
        self._netlink = Socket()
        self._flows = Flows(Conntrack(layout), layout)
        flavour = self.backend.removeprefix("iptables-")
        self._firewall = Firewall(chosen.driver.port, flavour, mode)
        self._reconciler = Reconciler(published, chosen.driver, self._flows.written, layout)
        self.mended = Repair(program=chosen.loaded)
        """What was not as it should be when this began."""

    @staticmethod
    async def open(
        published: Published, wanted: str, parameters: Parameters, mode: Mode
    ) -> Installation:
        """Take over what the kernel holds, and write the difference.  Raises MeshError.

        `wanted` is a backend by name, or "auto".
        """
        backend.check(wanted)
        chosen = await backend.choose(wanted, parameters)
        try:
            made = Installation(published, chosen, parameters, mode)
        except BaseException:
            chosen.driver.close()
            raise
        try:
            await made._begin()
        except BaseException:
            made.close()
            raise
        return made

    async def _begin(self) -> None:
        before = await backend.read_others(self._driver, self.parameters)
        wrong = await self._reconciler.start(before)
        self._reconciler.repaired()
        self.mended |= Repair(elements=wrong)
        await self._look()
        await backend.retire_others(self._driver, self.parameters)

    async def change(self, task: str) -> None:
        """A task has other ports now.  Raises ApplyFailed if the kernel does not take them."""
        await self._reconciler.reconcile(Touched(frozenset((task,)), nodes=False))
        for problem in self._reconciler.problems():
            if problem.about == f"service {task}":
                raise ApplyFailed(problem.message)
        await self._look()

    async def heal(self) -> Repair:
        """Bring the kernel back from what somebody else did; what that was."""
        await self._reconciler.heal()
        await self._look()
        lines = len(self._firewall.replaced())
        return self._reconciler.repaired() | Repair(lines=lines)

    def check_owner(self) -> None:
        """Raise Conflict if these are somebody else's rules by now, as far as it can be told in no
        time.
        """
        predecessor.check_nftables(self.parameters.owner, self._netlink)

    def problems(self, addresses: Iterable[str]) -> tuple[Problem, ...]:
        """What keeps packets from containers at these addresses, or could not be done."""
        blocked = [each for each in self._firewall.blocked if each.need.hook == FORWARD]
        families = {family_of(each) for each in addresses}
        return (
            *self._driver.problems(),
            *self._reconciler.problems(),
            *self._firewall.failed,
            *needs.problems(blocked),
            *(_SILENT[f] for f in FAMILIES if f in families and not sysctl.forwards(f)),
        )

    async def _look(self) -> None:
        """Have the host's own firewall let pass what we forward."""
        await self._firewall.sync(Wanted.of(self.parameters, 0, frozenset()))

    async def settle(self) -> None:
        """Forget the flows that nothing serves any more: each look at them takes the kernel some
        20 ms.  Raises ApplyFailed.
        """
        await self._flows.settle(self._reconciler.held, self._reconciler.held_udp)

    def close(self) -> None:
        """Release sockets; the kernel keeps forwarding."""
        self._driver.close()
        self._netlink.close()
        self._flows.close()
        self._firewall.close()


_SILENT = {
    family: Problem(
        about="kernel",
        message=f"{name} is 0, so nothing is forwarded: run `sysctl -w {name}=1`, and write it to "
        "/etc/sysctl.d",
    )
    for family, name in (
        (Family.V4, "net.ipv4.ip_forward"),
        (Family.V6, "net.ipv6.conf.all.forwarding"),
    )
}


async def remove() -> None:
    """Take every rule of ours out of this kernel, and see that none is left.  Raises MeshError."""
    parameters = alone.parameters(0, ())
    await backend.remove_all(alone.DEVICES)
    with closing(Firewall(ignored=0)) as firewall:
        await firewall.remove()
    xttidy.remove_empty()
    with closing(Conntrack(parameters.layout)) as conntrack:
        ours = parameters.layout.ours
        await conntrack.forget((Stale(ours, ours),))
    left = await backend.holding(parameters)
    if left:
        raise HostNotReady(f"rules of {', '.join(left)} are still there: somebody put them back")

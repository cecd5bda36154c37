"""Checks of what others have on this host: firewalls, marks, routing rules, devices, ports."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Final

from mesh.dataplane import foreign, host
from mesh.dataplane.firewall import Firewall, Mode
from mesh.doctor import check
from mesh.doctor.check import AS_ROOT
from mesh.errors import CommandFailed, HostNotReady
from mesh.model.address import FAMILIES
from mesh.rules import needs
from mesh.rules.needs import Wanted
from mesh.wg import links

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from mesh.dataplane.foreign import Marking, RoutingRule
    from mesh.doctor.check import Check
    from mesh.doctor.subject import Subject
    from mesh.rules.marks import Layout
    from mesh.rules.needs import Blocked

_PASSES: Final = 3
"""Looks at a table; one that iptables cannot read needs a second."""


async def of_firewalls(subject: Subject, backend: str, *, running: bool) -> list[Check]:
    """Whether somebody's chains drop for certain what the mesh needs."""
    own = backend.removeprefix("iptables-")
    with closing(Firewall(ignored=0, own=own, mode=Mode.REPORT)) as firewall:
        try:
            await _settle(firewall, subject)
        except OSError as error:
            return [check.warn("firewall", f"not read: {error}", AS_ROOT)]
        unread = (f"not read: {each.message}" for each in firewall.failed)
        found = [check.warn("firewall", text, AS_ROOT) for text in unread]
        for each in firewall.blocked:
            text = f"{each.place} drops {each.need.what}"
            if not running and _is_for_the_agent(subject, each):
                text += "; the agent puts a line of its own at the top"
                found.append(check.ok("firewall", text))
            else:
                found.append(check.fail("firewall", text, needs.remedy(each)))
    return found or [check.ok("firewall", "no chain of this host drops what the mesh needs")]


def _is_for_the_agent(subject: Subject, each: Blocked) -> bool:
    mode = Mode(subject.config.firewall)
    in_forward = each.need.hook == needs.FORWARD and each.place.program != "nft"
    return mode is Mode.OPEN or (mode is Mode.FORWARD and in_forward)


async def _settle(firewall: Firewall, subject: Subject) -> None:
    """Peers may use either family: which one they do is not looked up."""
    port = subject.cluster.wireguard_port
    for _ in range(_PASSES):
        await firewall.sync(Wanted.of(subject.parameters, port, frozenset(FAMILIES)))
        if firewall.is_settled:
            return


async def of_marks(layout: Layout) -> list[Check]:
    """Whether somebody else writes the marks that the mesh uses."""
    found: list[Marking] = []
    try:
        for table, text in (await foreign.saved()).items():
            found += foreign.markings(table.program, text)
        found += await foreign.nft_markings()
    except CommandFailed as error:
        return [check.warn("marks", f"not read: {error}", AS_ROOT)]
    taken = [each for each in found if _is_in_the_way(each, layout)]
    if not taken:
        return [check.ok("marks", "nobody else writes the bits of the mesh")]
    more = f" (and {len(taken) - 1} more)" if len(taken) > 1 else ""
    fix = (
        f"keep it out of packet mark bits {layout.packet_mark:#x} and ct mark bits "
        f"{layout.ct_mark:#x}, or choose others in [marks] of agent.toml"
    )
    return [check.warn("marks", f"{taken[0].where}: {taken[0].rule}{more}", fix)]


def _is_in_the_way(each: Marking, layout: Layout) -> bool:
    return bool(each.bits & (layout.ct_mark if each.kind == "CONNMARK" else layout.packet_mark))


def of_routing(
    layout: Layout, rules: list[RoutingRule], tunnels: Mapping[str, int]
) -> Iterator[Check]:
    """Whether somebody's routing rules stand between ours, or he marks packets with our bits, for
    routing rules or by WireGuard devices: with these no agent begins.
    """
    ours = range(links.RULE_SKIP, links.RULE_END + 1)
    between = [rule for rule in rules if rule.priority in ours]
    for rule in between[:1]:
        fix = f"move it out of priorities {ours[0]}-{ours[-1]}"
        yield check.warn("routing", f"{rule} of somebody else is between the mesh's", fix)
    try:
        foreign.check_marks(layout, rules, tunnels)
    except HostNotReady as error:
        reason, _, fix = str(error).partition(": ")
        yield check.fail("routing", reason, fix)
        return
    if not between:
        yield check.ok("routing", "nobody's routing rules touch ours")


def of_ports(subject: Subject, devices: Collection[str]) -> Iterator[Check]:
    """Whether our UDP ports are free, where our devices do not have them yet."""
    cluster, names = subject.cluster, subject.names
    ports = {
        "wireguardPort": (cluster.wireguard_port, names.overlay),
        "steeringPort": (cluster.steering_port, names.steering),
    }
    for setting, (port, device) in ports.items():
        if device in devices:
            continue
        try:
            host.check_port(port)
        except HostNotReady:
            fix = f"stop what uses it (ss -ulnp sport = {port}), or choose {setting} at init"
            yield check.fail("udp", f"port {port} is taken by somebody else", fix)
            return
    numbers = " and ".join(str(port) for port, _ in ports.values())
    yield check.ok("udp", f"{numbers} are free or the mesh's")

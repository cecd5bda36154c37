"""Checks of what others have on this host: firewalls, marks, routing rules, devices, ports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.dataplane import firewall, foreign, host
from mesh.doctor import check
from mesh.doctor.check import AS_ROOT
from mesh.errors import CommandFailed, HostNotReady
from mesh.wg import links

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from mesh.dataplane.firewall import Table
    from mesh.dataplane.foreign import Chain, Filter, Marking, RoutingRule
    from mesh.doctor.check import Check
    from mesh.doctor.subject import Subject
    from mesh.rules.marks import Layout


def _ours(subject: Subject) -> str:
    """The mark of our flows, as connmark takes it."""
    ours = subject.config.marks.layout.ours
    return f"{ours:#x}/{ours:#x}"


def _accept(subject: Subject) -> str:
    return f"-m connmark --mark {_ours(subject)} -j ACCEPT"


async def of_firewalls(subject: Subject, backend: str, *, running: bool) -> list[Check]:
    """Whether somebody's FORWARD or INPUT drops what the mesh needs."""
    found: list[Check] = []
    try:
        for table, text in (await foreign.saved()).items():
            rules = foreign.filters(text)
            if rules is not None:
                own = f"iptables-{table.flavour}" == backend
                found += _of_forward(subject, table, rules, own=own, running=running)
                found += _of_input(subject, table, rules)
        found += _of_chains(subject, await foreign.chains())
    except CommandFailed as error:
        return [check.warn("firewall", f"not read: {error}", AS_ROOT)]
    return found or [check.ok("firewall", "nobody's FORWARD or INPUT drops by default")]


def _of_forward(
    subject: Subject, table: Table, rules: Filter, *, own: bool, running: bool
) -> Iterator[Check]:
    """A table of the flavour that drives our rules accepts our flows by itself: `own`."""
    drops = rules.policies.get("FORWARD") == "DROP"
    evidence = f"{table.program} FORWARD has {'policy DROP' if drops else 'rules of others'}"
    lacking = not own and "FORWARD" in rules.policies
    layout = subject.config.marks.layout
    if not lacking or not firewall.missing(rules.listed("FORWARD"), layout):
        if drops:
            yield check.ok("firewall", f"{evidence}, and accepts the mesh's flows first")
    elif not running:
        text = f"{evidence}; the agent puts one line that accepts its flows at the top"
        yield check.ok("firewall", text)
    else:
        status = check.fail if drops else check.warn
        fix = f"see the agent's log, or run `{table.program} -I FORWARD 1 {_accept(subject)}`"
        yield status("firewall", f"{evidence}, and does not begin with the mesh's line", fix)


def _of_input(subject: Subject, table: Table, rules: Filter) -> Iterator[Check]:
    """Only what rules name is asked; a rule may accept more than it names."""
    if rules.policies.get("INPUT") != "DROP":
        return
    wireguard, steering = subject.cluster.wireguard_port, subject.cluster.steering_port
    wanted = {
        f"--dport {wireguard} ": f"-p udp --dport {wireguard} -j ACCEPT",
        f"--dport {steering} ": f"-i {subject.names.overlay} -p udp --dport {steering} -j ACCEPT",
        _ours(subject): _accept(subject),
    }
    every = "\n".join(rule for each in rules.rules.values() for rule in each)
    lacking = [line for words, line in wanted.items() if words not in every]
    evidence = f"{table.program} INPUT has policy DROP"
    if not lacking:
        yield check.ok("firewall", f"{evidence}, and names what the mesh needs")
        return
    lines = "; ".join(f"{table.program} -I INPUT {line}" for line in lacking)
    status = check.warn if any(map(_is_broad, rules.rules["INPUT"])) else check.fail
    text = f"{evidence} and does not name all that the mesh needs"
    yield status("firewall", text, f"run `{lines}`, and keep ICMPv6 open")


def _is_broad(rule: str) -> bool:
    """Whether a rule leads elsewhere, or accepts without looking at a port or a state."""
    narrow = ("--dport", "state", "-i lo ", "icmp")
    return not any(word in rule for word in narrow) and "MESH-" not in rule


def _of_chains(subject: Subject, chains: list[Chain]) -> Iterator[Check]:
    """An accept of ours is final in our table alone."""
    ours = subject.config.marks.layout.ours
    for chain in chains:
        if chain.hook in ("forward", "input") and chain.policy == "drop":
            text = f"nft table {chain.table}, chain {chain.name} has policy drop"
            fix = f"accept `ct mark & {ours:#x} == {ours:#x}` there"
            if chain.hook == "input":
                fix += ", UDP for WireGuard and the steering device, and ICMPv6"
            yield check.warn("firewall", text, fix)


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

"""`mesh trace`: one packet's way through a node's rules, as they should be and as they are."""

from __future__ import annotations

import asyncio
import difflib
from collections import Counter
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from mesh import errors
from mesh.cli import engine, options, output
from mesh.cli.names import Names
from mesh.dataplane.conntrack import Conntrack
from mesh.model import address
from mesh.model.address import Family
from mesh.model.publish import PORTS, Protocol
from mesh.rules import connlimits, dump, elements, trace_show
from mesh.rules import trace as walking
from mesh.rules.trace import Entry, Packet, Place
from mesh.vip import eligibility

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.agent.state import State
    from mesh.cli.engine import Engine
    from mesh.rules.dump import Rules
    from mesh.rules.trace import Trace

_NAMED = tuple(entry.value for entry in Entry)


@click.command(cls=options.Verb)
@click.argument("src")
@click.argument("dst", metavar="DST:PORT[/PROTO]")
@engine.NODE
@click.option("--enters", type=click.Choice(_NAMED), help="Where it meets the node (default: SRC).")
@click.option("--via", metavar="NODE", help="Steered here by this node: its second half of a way.")
@click.option("--offline", metavar="FILE", help="A dump of `mesh rules show --json`; - is stdin.")
def trace(
    src: str, dst: str, node: str | None, enters: str | None, via: str | None, offline: str | None
) -> None:
    """Walk the first packet from SRC to DST through a node's rules, step by step.

    SRC is an address, a task or a node, DST an address, a service or a node; IPv6 as [ADDR]:PORT.
    On the node itself, as root, the packet also goes through the kernel's own maps; exits with 1
    where the two differ.
    """
    found = None if offline is not None else engine.read(node)
    if offline is not None and node is not None:
        raise errors.BadUsage("--offline FILE has its own node: leave out --node")
    rules = found.desired if found is not None else engine.offline(str(offline))
    names = Names(found.state if found is not None else None)
    packet = _packet(src, dst, rules, names)
    if via is not None:
        packet = packet._replace(entry=Entry.STEERING, ether=names.steering(via))
    elif enters is not None:
        packet = packet._replace(entry=Entry(enters))
    owners = dump.frontends(rules.owners, rules.parameters.layout)
    held: Counter[int] = Counter()
    if found is not None and found.kernel is not None:
        held = asyncio.run(_held(packet, found.kernel))
    with options.naming("SRC DST"):
        wanted = walking.walk(packet, replace(_place(rules, owners), held=held))
    real = None
    if found is not None and found.kernel is not None:
        real = walking.walk(packet, replace(_place(found.kernel, owners), held=held))
        if found.differences:
            output.warn("the program in the kernel is not as it should be: `mesh rules diff`")
    placement = _placement(found, wanted) if found is not None else ""
    unread = found.unread if found is not None else f"as dumped: {rules.source}"
    _tell(rules, wanted, real, unread, placement)
    if real not in (None, wanted):
        options.exit_with(1)


def _place(rules: Rules, owners: Mapping[int, str]) -> Place:
    return Place(rules.parameters, rules.elements, rules.addresses, owners, rules.backend)


async def _held(packet: Packet, rules: Rules) -> Counter[int]:
    """How many connections the client of a packet has by now, by frontend id: only where a limit
    makes that matter.
    """
    layout, prefixes6 = rules.parameters.layout, rules.parameters.prefixes[1]
    if not elements.connlimits(rules.elements):
        return Counter()
    with closing(Conntrack(layout)) as conntrack:
        flows = await conntrack.flows(layout.ours, layout.ours | layout.via)
    client = connlimits.client(packet.source, prefixes6)
    return Counter(
        layout.id_of(flow.mark)
        for flow in flows
        if flow.live and connlimits.client(address.unpacked(flow.source[0]), prefixes6) == client
    )


# ---- what is asked


def _packet(src: str, dst: str, rules: Rules, names: Names) -> Packet:
    """The packet; where it enters follows from its source."""
    target, port, protocol = _parse_target(dst)
    known = next((f for text in (src, target) if (f := _family(text)) is not None), Family.V4)
    destination = names.destination(target, known)
    source = names.source(src, known)
    if src == rules.node and _is_ours(destination, rules):
        # What the routes of the overlay name as the source to use.
        source = rules.parameters.network.overlay_address(known)
    if src == rules.node and address.is_loopback(destination):
        source = destination
    return Packet(source, destination, protocol, port, _entry(source, rules))


def _family(text: str) -> Family | None:
    try:
        return address.family_of(address.parse_address(text))
    except ValueError:
        return None


def _parse_target(text: str) -> tuple[str, int, Protocol]:
    """Host, port and protocol of DST:PORT[/PROTO].  Raises BadUsage."""
    aim, slash, name = text.partition("/")
    host, _, port = aim.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not (host and port.isascii() and port.isdigit() and int(port) in PORTS):
        raise errors.BadUsage(f"{text!r}: write DST:PORT[/tcp|udp|sctp], IPv6 as [ADDR]:PORT")
    try:
        return host, int(port), Protocol(name) if slash else Protocol.TCP
    except ValueError:
        raise errors.BadUsage(f"{text!r}: the protocol is tcp, udp or sctp, not {name!r}") from None


def _is_ours(host: str, rules: Rules) -> bool:
    prefixes = rules.parameters.prefixes[address.FAMILIES.index(address.family_of(host))]
    return any(address.contains(prefix, host) for prefix in prefixes)


def _entry(source: str, rules: Rules) -> Entry:
    subnet = rules.parameters.network.subnet(address.family_of(source))
    if _place(rules, {}).is_local(source):
        return Entry.NODE
    if address.contains(subnet, source):
        return Entry.CONTAINER
    return Entry.OVERLAY if _is_ours(source, rules) else Entry.OUTSIDE


# ---- what is answered


def _placement(found: Engine, walked: Trace) -> str:
    """Why the node chooses among these replicas and no others, or does not answer at all."""
    service, node = walked.service, found.state.node_view()
    if service is None:
        return _elsewhere(found.state, walked.packet)
    view = found.state.service_view(service)
    return eligibility.told(view, node) if view is not None and node is not None else ""


def _elsewhere(known: State, packet: Packet) -> str:
    """Which service has the port that a packet is for, on other nodes than this one."""
    for name in sorted(known.services()):
        view = known.service_view(name)
        ports = view.spec.ports if view is not None and view.spec.publish_on else ()
        if any((p.published, p.protocol) == (packet.port, packet.protocol) for p in ports):
            assert view is not None
            return f"service {name} publishes that port, on nodes with {view.spec.publish_on}"
    return ""


def _tell(rules: Rules, wanted: Trace, real: Trace | None, unread: str, placement: str) -> None:
    if options.as_json():
        output.document(
            {
                "node": rules.node,
                "backend": rules.backend,
                rules.source: trace_show.document(wanted),
                "placement": placement or None,
                **_kernel(wanted, real, unread, rules.source),
            }
        )
        return
    packet = wanted.packet
    words = "" if rules.backend == engine.NFTABLES else ", told in nft's words"
    aim = f"[{packet.destination}]" if ":" in packet.destination else packet.destination
    output.line(
        f"{packet.source} → {aim}:{packet.port}/{packet.protocol.value} "
        f"at {rules.node}, from {packet.entry.value}, by {rules.backend}{words}"
    )
    for line in trace_show.lines(wanted):
        output.line(line, _STYLES.get(line.partition(",")[0]))
    if placement:
        output.line(placement)
    if real is None:
        output.line(f"({unread})")
    elif real == wanted:
        output.done("the kernel's maps say the same")
    else:
        _print_difference(wanted, real)


_STYLES = {"refused": "yellow", "dropped": "red"}


def _kernel(wanted: Trace, real: Trace | None, unread: str, source: str) -> dict[str, Any]:
    if source == "kernel":
        return {}
    if real is None:
        return {"kernel": None, "agrees": None, "unread": unread}
    return {"kernel": trace_show.document(real), "agrees": real == wanted, "unread": None}


def _print_difference(wanted: Trace, real: Trace) -> None:
    output.line(
        "! the kernel differs: - should be, + is (`mesh rules diff` has the elements)", "red"
    )
    should, is_now = trace_show.lines(wanted), trace_show.lines(real)
    everything = len(should) + len(is_now)
    for line in [*difflib.unified_diff(should, is_now, lineterm="", n=everything)][3:]:
        output.line(line, {"-": "green", "+": "red"}.get(line[0]))

"""What a host's own firewall has to let through for the mesh to work, and how to tell it so.  Pure.

A need is looked for in a chain (mesh.rules.passage); where the chain drops it, the operator is
given the line that lets it pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model.address import FAMILIES, Family
from mesh.model.report import Problem
from mesh.rules import passage
from mesh.rules.passage import ELSEWHERE, Packet

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.rules.passage import Chains
    from mesh.rules.program import Parameters

FORWARD: Final = "forward"
INPUT: Final = "input"

COMMENT: Final = "warren-mesh"
"""What our lines among others' rules are recognised by."""

_NATIVE: Final = {"ip": (Family.V4,), "ip6": (Family.V6,), "inet": FAMILIES}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What follows from a node: its interfaces and ports, the bit of the conntrack mark that flows
    of the mesh have, in which families peers reach its WireGuard, and whether replicas use the
    node's own addresses.
    """

    overlay: str
    steering: str
    bridge: str
    wireguard_port: int
    steering_port: int
    ours: int
    endpoints: frozenset[Family]
    local_replicas: bool = False

    @staticmethod
    def of(parameters: Parameters, wireguard_port: int, endpoints: frozenset[Family]) -> Wanted:
        """What follows from a node's parameters, without replicas of its own addresses."""
        devices = parameters.devices
        return Wanted(
            overlay=devices.overlay,
            steering=devices.steering,
            bridge=devices.bridge,
            wireguard_port=wireguard_port,
            steering_port=parameters.steering_port,
            ours=parameters.layout.ours,
            endpoints=endpoints,
        )


class Need(NamedTuple):
    """Packets that must pass a hook, and the matches that let exactly them pass; `xtables` as
    iptables-save prints them.

    `ufw` and `firewalld` are commands; empty: they have none for it.
    """

    hook: str
    what: str
    packets: tuple[Packet, ...]
    nft: str
    xtables: str
    ufw: str = ""
    firewalld: str = ""


class Place(NamedTuple):
    """A base chain of somebody else.

    `program` edits it: nft, or one of iptables' for one family and flavour.
    """

    program: str
    family: str
    table: str
    chain: str

    @property
    def families(self) -> tuple[Family, ...]:
        """Whose packets go through it."""
        return _NATIVE[self.family]

    def __str__(self) -> str:
        """How people name it."""
        if self.program == "nft":
            return f"nft table {self.family} {self.table} chain {self.chain}"
        return f"{self.program} chain {self.chain}"


class Blocked(NamedTuple):
    """A need that a chain drops.  `chains` are all of its table."""

    place: Place
    need: Need
    chains: Chains


def of(wanted: Wanted) -> tuple[Need, ...]:
    """Everything a node needs of its host's firewalls."""
    return (_forwarded(wanted), *_received(wanted))


def _forwarded(wanted: Wanted) -> Need:
    overlay, steering, bridge = wanted.overlay, wanted.steering, wanted.bridge
    ways = (
        (ELSEWHERE, bridge, True),
        (ELSEWHERE, steering, True),
        (ELSEWHERE, overlay, True),
        (bridge, overlay, True),
        (bridge, bridge, True),
        (overlay, bridge, False),
        (steering, bridge, False),
    )
    packets = tuple(
        _packet(wanted, family, iif, oif=oif, translated=translated)
        for family in FAMILIES
        for iif, oif, translated in ways
    )
    return Need(
        FORWARD,
        "what the mesh forwards",
        packets,
        _marked(wanted),
        f"-m connmark --mark {wanted.ours:#x}/{wanted.ours:#x}",
        firewalld=_trust(wanted),
    )


def _received(wanted: Wanted) -> Iterable[Need]:
    yield _of_wireguard(wanted)
    yield _of_the_tunnel(wanted)
    yield _of_containers(wanted)
    if wanted.local_replicas:
        yield _of_local_replicas(wanted)


def _of_wireguard(wanted: Wanted) -> Need:
    port = wanted.wireguard_port
    packets = tuple(
        _packet(wanted, family, ELSEWHERE, protocol="udp", port=port, local=True, mark=0)
        for family in FAMILIES
        if family in wanted.endpoints
    )
    return Need(
        INPUT,
        f"WireGuard (UDP port {port})",
        packets,
        f"udp dport {port}",
        f"-p udp -m udp --dport {port}",
        f"ufw allow {port}/udp",
        f"firewall-cmd --permanent --add-port={port}/udp && firewall-cmd --reload",
    )


def _of_the_tunnel(wanted: Wanted) -> Need:
    port, overlay = wanted.steering_port, wanted.overlay
    packet = _packet(wanted, Family.V4, overlay, protocol="udp", port=port, local=True, mark=0)
    return Need(
        INPUT,
        f"steered packets (UDP port {port} on {overlay})",
        (replace(packet, state="untracked"),),
        f'iifname "{overlay}" udp dport {port}',
        f"-i {overlay} -p udp -m udp --dport {port}",
        f"ufw allow in on {overlay} to any port {port} proto udp",
        _trust(wanted),
    )


def _of_containers(wanted: Wanted) -> Need:
    bridge = wanted.bridge
    packet = _packet(wanted, Family.V6, bridge, protocol="icmpv6", local=True, mark=0)
    return Need(
        INPUT,
        f"ICMPv6 on {bridge}, by which containers find their gateway",
        (replace(packet, state="untracked"),),
        f'iifname "{bridge}" meta l4proto ipv6-icmp',
        f"-i {bridge} -p ipv6-icmp",
        firewalld=_trust(wanted),
    )


def _of_local_replicas(wanted: Wanted) -> Need:
    packets = tuple(
        _packet(wanted, family, iif, local=True, translated=iif == ELSEWHERE)
        for family in FAMILIES
        for iif in (ELSEWHERE, wanted.steering, wanted.overlay)
    )
    return Need(
        INPUT,
        "flows to replicas that use this node's addresses",
        packets,
        _marked(wanted),
        f"-m connmark --mark {wanted.ours:#x}/{wanted.ours:#x}",
        firewalld=_trust(wanted),
    )


def _marked(wanted: Wanted) -> str:
    return f"ct mark and {wanted.ours:#x} == {wanted.ours:#x}"


def _trust(wanted: Wanted) -> str:
    devices = (wanted.overlay, wanted.steering, wanted.bridge)
    added = " ".join(f"--add-interface={device}" for device in devices)
    return f"firewall-cmd --permanent --zone=trusted {added} && firewall-cmd --reload"


def _packet(
    wanted: Wanted,
    family: Family,
    iif: str,
    *,
    oif: str = ELSEWHERE,
    protocol: str | None = None,
    port: int | None = None,
    translated: bool = False,
    local: bool = False,
    mark: int | None = None,
) -> Packet:
    return Packet(
        family=family,
        iif=iif,
        oif=oif,
        protocol=protocol,
        port=port,
        translated=translated,
        local=local,
        mark=wanted.ours if mark is None else mark,
        mask=wanted.ours,
        ours=frozenset((wanted.overlay, wanted.steering, wanted.bridge)),
    )


def blocked(place: Place, chains: Chains, hook: str, needs: Iterable[Need]) -> Iterable[Blocked]:
    """The needs that a chain at `hook` drops for certain, wholly or in part."""
    for need in needs:
        if need.hook == hook and any(
            passage.drops(chains, place.chain, packet)
            for packet in need.packets
            if packet.family in place.families
        ):
            yield Blocked(place, need, chains)


def line(blocked: Blocked) -> str:
    """The rule that lets a need pass at the top of the chain, as the chain's program takes it."""
    place, need = blocked.place, blocked.need
    if place.program == "nft":
        where = f"{place.family} {place.table} {place.chain}"
        return f"nft insert rule {where} {need.nft} accept"
    return f"{place.program} -I {place.chain} {need.xtables} -j ACCEPT"


def problems(found: Iterable[Blocked]) -> tuple[Problem, ...]:
    """What to tell the operator: one problem for each command that solves some."""
    by_remedy: dict[str, list[Blocked]] = {}
    for each in found:
        by_remedy.setdefault(remedy(each), []).append(each)
    return tuple(
        Problem(
            about=f"firewall {_listed(str(each.place) for each in those)}",
            message=f"drops {_listed(each.need.what for each in those)}: {command}",
        )
        for command, those in by_remedy.items()
    )


def remedy(blocked: Blocked) -> str:
    """What the operator can do to let a need pass."""
    place, need = blocked.place, blocked.need
    if need.firewalld and _is_firewalld(blocked):
        return f"run `{need.firewalld}`"
    if need.ufw and {"ufw-before-input", "ufw6-before-input"} & blocked.chains.keys():
        return f"run `{need.ufw}`"
    kept = "and keep it where that firewall is loaded from"
    if place.program == "nft":
        kept += ', or set firewall = "open" in this node\'s agent.toml'
    return f"run `{line(blocked)}` {kept}"


def _is_firewalld(blocked: Blocked) -> bool:
    return blocked.place.table == "firewalld" or "INPUT_ZONES" in blocked.chains


def _listed(items: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(items))

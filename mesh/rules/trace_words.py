"""What the program's sets and chains mean to people.  Words only; decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mesh.rules import connlimits, elements, xtables_limits, xtables_pools

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mesh.rules.marks import Layout, Mark
    from mesh.rules.trace_program import Rule
    from mesh.rules.trace_rule import Flow, Look, Outcome

_SETS: Final = {
    "vips": "VIP",
    "hostips": "host IP",
    "meshports": "ingress port",
    "ports": "port of this node",
    "known": "live VIP",
    "nodes": "address of a node",
    "own": "address of this node's own ranges",
    "limited": "service with an allow list",
    "connlimits": "limit of connections",
    "counts": "connections that the client has",
    "allow": "allowed source",
    "sizes": "slots of the pool",
    "targets": "backend in slot",
    "via": "peer's steering device",
    "zones": "peer's steering device",
    "guarded": "replica that a policy selects",
    "doors": "port that a policy names",
    "grants": "source that it lets in",
    "hairpin": "replica that reached itself",
}

TOLD: Final = frozenset(
    (
        "vips",
        "hostips",
        "meshports",
        "ports",
        "known",
        "limited",
        "allow",
        "targets",
        "via",
        "doors",
        "grants",
    )
)
"""Sets in which not being found is worth a word."""

_REASONS: Final = {
    "dispatch": "no backend can be given the connection",
    "allowed": "the source is not on the service's allow list",
    "guarded": "a policy selects the replica, and none opens this port",
    "granted": "a policy selects the replica, and none lets this source connect to the port",
    "stray": "the VIP is alive, but has no such port",
    connlimits.SURPLUS: "the client has as many connections here as the service lets it have",
    "tunnel_in": "the steering port is for nodes only",
    "raw_bridge": "a container may use addresses of its node's subnet only",
    "raw_overlay": "loopback addresses are this node's own",
    "raw_steer": "neither loopback addresses nor tunnels are reached by steering",
    "from_steer": "only clients outside the mesh are steered, and only to this node's containers",
    "misfit": "conntrack does not know the flow",
    "ended": "the connection was ended when its replica had drained",
}

_CHAINS: Final = {
    "stay": "not to be steered",
    "steer": "steered: to the replica's node with its source kept",
    "from_bridge": "of the mesh, not balanced",
    "from_overlay": "of the mesh, not balanced",
    "from_steer": "came through another node",
    "forward": "cleared before it leaves",
    "output": "cleared before it leaves",
}
"""What it means that a rule of a chain set something."""


_IPTABLES: Final = {
    "raw_pre": "MESH-RAW",
    "raw_out": "MESH-RAW-OUT",
    "raw_bridge": "MESH-RAW-BRIDGE",
    "raw_overlay": "MESH-RAW-OVERLAY",
    "raw_steer": "MESH-RAW-STEER",
    "tunnel": "MESH-RAW-TUNNEL",
    "tunnel_in": "MESH-RAW-PORT",
    "nat_pre": "MESH-FIRST",
    "nat_out": "MESH-FIRST-OUT",
    "services": "MESH-SERVICES",
    "here": "MESH-HERE",
    "elsewhere": "MESH-ELSEWHERE",
    "from_bridge": "MESH-FROM-BRIDGE",
    "from_overlay": "MESH-FIRST",
    "from_steer": "MESH-FROM-STEER",
    "dispatch": "MESH-FRONTEND",
    "refuse": "MESH-REFUSE",
    "connlimit": "MESH-LIMITS",
    connlimits.SURPLUS: "MESH-FULL",
    "decide": "MESH-DECIDE",
    "stay": "MESH-STAY",
    "steer": "MESH-OURS",
    "settled": "MESH-ENDED",
    "ended": "MESH-ENDED",
    "ended_here": "MESH-ENDED",
    "steer_back": "MESH-BACK",
    "steer_out": "MESH-MANGLE-OUT",
    "misfit": "MESH-MISFIT",
    "misfit_here": "MESH-MISFIT-HERE",
    "guard": "MESH-GUARD",
    "guarded": "MESH-GUARD",
    "granted": "MESH-CLOSED",
    "let_in": "MESH-GUARD",
    "clamp": "MESH-MANGLE-FWD",
    "forward": "MESH-LAST",
    "output": "MESH-OUTPUT",
    "stray": "MESH-STRAY",
    "nat_post": "MESH-NAT-POST",
    "to_bridge": "MESH-NAT-POST",
    "to_overlay": "MESH-NAT-POST",
}
"""The chain of iptables that does what a chain of the program does; pools have their own."""


def chain(name: str, flow: Flow) -> str:
    """What the node calls a chain of the program that a flow is in."""
    if not flow.by_iptables:
        return name
    if connlimits.loaded((name,)):
        return xtables_limits.chain(flow.ct_mark, flow.layout)
    return _IPTABLES.get(stem(name)) or xtables_pools.chain(flow.ct_mark, flow.layout)


def stem(name: str) -> str:
    """A set's name without its family."""
    return name.rstrip("46")


def questions(looks: Iterable[Look], flow: Flow) -> str:
    """What look-ups ask."""
    return "; ".join(
        f"{_SETS.get(stem(look.name), look.name)} {_key(look, flow.layout)}" for look in looks
    )


def _key(look: Look, layout: Layout) -> str:
    """Marks in the words of what they stand for."""
    if look.name in elements.POLICIES - elements.GUARDED:
        return _of_policy(look.key)
    if look.name == "connlimits":
        return f"{look.key.rpartition(' . ')[2]} per client"
    if stem(look.name) not in ("limited", "sizes"):
        return look.key
    mark = layout.parse(int(look.key, 0))
    if look.name == "limited":
        return f"frontend {mark.id}"
    return f"{mark.slots}{' by client address' if mark.hashed else ''}"


def _of_policy(key: str) -> str:
    """A prefix, or a block of ports, whose length stands below a number: "0:218 . 10.0.2.0"."""
    head, _, rest = key.partition(" . ")
    length = int(head.rpartition(":")[2], 16) & (1 << elements.ID_SHIFT) - 1
    if " . " not in rest:
        return f"{rest}/{length}"
    protocol, _, port = rest.partition(" . ")
    last = int(port) + (1 << 16 - length) - 1
    return f"{port}/{protocol}" if last == int(port) else f"{port}-{last}/{protocol}"


def brief(rule: Rule, outcome: Outcome) -> str:
    """What a rule asks that looks nothing up: its text without what it then does."""
    if not outcome.matched:
        return rule.text
    text = rule.text
    for ending in (f" {outcome.verdict} {outcome.aim}", f" {outcome.verdict}"):
        text = text.removesuffix(ending)
    return "anything else" if text == outcome.verdict else text


def answer(name: str, outcome: Outcome, flow: Flow, owners: Mapping[int, str]) -> str:
    """What came of a rule of a chain; `owners` names the service of a frontend id."""
    parts = [_found(look, owners, flow.layout) for look in outcome.looks]
    if outcome.set:
        parts.append(outcome.set)
    if outcome.verdict:
        aim = chain(outcome.aim, flow) if outcome.aim else ""
        parts.append(f"{outcome.verdict} {aim}".rstrip())
    if outcome.matched:
        parts.append(_CHAINS.get(name, "") if outcome.set else "")
    return ", ".join(part for part in parts if part) or "yes"


def _found(look: Look, owners: Mapping[int, str], layout: Layout) -> str:
    if look.found is None:
        return "no"
    if look.name in elements.FRONTENDS and isinstance(look.found, int):
        return _frontend(layout.parse(look.found), owners)
    return ""


def _frontend(mark: Mark, owners: Mapping[int, str]) -> str:
    count = f"{mark.slots} slot{'' if mark.slots == 1 else 's'}" if mark.slots else "no backend"
    owner = owners.get(mark.id)
    parts = [f"service {owner}" if owner else f"frontend {mark.id}", count]
    if mark.hashed:
        parts.append("by client address")
    if mark.stays:
        parts.append("masqueraded")
    return ", ".join(parts)


def reason(comment: str, chains: Sequence[str]) -> str:
    """Why the last of these chains, each led to by the one before, dropped or refused."""
    if comment:
        return comment
    where = chains[-2] if chains[-1] == "refuse" and len(chains) > 1 else chains[-1]
    return _REASONS.get(stem(where), f"chain {where}")

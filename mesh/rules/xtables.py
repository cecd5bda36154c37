"""The static chains of one node for iptables, and the text that puts chains into a table.

Owns what iptables-restore reads and iptables-save prints.  Services never appear here; they are
pools (mesh.rules.xtables_pools) and sets (mesh.rules.ipsets).  Pure.
"""

from __future__ import annotations

import hashlib
import re
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model import address
from mesh.model.address import FAMILIES, Family
from mesh.rules import marks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mesh.delta import Delta
    from mesh.rules.marks import Layout
    from mesh.rules.program import Parameters

Rules = tuple[str, ...]
"""The rules of one chain, as iptables-restore takes them after "-A CHAIN "."""

Chains = dict[str, Rules]

TABLES: Final = ("raw", "nat", "filter", "mangle")
"""In the order they are written: mangle, which gives flows their marks, comes last."""

CANARY: Final = "MESH-CANARY"
"""One in each table.  Nothing jumps to it; its comment tells which program is loaded."""

ROOTS: Final = {
    "raw": ("MESH-ZONES", "MESH-PEERS"), "nat": ("MESH-POOLS",), "filter": ("MESH-GUARD",),
    "mangle": ("MESH-LIMITS",),
}  # fmt: skip
"""Chains that the static ones jump to, and whose rules come from elements."""

OWN: Final = re.compile(r"MESH-(?:[PHGCL]-[0-9a-f-]+|[TU]-[0-9]+-[0-9a-f]+)")
"""Names of chains that come and go with elements."""

POOL: Final = re.compile(r"MESH-[PHL]-[0-9a-f-]+")
"""Names of those that belong to one pool; the others lead to many."""

DRAWS: Final = marks.MAX_SLOTS
DRAW_SEED: Final = 0x6D657368

_TARGET: Final = re.compile(r"-[jg] (MESH-\S+)")


class Table(NamedTuple):
    """What belongs into one table: chains, and which of them each hook jumps to first."""

    chains: Chains
    hooks: dict[str, str]


class Saved(NamedTuple):
    """One table as iptables-save prints it; without the built-in chains' policies."""

    chains: Chains


def program(parameters: Parameters, family: Family) -> dict[str, Table]:
    """The static chains of a node, by table."""
    source = resources.files(__package__).joinpath("xtables.rules").read_text()
    tables: dict[str, Table] = {}
    table, chain = Table({}, {}), ""
    for line in _lines(source, parameters, family):
        if line[0] == "*":
            table = tables[line[1:]] = Table({}, {})
        elif line[0] == ">":
            hook, target = line[1:].split()
            table.hooks[hook] = target
        elif line[0] == ":":
            chain = line[1:]
            table.chains[chain] = ()
        else:
            table.chains[chain] += (line,)
    return tables


def version(tables: Mapping[str, Table]) -> str:
    """Eight hex digits that change with any static rule."""
    return _digest(f"{tables}")


def witness(static: Table, saved: Saved) -> str:
    """Eight hex digits that change when somebody changes a static chain; from what was saved."""
    return _digest(f"{[(name, saved.chains.get(name)) for name in sorted(static.chains)]}")


def comment(rules: Rules) -> str:
    """The comment of a chain's only rule, or nothing."""
    found = re.search(r'--comment "?([^" ]+)', rules[0]) if len(rules) == 1 else None
    return found[1] if found else ""


def restore(table: str, change: Delta[str, Rules], first: Iterable[str] = ()) -> str:
    """The part of iptables-restore's input that changes these chains of a table, and no other.

    Nothing if there is nothing to do.  `first` are commands that go before.
    """
    new = "".join(f":{name} - [0:0]\n" for name in change.add)
    rules = "".join(f"-A {name} {rule}\n" for name, each in change.add.items() for rule in each)
    gone = change.remove.keys() - change.add.keys()
    flushed = "".join(f"-F {name}\n" for name in sorted(gone))
    deleted = "".join(f"-X {name}\n" for name in sorted(gone))
    commands = "".join(f"{line}\n" for line in first)
    body = new + commands + rules + flushed + deleted
    return f"*{table}\n{body}COMMIT\n" if body else ""


def parse(text: str) -> dict[str, Saved]:
    """What iptables-save printed, by table."""
    found: dict[str, Saved] = {}
    chains: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("-A "):
            name, _, rule = line[3:].partition(" ")
            chains[name].append(rule)
        elif line.startswith(":"):
            chains[line[1:].partition(" ")[0]] = []
        elif line.startswith("*"):
            table, chains = line[1:], {}
        elif line == "COMMIT":
            found[table] = Saved({name: tuple(rules) for name, rules in chains.items()})
    return found


def ours(table: str, static: Table, saved: Saved) -> set[str]:
    """The chains of a saved table that belong to the mesh."""
    names = {*static.chains, *ROOTS.get(table, ()), CANARY}
    return {name for name in saved.chains if name in names or OWN.fullmatch(name)}


def hooked(static: Table, saved: Saved) -> set[str]:
    """The hooks that jump to our chain."""
    hooks = static.hooks.items()
    return {hook for hook, chain in hooks if f"-j {chain}" in saved.chains.get(hook, ())}


def hook_commands(static: Table, saved: Saved) -> list[str]:
    """Commands that make each hook jump to our chain first; none where it does already."""
    commands: list[str] = []
    for hook, chain in static.hooks.items():
        jump = f"-j {chain}"
        rules = saved.chains.get(hook, ())
        if rules.count(jump) == 1 and _is_early(rules, jump):
            continue
        commands += [f"-D {hook} {jump}"] * rules.count(jump)
        commands.append(f"-I {hook} 1 {jump}")
    return commands


def _is_early(rules: Rules, jump: str) -> bool:
    """Whether nothing but a firewall's line for us (mesh.dataplane.firewall) comes before."""
    return all("warren-mesh" in rule for rule in rules[: rules.index(jump)])


def unhook_commands(static: Table, saved: Saved) -> list[str]:
    """Commands that take our jumps out of the hooks."""
    return [
        f"-D {hook} -j {chain}"
        for hook, chain in static.hooks.items()
        for rule in saved.chains.get(hook, ())
        if rule == f"-j {chain}"
    ]


def shape(rules: Rules) -> tuple[str, ...]:
    """How many rules there are and which of our chains each goes to: what saving cannot reword."""
    return tuple(found[1] if (found := _TARGET.search(rule)) else "" for rule in rules)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _lines(source: str, parameters: Parameters, family: Family) -> Iterator[str]:
    words = _words(parameters, family) | _marks(parameters.layout)
    index, layout = FAMILIES.index(family), parameters.layout
    several: dict[str, list[dict[str, str]]] = {
        "prefix": [{"prefix": each} for each in parameters.prefixes[index]],
        "vip": [{"vip": each} for each in parameters.vips[index]],
        "closed": [{"closed": each} for each in parameters.closed[index]],
        "segment": [{"segment": each} for each in parameters.segments[index]],
        "host": [{"host": f"0x{b:x}", "place": f"0x{p:x}"} for b, p in layout.waiting().items()],
    }
    for line in source.splitlines():
        if not line or line[0] == "#":
            continue
        if line[0] in "46?":
            if line[0] not in (family.suffix, "?" if layout.foreign else ""):
                continue
            line = line[2:]  # noqa: PLW2901 - the rest of it is the line
        none: list[dict[str, str]] = [{}]
        for more in next((several[word] for word in several if f"${word}" in line), none):
            yield Template(line).substitute(words, **more)


def _words(parameters: Parameters, family: Family) -> dict[str, str]:
    devices, network = parameters.devices, parameters.network
    return {
        "OVERLAY": devices.overlay,
        "STEER": devices.steering,
        "BRIDGE": devices.bridge,
        "TUNNEL": str(parameters.steering_port),
        "FREE": parameters.free_ports,
        "SELF": _self_bytecode(family),
        "f": family.suffix,
        "loopback": address.LOOPBACK[family],
        "overlay": f"{network.overlay_address(family)}/{family.bits}",
        "subnet": network.subnet(family),
    }


def _marks(layout: Layout) -> dict[str, str]:
    """What the words for bits of the marks mean.  1 to 1023 are drawn by client address, the same
    on every node with iptables; nftables hashes otherwise.
    """
    empty, one = layout.id | layout.stay, 1 << layout.shift
    bits = {
        "FIELD": layout.packet_mark,
        "MARK": layout.ct_mark,
        "SLOTS": layout.slots,
        "REST": 0xFFFFFFFF & ~layout.slots,
        "SIZE": layout.size,
        "HASH": layout.hash,
        "OURS": layout.ours,
        "VIA": layout.via,
        "STAY": layout.stay,
        "ARRIVAL": layout.ours | layout.via,
        "DECIDED": layout.via | layout.stay,
        "ENDED": layout.ended,
        "OPEN": layout.ours | layout.via | layout.stay,
        "PLAIN": layout.plain,
        "EMPTY": empty,
        "DENIED": empty | one,
        "NONE": layout.ct_mark & ~one,
    }
    ours = f"/0x{layout.ct_mark:x}" if layout.foreign else ""
    return {word: f"0x{mask:x}" for word, mask in bits.items()} | {
        "DRAW": f"--hmark-tuple src {draw(layout)}",
        "IS_PLAIN": f"0x{layout.plain:x}{ours}",
        "IS_EMPTY": f"0x{empty:x}{ours}",
    }


def draw(layout: Layout) -> str:
    """How HMARK draws: one of DRAWS, in the place of n."""
    numbers = f"--hmark-mod {DRAWS << layout.shift} --hmark-offset {1 << layout.shift}"
    return f"{numbers} --hmark-rnd 0x{DRAW_SEED:x}"


def _self_bytecode(family: Family) -> str:
    """Whether a packet's source is its destination, for xt_bpf: no other match can compare them.

    Word by word: load, keep, load, jump to "no" if they differ (linux/filter.h).
    """
    source, length = (12, 4) if family is Family.V4 else (8, 16)
    code: list[str] = []
    for offset in range(source, source + length, 4):
        to_no = length + 1 - len(code) - 4
        code += [f"32 0 0 {offset}", "7 0 0 0", f"32 0 0 {offset + length}", f"29 0 {to_no} 0"]
    code += ["6 0 0 65535", "6 0 0 0"]
    return ",".join([str(len(code)), *code])

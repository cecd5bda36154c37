"""Guards as chains of the filter table, and back: which replica has which, doors, and grants.

First packets alone come here, after the translation.  A door leads to the chain of its grant, which
looks the source up in an ipset; MESH-CLOSED refuses what no door let in.  Pure.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from mesh.model import address
from mesh.model.publish import PROTOCOLS, Protocol
from mesh.rules import elements, ipsets

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mesh.model.address import Family
    from mesh.rules.elements import Elements
    from mesh.rules.xtables import Chains, Rules

ROOT: Final = "MESH-GUARD"
"""The chain that finds the guard of a replica."""

_GUARD: Final = re.compile(r"MESH-G-([0-9a-f]+)")
_REPLICA: Final = re.compile(r"-d ([0-9a-f.:]+)/[0-9]+ -g MESH-G-([0-9a-f]+)")
_DOOR: Final = re.compile(
    r"-p (\w+)(?: -m \w+)?(?: --dport (\d+)(?::(\d+))?)? -g MESH-C-([0-9a-f]+)"
)
_WHOLE: Final = 16


def chains(family: Family, guarded: Mapping[bytes, bytes], doors: Mapping[bytes, bytes]) -> Chains:
    """The chains that the elements of `guarded…` and `doors` come to."""
    behind: defaultdict[int, list[str]] = defaultdict(list)
    for replica, data in sorted(guarded.items()):
        behind[_number(data)].append(f"-d {address.unpacked(replica)}/{family.bits}")
    found: Chains = {
        ROOT: tuple(f"{host} -g MESH-G-{n:x}" for n, hosts in behind.items() for host in hosts)
    }
    rules: defaultdict[int, list[str]] = defaultdict(list, {number: [] for number in behind})
    for key, data in sorted(doors.items()):
        grant = _number(data)
        rules[_number(key)].append(f"{_ports(key)} -g MESH-C-{grant:x}")
        found[f"MESH-C-{grant:x}"] = (
            f"-m set --match-set {ipsets.grant_name(family, grant)} src -j RETURN",
            "-g MESH-CLOSED",
        )
    for number, each in rules.items():
        found[f"MESH-G-{number:x}"] = (*each, "-g MESH-CLOSED")
    return found


def _number(data: bytes) -> int:
    """The number of a guard or grant at the beginning of a key, or in data."""
    return elements.mark_of(data[:4]) >> elements.ID_SHIFT


def _ports(key: bytes) -> str:
    """What matches the ports of a door; iptables-save leaves out what all ports match."""
    bits = elements.mark_of(key[:4]) & (1 << elements.ID_SHIFT) - 1
    protocol, first = PROTOCOLS[key[4]].value, int.from_bytes(key[8:10], "big")
    last = first + (1 << _WHOLE - bits) - 1
    if not bits:
        return f"-p {protocol}"
    span = f"{first}:{last}" if last > first else f"{first}"
    return f"-p {protocol} -m {protocol} --dport {span}"


def parse(family: Family, saved: Chains) -> Elements:
    """The elements in saved chains; what cannot be understood is left out."""
    found: Elements = {}
    for rule in saved.get(ROOT, ()):
        if match := _REPLICA.fullmatch(rule):
            key = f"guarded{family.suffix}", address.packed(match[1])
            found[key] = elements.mark_bytes(int(match[2], 16) << elements.ID_SHIFT)
    for name, rules in saved.items():
        if chain := _GUARD.fullmatch(name):
            found.update(_doors(int(chain[1], 16), rules))
    return found


def _doors(number: int, rules: Rules) -> Iterator[tuple[tuple[str, bytes], bytes]]:
    for match in filter(None, map(_DOOR.fullmatch, rules)):
        first = int(match[2] or 0)
        last = int(match[3] or first) if match[2] else (1 << _WHOLE) - 1
        bits = _WHOLE - (last - first + 1).bit_length() + 1
        data = elements.mark_bytes(int(match[4], 16) << elements.ID_SHIFT)
        yield elements.door_key(number, Protocol(match[1]), first, bits), data

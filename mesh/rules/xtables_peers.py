"""Peers on the steering device as rules of the raw table, and back: by their MAC address.

Pure.  A rule's comment says which element it is: "024d45530002:30200000".
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Final

from mesh.rules import elements

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.rules.elements import Elements
    from mesh.rules.marks import Layout
    from mesh.rules.xtables import Chains, Rules

CHAINS: Final = {"zones": "MESH-ZONES", "via": "MESH-PEERS"}
"""The chain that a map of peers is in."""

_COMMENT: Final = re.compile(r'--comment "?([0-9a-f]{12}):([0-9a-f]+)')


def chains(zones: Mapping[bytes, bytes], via: Mapping[bytes, bytes], layout: Layout) -> Chains:
    """The rules of all peers."""
    field = layout.packet_mark
    return {
        CHAINS["zones"]: tuple(
            f"{_match(ether, _zone_of(data))} -j CT --zone-orig {_zone_of(data)}"
            for ether, data in sorted(zones.items())
        ),
        CHAINS["via"]: tuple(
            f"{_match(ether, elements.mark_of(data))} -j MARK --set-xmark "
            f"0x{elements.mark_of(data) & field:x}/0x{field:x}"
            for ether, data in sorted(via.items())
        ),
    }


def _zone_of(data: bytes) -> int:
    return int.from_bytes(data, sys.byteorder)


def _match(ether: bytes, value: int) -> str:
    return f"-m mac --mac-source {ether.hex(':')} -m comment --comment {ether.hex()}:{value:x}"


def parse(saved: Mapping[str, Rules]) -> Elements:
    """The elements in saved rules."""
    found: Elements = {}
    pack = {"zones": elements.zone_bytes, "via": elements.mark_bytes}
    for name, chain in CHAINS.items():
        for match in filter(None, map(_COMMENT.search, saved.get(chain, ()))):
            found[name, bytes.fromhex(match[1])] = pack[name](int(match[2], 16))
    return found

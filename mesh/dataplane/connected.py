"""The networks this host is in: their hosts reach each other without it.

Read from the main routing tables of the calling thread's network namespace, as text: to list a
handful of routes needs no netlink.  Looks only.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.model.address import Family

if TYPE_CHECKING:
    from collections.abc import Iterator

_FILES: Final = {
    Family.V4: Path("/proc/thread-self/net/route"),
    Family.V6: Path("/proc/thread-self/net/ipv6_route"),
}
_UP, _GATEWAY, _REJECT, _LOCAL = 0x1, 0x2, 0x200, 0x80000000
_LOOPBACK: Final = "lo"


def networks() -> tuple[str, ...]:
    """Every prefix with more than one address that a device of this host leads to directly."""
    return tuple(dict.fromkeys((*_four(_lines(Family.V4)), *_six(_lines(Family.V6)))))


def _lines(family: Family) -> list[list[str]]:
    try:
        return [line.split() for line in _FILES[family].read_text("ascii").splitlines()]
    except FileNotFoundError:  # a kernel without IPv6
        return []


def _four(lines: list[list[str]]) -> Iterator[str]:
    """fib_trie.c, fib_route_seq_show: numbers as they are in memory, after one line of titles."""
    for device, to, _, flags, _, _, _, mask, *_ in lines[1:]:
        if _is_direct(device, int(flags, 16)):
            network = bytes.fromhex(to)[::-1], bytes.fromhex(mask)[::-1]
            length = int.from_bytes(network[1], "big").bit_count()
            if 0 < length < Family.V4.bits:
                yield f"{ipaddress.IPv4Address(network[0])}/{length}"


def _six(lines: list[list[str]]) -> Iterator[str]:
    """net/ipv6/route.c, rt6_info_route."""
    for to, bits, _, _, gateway, _, _, _, flags, device in lines:
        length = int(bits, 16)
        prefix = ipaddress.IPv6Address(bytes.fromhex(to))
        if int(gateway, 16) or not _is_direct(device, int(flags, 16)):
            continue
        if 0 < length < Family.V6.bits and not (prefix.is_multicast or prefix.is_link_local):
            yield f"{prefix}/{length}"


def _is_direct(device: str, flags: int) -> bool:
    return flags & _UP != 0 and not flags & (_GATEWAY | _REJECT | _LOCAL) and device != _LOOPBACK

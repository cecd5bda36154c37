"""Ethernet frames made by hand: what a hostile neighbour may put on the link.  Pure."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from mesh.model.address import Family, family_of, packed

_UDP: Final = 17
_ETHERTYPES: Final = {Family.V4: 0x0800, Family.V6: 0x86DD}


@dataclass(frozen=True, slots=True)
class Datagram:
    """A UDP datagram from port 4242 in an IP packet."""

    source: str
    destination: str
    port: int
    payload: bytes

    def frame(self, source_mac: str, destination_mac: str) -> bytes:
        """It as it stands on an Ethernet link."""
        family = family_of(self.destination)
        macs = _mac(destination_mac) + _mac(source_mac)
        return macs + struct.pack("!H", _ETHERTYPES[family]) + self._packet(family)

    def _packet(self, family: Family) -> bytes:
        ends = packed(self.source) + packed(self.destination)
        length = 8 + len(self.payload)
        pseudo = ends + struct.pack("!IHBB", length, 0, 0, _UDP)
        plain = struct.pack("!HHHH", 4242, self.port, length, 0) + self.payload
        checked = plain[:6] + struct.pack("!H", _checksum(pseudo + plain) or 0xFFFF) + plain[8:]
        if family is Family.V6:
            return struct.pack("!IHBB", 6 << 28, length, _UDP, 64) + ends + checked
        start = struct.pack("!BBHHHBB", 0x45, 0, 20 + length, 1, 0, 64, _UDP)
        return start + struct.pack("!H", _checksum(start + b"\0\0" + ends)) + ends + checked


def vxlan(vni: int, frame: bytes) -> bytes:
    """The payload of the datagram that carries a frame in a VXLAN tunnel (RFC 7348)."""
    return struct.pack("!II", 0x08 << 24, vni << 8) + frame


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    padded = data + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total

"""SCTP by hand, for kernels without its sockets: how an association begins (RFC 9260).

An INIT that somebody listens to is answered by an INIT ACK, here with a text in its state cookie;
any other by an ABORT.  Pure.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

INIT: Final = 1
INIT_ACK: Final = 2
ABORT: Final = 6

_COOKIE: Final = 7
_HEADER: Final = struct.Struct("!HHI4x")
_TAG: Final = 0x6D657368


class Packet(NamedTuple):
    """Ports, the kind of the first chunk, and the cookie's text."""

    source: int
    destination: int
    kind: int
    tag: int
    text: str = ""

    @staticmethod
    def parse(data: bytes) -> Packet:
        """A packet without its IP header."""
        source, destination, _ = _HEADER.unpack_from(data)
        kind, tag, text = data[12], 0, ""
        if kind in (INIT, INIT_ACK):
            (tag,) = struct.unpack_from("!I", data, 16)
        if kind == INIT_ACK:
            (length,) = struct.unpack_from("!H", data, 34)
            text = data[36 : 32 + length].decode()
        return Packet(source, destination, kind, tag, text)

    def packed(self) -> bytes:
        """As it stands behind an IP header.  The tag in the header is the receiver's own."""
        chunk = struct.pack("!IIHHI", _TAG, 65535, 1, 1, 1) if self.kind != ABORT else b""
        if self.kind == INIT_ACK:
            cookie = self.text.encode()
            chunk += struct.pack("!HH", _COOKIE, 4 + len(cookie)) + cookie
        body = struct.pack("!BBH", self.kind, 0, 4 + len(chunk)) + chunk
        body += b"\0" * (-len(body) % 4)
        plain = _HEADER.pack(self.source, self.destination, self.tag) + body
        return plain[:8] + struct.pack("<I", _crc32c(plain)) + plain[12:]

    def answer(self, kind: int, text: str = "") -> Packet:
        """What goes back."""
        return Packet(self.destination, self.source, kind, self.tag, text)


def init(source: int, destination: int) -> Packet:
    """The first packet of an association."""
    return Packet(source, destination, INIT, 0)


def _table() -> tuple[int, ...]:
    found = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        found.append(value)
    return tuple(found)


_TABLE: Final = _table()


def _crc32c(data: bytes) -> int:
    """Castagnoli's checksum, which conntrack verifies and NAT renews."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF

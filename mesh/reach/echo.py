"""ICMP echo on the wire, IPv4 and IPv6.  Pure.

An echo is ours by the 8 random bytes that it carries; its sequence number is the node's, and when
it was sent is in it, too, so that nobody has to remember what is on its way.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from mesh.model.address import Family

SECRET_BYTES: Final = 8

REPLY: Final = {Family.V4: 0, Family.V6: 129}
_REQUEST: Final = {Family.V4: 8, Family.V6: 128}
_HEAD: Final = struct.Struct(">BBHHH8sQ")
"""Type, code, checksum, identifier, sequence number; the secret, and nanoseconds."""


class Echo(NamedTuple):
    """What came back: from which node, and when it had been sent, in nanoseconds."""

    number: int
    sent: int


def request(family: Family, secret: bytes, number: int, sent: int) -> bytes:
    """An echo request; the kernel sums up those of IPv6."""
    identifier = int.from_bytes(secret[:2], "big")
    kind = _REQUEST[family]
    bare = _HEAD.pack(kind, 0, 0, identifier, number, secret, sent)
    if family is Family.V6:
        return bare
    return _HEAD.pack(kind, 0, _checksum(bare), identifier, number, secret, sent)


def reply(family: Family, packet: bytes, secret: bytes) -> Echo | None:
    """What a packet of a raw socket says, if it answers one of ours; those of IPv4 have their IP
    header.
    """
    start = (packet[0] & 0xF) * 4 if family is Family.V4 and packet else 0
    if len(packet) < start + _HEAD.size:
        return None
    kind, _, _, _, number, told, sent = _HEAD.unpack_from(packet, start)
    if kind != REPLY[family] or told != secret:
        return None
    return Echo(number, sent)


def _checksum(words: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f">{len(words) // 2}H", words))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF

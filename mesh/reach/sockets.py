"""Sends echo requests over the overlay, and takes in what comes back.

The peers' kernels answer, not their agents: an agent that is restarted does not look like a dead
node.  The sockets are bound to the device, so that no probe ever leaves by another.  The kernel
notes when an answer arrived; it may wait until somebody looks.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model.address import FAMILIES, Family
from mesh.reach import echo

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

log = logging.getLogger(__name__)

_DOMAIN: Final = {
    Family.V4: (socket.AF_INET, socket.IPPROTO_ICMP),
    Family.V6: (socket.AF_INET6, socket.IPPROTO_ICMPV6),
}
_SO_TIMESTAMPNS: Final = 35
_SO_RCVBUFFORCE: Final = 33
_SOL_RAW, _ICMP_FILTER, _ICMP6_FILTER = 255, 1, 1
_TIMESPEC: Final = struct.Struct("@ll")
_ROOM: Final = 1 << 20
"""Bytes for answers: thousands of nodes in one look."""


class Answer(NamedTuple):
    """An echo that came back: the number of the node, by which family, and the seconds it took."""

    number: int
    family: Family
    trip: float


class Echoes:
    """Raw sockets on the device `device`, of the families in which this node has an address."""

    def __init__(self, device: str, sources: Mapping[Family, str]) -> None:
        self._device = device
        self._sources = sources
        self._secret = os.urandom(echo.SECRET_BYTES)
        self._open: dict[Family, socket.socket] = {}

    def open(self) -> str:
        """Open what is not open; why nothing can be probed, if that is so."""
        reason = ""
        for family in FAMILIES:
            if family in self._sources and family not in self._open:  # no IPv6 on some hosts
                try:
                    self._open[family] = self._socket(family)
                except OSError as error:
                    reason = error.strerror or str(error)
        return "" if self._open else reason

    def _socket(self, family: Family) -> socket.socket:
        domain, protocol = _DOMAIN[family]
        made = socket.socket(domain, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._device.encode())
            made.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM)
            level, option = (_SOL_RAW, _ICMP_FILTER)
            if family is Family.V6:
                level, option = (socket.IPPROTO_ICMPV6, _ICMP6_FILTER)
            made.setsockopt(level, option, _only(echo.REPLY[family], family))
            made.bind((self._sources[family], 0))
        except OSError:
            made.close()
            raise
        return made

    @property
    def families(self) -> tuple[Family, ...]:
        """Those in which something can be sent."""
        return tuple(self._open)

    def send(self, family: Family, address: str, number: int) -> bool:
        """Send a request to the node `number`; whether it left.

        What cannot be sent says nothing about the node.  A socket whose device is another one by
        now is closed; `open` makes a new one.
        """
        found = self._open.get(family)
        if found is None:
            return False
        packet = echo.request(family, self._secret, number, time.time_ns())
        try:
            found.sendto(packet, (address, 0))
        except BlockingIOError:
            return False
        except OSError as error:
            log.debug("not probed address=%s: %s", address, error)
            if not self._is_bound(found):
                self._open.pop(family).close()
            return False
        return True

    def _is_bound(self, found: socket.socket) -> bool:
        """Whether the device is still there that the socket was bound to."""
        try:
            length = len(self._device) + 1
            name = found.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, max(16, length))
        except OSError:
            return False
        return name.rstrip(b"\0") == self._device.encode()

    def receive(self) -> Iterator[Answer]:
        """Everything that came back since the last look."""
        for family, found in self._open.items():
            while (read := _read(found)) is not None:
                packet, arrived = read
                back = echo.reply(family, packet, self._secret)
                if back is not None:
                    yield Answer(back.number, family, max(arrived - back.sent, 0) / 1e9)

    def close(self) -> None:
        """Close the sockets."""
        while self._open:
            self._open.popitem()[1].close()


def _read(found: socket.socket) -> tuple[bytes, int] | None:
    """The next packet and when it arrived, in nanoseconds since the epoch."""
    try:
        packet, notes, _, _ = found.recvmsg(256, 64)
    except OSError:  # nothing there; or an error of what was sent, which nobody waits for
        return None
    for level, kind, data in notes:
        if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
            seconds, rest = _TIMESPEC.unpack_from(data)
            return packet, seconds * 1_000_000_000 + rest
    return packet, time.time_ns()


def _only(kind: int, family: Family) -> bytes:
    """A filter that keeps away every type but one."""
    words = [0xFFFFFFFF] * (1 if family is Family.V4 else 8)
    words[kind // 32] ^= 1 << (kind % 32)
    return struct.pack(f"={len(words)}I", *words)

"""Who listens on ports of this network namespace, asked of the kernel by sock_diag(7).

Only looks.  Cheap: the kernel sends listeners, not connections.  Sockets that agents hold ports
with (mesh.hostports.reservation) are nobody who listens.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model.listener import Listener
from mesh.model.publish import Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

NO_DEVICE: Final = 0x7FFFFFFF
"""The device that held sockets are bound to.  There is none of that number, so the kernel finds
nobody for what arrives, and refuses it at once; and it tells these sockets from all others."""

_BY_FAMILY: Final = 20  # SOCK_DIAG_BY_FAMILY
_REQUEST_DUMP: Final = 0x301
_ERROR, _DONE = 2, 3
_HEADER: Final = struct.Struct("=IHHII")
_MESSAGE: Final = struct.Struct("=BBBBHH16s16sI8sIIIII")
"""inet_diag_msg: family, state, timer, retrans; ports (big-endian, read apart), addresses,
device, cookie; expires, queues, uid, inode (linux/inet_diag.h)."""
_ATTRIBUTE: Final = struct.Struct("=HH")
_V6ONLY: Final = 11  # INET_DIAG_SKV6ONLY

_NOT_HELD: Final = struct.pack("=HHBBHIBBH", 16, 1, 9, 8, 12, NO_DEVICE, 1, 4, 8)
"""INET_DIAG_REQ_BYTECODE: reject (JMP beyond the end) what has that device (DEV_COND)."""

_STATES: Final = {Protocol.TCP: 1 << 10, Protocol.UDP: 1 << 7, Protocol.SCTP: 1 << 10}
"""TCP_LISTEN; for UDP TCP_CLOSE, which is a socket that is not connected (net/tcp_states.h)."""

_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_EVERYWHERE: Final = bytes(16)
_MAPPED: Final = bytes(10) + b"\xff\xff"
_BUFFER: Final = 1 << 18
_SECONDS: Final = 5.0


class Socket(NamedTuple):
    """A listening socket; `address` as in Listener, `inode` 0 for the kernel's own."""

    protocol: Protocol
    port: int
    address: str
    inode: int


class Owner(NamedTuple):
    """A process."""

    name: str
    pid: int


KERNEL: Final = Owner("the kernel", 0)
UNKNOWN: Final = Owner("", 0)


def listening() -> frozenset[Socket]:
    """Every listening socket.  Raises OSError where the kernel cannot be asked."""
    found = set[Socket]()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as netlink:  # NETLINK_SOCK_DIAG
        netlink.settimeout(_SECONDS)
        for protocol, states in _STATES.items():
            for family in _FAMILIES:
                request = struct.pack("=BBBBI", family, protocol.number, 0, 0, states) + bytes(48)
                body = request + _NOT_HELD
                size = _HEADER.size + len(body)
                netlink.send(_HEADER.pack(size, _BY_FAMILY, _REQUEST_DUMP, 0, 0) + body)
                found.update(_sockets(netlink, protocol))
    return frozenset(found)


def _sockets(netlink: socket.socket, protocol: Protocol) -> Iterator[Socket]:
    """The answer to one request; nothing where the kernel lacks the protocol or its module."""
    while True:
        data = netlink.recv(_BUFFER)
        at = 0
        while at < len(data):
            size, kind, *_ = _HEADER.unpack_from(data, at)
            if kind == _DONE:
                return
            if kind == _ERROR:
                number = -int.from_bytes(data[at + 16 : at + 20], sys.byteorder, signed=True)
                if number == errno.ENOENT:
                    return
                raise OSError(number, f"sock_diag: {os.strerror(number)}")
            yield _socket(data[at + _HEADER.size : at + size], protocol)
            at += size + 3 & ~3


def _socket(body: bytes, protocol: Protocol) -> Socket:
    family, _, _, _, _, _, source, *_, inode = _MESSAGE.unpack_from(body)
    port = int.from_bytes(body[4:6], "big")
    if family == socket.AF_INET:
        return Socket(protocol, port, socket.inet_ntop(family, source[:4]), inode)
    if source.startswith(_MAPPED):
        return Socket(protocol, port, socket.inet_ntop(socket.AF_INET, source[12:]), inode)
    if source == _EVERYWHERE and not _is_v6_only(body):
        return Socket(protocol, port, "", inode)
    return Socket(protocol, port, socket.inet_ntop(family, source), inode)


def _is_v6_only(body: bytes) -> bool:
    at = _MESSAGE.size
    while at + _ATTRIBUTE.size <= len(body):
        size, kind = _ATTRIBUTE.unpack_from(body, at)
        if kind == _V6ONLY:
            return bool(body[at + _ATTRIBUTE.size])
        at += max(size + 3 & ~3, _ATTRIBUTE.size)
    return False


def owners(inodes: Collection[int]) -> dict[int, Owner]:
    """Who has each of these sockets, as far as /proc tells; the lowest pid, if several have one.

    Slow where there are thousands of processes: a look at every descriptor of each.
    """
    wanted = {f"socket:[{inode}]": inode for inode in inodes if inode}
    found: dict[int, Owner] = {inode: KERNEL for inode in inodes if not inode}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        if len(found) == len(inodes):
            break
        for inode in _held_by(pid, wanted):
            found.setdefault(inode, Owner(_name(pid), pid))
    return {inode: found.get(inode, UNKNOWN) for inode in inodes}


def _held_by(pid: int, wanted: Mapping[str, int]) -> Iterator[int]:
    folder = f"/proc/{pid}/fd"
    try:
        for descriptor in os.listdir(folder):
            inode = wanted.get(os.readlink(f"{folder}/{descriptor}"))
            if inode is not None:
                yield inode
    except OSError:  # it ended just now, or is none of our business
        return


def _name(pid: int) -> str:
    try:
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "a process that ended"
    return name if name.isprintable() else ascii(name)


def listener(one: Socket, owner: Owner = UNKNOWN) -> Listener:
    """A socket with who has it."""
    return Listener(
        protocol=one.protocol,
        port=one.port,
        address=one.address,
        process=owner.name,
        pid=owner.pid,
    )

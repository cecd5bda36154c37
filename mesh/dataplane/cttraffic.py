"""How many flows of ours there are and were, and what they carried, from conntrack's own counts.

Reads what the kernel tells of flows that end, and of all that there are, and adds it up by where
they came in.  One event per connection and none per packet; an event costs a microsecond, for many
are taken in one call and read by offsets that are the same for all of their kind.  Never asks for
another node's flows (VIA), and never decides what a port is (mesh.rules.traffic).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mesh.dataplane.nfnetlink import (
    CONNTRACK_DESTROY_GROUP,
    HEADER_SIZE,
    Message,
    Socket,
    attribute,
    attributes,
    generic,
)
from mesh.rules.traffic import Counted, Elder, Entrance, Volume

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

    from mesh.rules.marks import Layout

    Buffer = bytes | bytearray | memoryview

_GET, _STATISTICS_OF_CPUS, _STATISTICS = 1 << 8 | 1, 1 << 8 | 4, 1 << 8 | 5
_ORIGINAL, _MARK, _SENT, _RECEIVED, _ID, _MARK_MASK = 1, 8, 9, 10, 12, 21
_ADDRESSES, _PORTS = 1, 2
_NUMBER, _DESTINATION_PORT = 1, 3
_DESTINATIONS: Final = (2, 4)  # CTA_IP_V4_DST, CTA_IP_V6_DST
_BYTES: Final = 2
_ENTRIES, _MOST = 1, 2
_OF_CPUS: Final = {9: "insert_failed", 10: "drop", 11: "early_drop"}
"""CTA_STATS_…: lost a race or no room in a chain, no room at all, made room for another."""

_ATTRIBUTE: Final = struct.Struct("=HH")
_START: Final = HEADER_SIZE + 4

_AT_ONCE: Final = 256
_STRIDE: Final = 512
"""Bytes for one event; IPv6 with TCP takes 276."""

_KINDS: Final = 4096
"""Entrances of flows that are remembered as they are on the wire."""


class Statistics(NamedTuple):
    """The table as a whole: entries, how many there may be, and what found no room."""

    entries: int
    most: int
    lost: dict[str, int]


class Traffic:
    """The flows of one network namespace, counted from when it was made."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._events = Socket(CONNTRACK_DESTROY_GROUP)
        self._events.filter(*_filter(layout))
        self._asked = Socket()
        self._receiver = _Receiver(self._events.fileno())
        self._ending = _Sums(layout)
        self._standing = _Sums(layout)

    def fileno(self) -> int:
        """What becomes readable when flows have ended."""
        return self._events.fileno()

    def lost(self) -> int:
        """Of how many flows that ended the kernel could not tell."""
        return self._events.lost()

    def ended(self, elders: Container[int]) -> Counted | None:
        """The next flows that ended, some hundreds at most; None if there are none."""
        count = self._receiver.receive()
        if not count:
            return None
        buffer = self._receiver.buffer
        spans = [(at, at + _length(buffer, at)) for at in range(0, count * _STRIDE, _STRIDE)]
        self._ending.add(buffer, spans, elders)
        return self._ending.taken()

    def there(self, elders: Container[int]) -> Counted:
        """Every flow of ours now.  Walks the whole table: for another thread.  Raises OSError.

        Between two datagrams, some hundred flows, other threads have their turn.
        """
        for buffer, spans in self._asked.dumped(Message(_GET, 0, self._ours())):
            self._standing.add(buffer, spans, elders)
        return self._standing.taken()

    def begun(self) -> list[tuple[int, int, int]]:
        """Number, bytes sent and bytes received of every flow of ours now.  Raises OSError."""
        return [(each.id, each.sent, each.received) for each in self.there(_Everything()).elders]

    def statistics(self) -> Statistics:
        """The table as a whole.  Raises OSError."""
        told = dict(attributes(self._asked.ask(Message(_STATISTICS, 0, generic(0))), 4))
        lost = dict.fromkeys(_OF_CPUS.values(), 0)
        for body in self._asked.dump(Message(_STATISTICS_OF_CPUS, 0, generic(0))):
            for kind, data in attributes(body, 4):
                if kind in _OF_CPUS:
                    lost[_OF_CPUS[kind]] += int.from_bytes(data, "big")
        entries, most = (int.from_bytes(told.get(k, b""), "big") for k in (_ENTRIES, _MOST))
        return Statistics(entries, most, lost)

    def close(self) -> None:
        """Close the sockets."""
        self._events.close()
        self._asked.close()

    def _ours(self) -> bytes:
        ours, mask = self._layout.ours, self._layout.ours | self._layout.via
        body = generic(socket.AF_UNSPEC) + attribute(_MARK, ours.to_bytes(4, "big"))
        return body + attribute(_MARK_MASK, mask.to_bytes(4, "big"))


class _Everything:
    def __contains__(self, _: object) -> bool:
        return True


def _filter(layout: Layout) -> Iterator[tuple[int, int, int, int]]:
    """Takes flows that a frontend of this node took, and no others (bpf, linux/filter.h)."""
    yield (0x00, 0, 0, _START)  # A = where attributes begin
    yield (0x01, 0, 0, _MARK)  # X = which to look for
    yield (0x20, 0, 0, 0xFFFFF000 + 12)  # A = where it is (SKF_AD_OFF + SKF_AD_NLATTR)
    yield (0x15, 7, 0, 0)  # nowhere: drop
    yield (0x07, 0, 0, 0)  # X = A
    yield (0x40, 0, 0, 4)  # A = the mark
    yield (0x07, 0, 0, 0)  # X = A
    yield (0x54, 0, 0, layout.ours | layout.via)
    yield (0x15, 0, 2, layout.ours)  # not ours, or another node's: drop
    yield (0x87, 0, 0, 0)  # A = X
    yield (0x45, 1, 0, layout.id)  # has a frontend id: take
    yield (0x06, 0, 0, 0)  # drop
    yield (0x06, 0, 0, 0xFFFFFFFF)  # take all of it


# ---- receiving


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _One(ctypes.Structure):
    """struct msghdr (recvmsg(2))."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.POINTER(_Vector)),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Header(ctypes.Structure):
    """struct mmsghdr (recvmmsg(2))."""

    _fields_ = (("one", _One), ("received", ctypes.c_uint32))


class _Receiver:
    """Takes many datagrams in one system call, each to a place of its own in `buffer`."""

    def __init__(self, descriptor: int) -> None:
        self.buffer = bytearray(_AT_ONCE * _STRIDE)
        self._descriptor = descriptor
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        places = (base + index * _STRIDE for index in range(_AT_ONCE))
        self._vectors = (_Vector * _AT_ONCE)(*(_Vector(place, _STRIDE) for place in places))
        self._headers = (_Header * _AT_ONCE)()
        for header, vector in zip(self._headers, self._vectors, strict=True):
            header.one.vectors, header.one.vector_count = ctypes.pointer(vector), 1
        self._recvmmsg = ctypes.CDLL(None, use_errno=True).recvmmsg

    def receive(self) -> int:
        """How many there were.  That some found no room is told by Socket.lost."""
        while True:
            count: int = self._recvmmsg(
                self._descriptor, self._headers, _AT_ONCE, socket.MSG_DONTWAIT, None
            )
            if count >= 0:
                return count
            number = ctypes.get_errno()
            if number == errno.EAGAIN:
                return 0
            if number not in (errno.ENOBUFS, errno.EINTR):
                raise OSError(number, os.strerror(number))


# ---- reading


class _Shape(NamedTuple):
    """Where everything is in messages of one length."""

    unpack: Callable[[Buffer, int], tuple[Any, ...]]
    kind: Callable[[tuple[Any, ...]], tuple[bytes, ...]]
    """What of it tells the entrance, and that it has this shape: attributes with their headers."""
    id: int
    sent: int | None
    received: int | None


class _Sum:
    """What is being added up of one entrance."""

    __slots__ = ("connections", "entrance", "received", "sent")

    def __init__(self, entrance: Entrance) -> None:
        self.entrance = entrance
        self.connections = self.sent = self.received = 0


class _Sums:
    """Adds flows up; not for two threads at once."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._shapes: dict[int, _Shape] = {}
        self._sums: dict[tuple[bytes, ...], _Sum] = {}
        self._counted: list[_Sum] = []
        self._elders: list[Elder] = []

    def add(self, buffer: Buffer, spans: Iterable[tuple[int, int]], elders: Container[int]) -> None:
        """Add the flows of some messages; those in `elders` apart from others."""
        shapes, sums = self._shapes, self._sums
        for start, end in spans:
            shape = shapes.get(end - start)
            if shape is None and (shape := self._learn(buffer, start, end)) is None:
                continue
            fields = shape.unpack(buffer, start)
            found = sums.get(shape.kind(fields))
            if found is None:
                shape = self._learn(buffer, start, end)
                if shape is None:
                    continue
                fields = shape.unpack(buffer, start)
                found = self._sums[shape.kind(fields)]
            sent = fields[shape.sent] if shape.sent is not None else 0
            received = fields[shape.received] if shape.received is not None else 0
            if fields[shape.id] in elders:
                self._elders.append(Elder(found.entrance, fields[shape.id], sent, received))
                continue
            if not found.connections:
                self._counted.append(found)
            found.connections += 1
            found.sent += sent
            found.received += received

    def taken(self) -> Counted:
        """What was added since last asked."""
        sums = []
        for each in self._counted:
            sums.append((each.entrance, Volume(each.connections, each.sent, each.received)))
            each.connections = each.sent = each.received = 0
        elders = self._elders
        self._counted, self._elders = [], []
        if len(self._sums) > _KINDS:
            self._sums.clear()
        return Counted(sums, elders)

    def _learn(self, buffer: Buffer, start: int, end: int) -> _Shape | None:
        """Read one message by its attributes, for others like it; None if it is not of ours."""
        message = bytes(buffer[start:end])
        where = dict(_places(message, _START, len(message)))
        try:
            original = dict(_places(message, *where[_ORIGINAL]))
            addresses = dict(_places(message, *original[_ADDRESSES]))
            ports = dict(_places(message, *original[_PORTS]))
            address = next(addresses[kind] for kind in _DESTINATIONS if kind in addresses)
            kinds = [address, ports[_NUMBER], ports[_DESTINATION_PORT], where[_MARK]]
            number = where[_ID]
        except (KeyError, StopIteration):
            return None
        parts = [message[first:last] for first, last in kinds]
        mark = int.from_bytes(parts[3], "big")
        layout = self._layout
        if mark & (layout.ours | layout.via) != layout.ours or not mark & layout.id:
            return None
        counters = [_counter(message, where.get(kind)) for kind in (_SENT, _RECEIVED)]
        shape = self._shapes[end - start] = _shape(kinds, number, counters)
        kind = shape.kind(shape.unpack(message, 0))
        if kind not in self._sums:
            protocol, port = parts[1][0], int.from_bytes(parts[2], "big")
            self._sums[kind] = _Sum(Entrance(parts[0], protocol, port, mark))
        return shape


_Place = tuple[int, int]


def _shape(kinds: list[_Place], number: _Place, counters: list[_Place | None]) -> _Shape:
    """What reads these places: each with the header before it, counters and numbers apart."""
    wanted = [(first - 4, f"{last - first + 4}s", "kind") for first, last in kinds]
    for name, place in (("id", number), ("sent", counters[0]), ("received", counters[1])):
        if place is not None:
            wanted.append((place[0] - 4, "4s", "kind"))
            wanted.append((place[0], "I" if name == "id" else "Q", name))
    text, end = ">", 0
    names = []
    for first, code, name in sorted(wanted):
        text += f"{first - end}x{code}"
        end = first + struct.calcsize(f">{code}")
        names.append(name)
    at = {name: names.index(name) for name in names}
    kind = itemgetter(*(index for index, name in enumerate(names) if name == "kind"))
    unpack = struct.Struct(text).unpack_from
    return _Shape(unpack, kind, at["id"], at.get("sent"), at.get("received"))


def _counter(message: bytes, place: _Place | None) -> _Place | None:
    """Where the bytes are among a direction's counters; None if the kernel does not count them."""
    return dict(_places(message, *place)).get(_BYTES) if place is not None else None


def _places(message: bytes, start: int, end: int) -> Iterator[tuple[int, _Place]]:
    """The attributes between two places, by type: where each one's payload begins and ends."""
    while start + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(message, start)
        if length < 4:
            return
        yield kind & 0x3FFF, (start + 4, start + length)
        start += length + 3 & ~3


def _length(buffer: Buffer, at: int) -> int:
    return min(int.from_bytes(buffer[at : at + 4], sys.byteorder), _STRIDE)

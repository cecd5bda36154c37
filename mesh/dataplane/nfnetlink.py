"""The NETLINK_NETFILTER socket: numbered messages, atomic batches, dumps, notifications.

Knows the framing that nf_tables and conntrack share (linux/netlink.h, linux/netfilter/nfnetlink.h),
not what the messages mean.  Calls block for microseconds: the kernel answers within send(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from mesh.dataplane import observe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

INET: Final = 1
BRIDGE: Final = 7
CREATE: Final = 0x400
NFTABLES_GROUP: Final = 7
CONNTRACK_DESTROY_GROUP: Final = 3

_NETLINK_NETFILTER: Final = 12
_SUBSYSTEM_NFTABLES: Final = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_DUMP_INTERRUPTED, _CAPPED, _ACK_TLVS = 0x10, 0x100, 0x200
_ATTRIBUTE_OFFSET: Final = 2
_NESTED: Final = 0x8000
_TYPE_MASK: Final = 0x3FFF
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_SO_ATTACH_FILTER: Final = 26
_SO_MEMINFO: Final = 55
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11

_SEND_BUFFER: Final = 64 << 20
_RECEIVE_BUFFER: Final = 8 << 20
_ANSWER_SECONDS: Final = 5
_DUMP_ATTEMPTS: Final = 20

_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_BATCH_BODY: Final = struct.pack(">BBH", 0, 0, _SUBSYSTEM_NFTABLES)
HEADER_SIZE: Final = _HEADER.size


class Message(msgspec.Struct, frozen=True, gc=False):
    """One request, not yet numbered.  `body` starts with the nfgenmsg."""

    kind: int
    flags: int
    body: bytes


class Answer(NamedTuple):
    """One message from the kernel.  `port` is the port id of the socket that caused it."""

    kind: int
    flags: int
    seq: int
    port: int
    body: bytes


class Refused(OSError):
    """The kernel refused a batch because of message `index` (None: all of it together).

    `offset` counts the bytes of that message up to the culprit attribute, where the kernel says.
    """

    def __init__(self, number: int, index: int | None, offset: int | None) -> None:
        super().__init__(number, os.strerror(number))
        self.index = index
        self.offset = offset


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(len(data) + 4, kind) + data + b"\0" * (-len(data) & 3)


def nested(kind: int, data: bytes) -> bytes:
    """One attribute that holds others."""
    return _ATTRIBUTE.pack(len(data) + 4, kind | _NESTED) + data


def text(kind: int, value: str) -> bytes:
    """One attribute that holds a name."""
    return attribute(kind, value.encode() + b"\0")


def generic(family: int) -> bytes:
    """The nfgenmsg that starts every body."""
    return bytes((family, 0, 0, 0))


def attributes(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """The attributes in `data` from `start` on: type and payload, without padding."""
    end = len(data)
    while start + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < 4:
            return
        yield kind & _TYPE_MASK, data[start + 4 : start + length]
        start += length + 3 & ~3


class Socket:
    """A socket in the network namespace it was made in.  Not for two threads at once."""

    def __init__(self, group: int = 0) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        try:
            self._socket.bind((0, 1 << group - 1 if group else 0))
        except OSError:  # only who administers the network hears of changes to it
            self._socket.close()
            raise
        self._socket.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        # Not settimeout(): that costs a poll(2) for each message.
        timeout = struct.pack("@ll", _ANSWER_SECONDS, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        self._widen(_SO_RCVBUFFORCE, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self._widen(_SO_SNDBUFFORCE, socket.SO_SNDBUF, _SEND_BUFFER)
        room: int = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._capacity = room - 4096
        self._buffer = bytearray(1 << 20)
        self._view = memoryview(self._buffer)
        self._seq = 0
        self.port: int = self._socket.getsockname()[0]

    def _widen(self, force: int, polite: int, size: int) -> None:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, force, size)
        except PermissionError:  # needs CAP_NET_ADMIN in the initial user namespace
            self._socket.setsockopt(socket.SOL_SOCKET, polite, size)

    def fileno(self) -> int:
        """The descriptor, for an event loop."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def transact(self, messages: Sequence[Message]) -> None:
        """Send nf_tables messages as one transaction: all or nothing.  Raises Refused.

        Only what exceeds the send buffer (128 MiB; in a user namespace net.core.wmem_max, about
        7000 elements) is split into several transactions, in order, each atomic for itself.
        """
        try:
            self._transact(messages)
        except OSError:
            observe.tell("netlink", failed=True)
            raise
        observe.tell("netlink", failed=False)

    def _transact(self, messages: Sequence[Message]) -> None:
        start, size = 0, 0
        for index, message in enumerate(messages):
            size += len(message.body) + HEADER_SIZE
            if size > self._capacity:
                self._commit(messages, start, index)
                start, size = index, len(message.body) + HEADER_SIZE
        if start < len(messages):
            self._commit(messages, start, len(messages))

    def _commit(self, messages: Sequence[Message], start: int, stop: int) -> None:
        begin = self._next(stop - start + 1)
        last = self._seq
        pack, port = _HEADER.pack, self.port
        parts = [pack(20, _BATCH_BEGIN, _REQUEST, begin, port), _BATCH_BODY]
        for seq, index in enumerate(range(start, stop), begin + 1):
            message = messages[index]
            flags = message.flags | (_REQUEST | _ACK if seq == last else _REQUEST)
            size = len(message.body) + HEADER_SIZE
            parts += (pack(size, message.kind, flags, seq, port), message.body)
        parts += (pack(20, _BATCH_END, _REQUEST, last, port), _BATCH_BODY)
        self._socket.send(b"".join(parts))
        refused = self._verdict(begin, last)
        if refused is not None:
            if refused.index is not None:
                refused.index += start
            raise refused

    def _next(self, count: int) -> int:
        """Reserve `count` sequence numbers; returns the first."""
        if self._seq > 1 << 31:  # u32 on the wire: start over long before it wraps
            self._seq = 0
        self._seq += count
        return self._seq - count + 1

    def _verdict(self, begin: int, last: int) -> Refused | None:
        """Read answers up to that of the last message; the first refusal counts.

        An error of the batch as a whole is told of its first message; what the kernel may have
        queued behind it carries old numbers, and is passed over by the next reader.
        """
        refused: Refused | None = None
        while True:
            for answer in self._receive():
                if answer.kind != _ERROR or not begin <= answer.seq <= last:
                    continue
                number = -int(struct.unpack_from("=i", answer.body)[0])
                if answer.seq == begin:
                    return refused or Refused(number, None, None)
                if number and refused is None:
                    refused = Refused(number, answer.seq - begin - 1, _offset(answer))
                if answer.seq == last:
                    return refused

    def each(self, messages: Sequence[Message]) -> list[int]:
        """Send messages that stand for themselves; the error number of each, 0 for success.

        At most some hundred at once: each has an answer, and all must fit the receive buffer.
        """
        begin = self._next(len(messages))
        pack, port = _HEADER.pack, self.port
        parts: list[bytes] = []
        for seq, message in enumerate(messages, begin):
            flags, size = message.flags | _REQUEST | _ACK, len(message.body) + HEADER_SIZE
            parts += (pack(size, message.kind, flags, seq, port), message.body)
        self._socket.send(b"".join(parts))
        told: dict[int, int] = {}
        while len(told) < len(messages):
            for answer in self._receive():
                if answer.kind == _ERROR and answer.seq >= begin:
                    told[answer.seq] = -int(struct.unpack_from("=i", answer.body)[0])
        return [told[seq] for seq in range(begin, begin + len(messages))]

    def dump(self, message: Message) -> list[bytes]:
        """The bodies of all answers to a dump request.  Raises OSError.

        A dump that others' changes disturbed is taken again.
        """
        for _ in range(_DUMP_ATTEMPTS):
            found = self._dump(message)
            if found is not None:
                return found
        raise OSError(errno.EINTR, "the ruleset changes faster than it can be read")

    def _dump(self, message: Message) -> list[bytes] | None:
        self._next(1)
        flags, size = message.flags | _REQUEST | _DUMP, len(message.body) + HEADER_SIZE
        header = _HEADER.pack(size, message.kind, flags, self._seq, self.port)
        self._socket.send(header + message.body)
        found: list[bytes] = []
        interrupted = False
        while True:
            for answer in self._receive():
                if answer.seq != self._seq:
                    continue
                interrupted = interrupted or bool(answer.flags & _DUMP_INTERRUPTED)
                if answer.kind in (_ERROR, _DONE):
                    number = -struct.unpack_from("=i", answer.body)[0] if answer.body else 0
                    if number and number != errno.EINTR:
                        raise OSError(number, os.strerror(number))
                    return None if interrupted or number else found
                found.append(answer.body)

    def dumped(self, message: Message) -> Iterator[tuple[memoryview, list[tuple[int, int]]]]:
        """The answers to a dump request as they come, for those who read a million of them: each
        datagram, and where its messages begin and end.  Raises OSError.

        What is disturbed is not taken again.  A datagram is there until the next is asked for.
        """
        self._next(1)
        flags, size = message.flags | _REQUEST | _DUMP, len(message.body) + HEADER_SIZE
        header = _HEADER.pack(size, message.kind, flags, self._seq, self.port)
        self._socket.send(header + message.body)
        done = False
        while not done:
            try:
                end = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                raise TimeoutError(f"netlink: no answer within {_ANSWER_SECONDS} s") from None
            found, start = [], 0
            while start + HEADER_SIZE <= end:
                length, kind, _, seq, _ = _HEADER.unpack_from(self._buffer, start)
                if seq == self._seq and kind in (_ERROR, _DONE):
                    number = -struct.unpack_from("=i", self._buffer, start + HEADER_SIZE)[0]
                    if number:
                        raise OSError(number, os.strerror(number))
                    done = True
                elif seq == self._seq:
                    found.append((start, start + length))
                start += length + 3 & ~3
            yield self._view, found

    def ask(self, message: Message) -> bytes:
        """The body of the one answer to a request that is not a dump.  Raises OSError."""
        self._next(1)
        size = len(message.body) + HEADER_SIZE
        header = _HEADER.pack(size, message.kind, message.flags | _REQUEST, self._seq, self.port)
        self._socket.send(header + message.body)
        while True:
            for answer in self._receive():
                if answer.seq != self._seq:
                    continue
                if answer.kind == _ERROR:
                    number = -struct.unpack_from("=i", answer.body)[0]
                    raise OSError(number, os.strerror(number))
                return answer.body

    def _receive(self) -> list[Answer]:
        """The messages of one datagram.  A full receive buffer loses answers, not the change."""
        while True:
            try:
                size = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                raise TimeoutError(f"netlink: no answer within {_ANSWER_SECONDS} s") from None
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
            else:
                return list(_answers(bytes(self._view[:size])))

    def ignore(self, port: int) -> None:
        """Let the kernel leave out what the socket with this port id caused (socket(7), BPF).

        The filter looks at the sender in a message's header; one transaction has one sender.
        """
        # Filters load words in network order; the field is in the host's.
        sender = int.from_bytes(struct.pack("=I", port), "big")
        self.filter(
            (0x20, 0, 0, 12),  # A = nlmsg_pid
            (0x15, 0, 1, sender),  # if A is the sender's, next; else skip one
            (0x06, 0, 0, 0),  # drop
            (0x06, 0, 0, 0xFFFFFFFF),  # take all of it
        )

    def filter(self, *instructions: tuple[int, int, int, int]) -> None:
        """Have the kernel judge each datagram first: code, jumps and operand (linux/filter.h)."""
        packed = b"".join(struct.pack("=HBBI", *each) for each in instructions)
        program = (ctypes.c_uint8 * len(packed)).from_buffer_copy(packed)
        attached = struct.pack("@HP", len(instructions), ctypes.addressof(program))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, attached)

    def lost(self) -> int:
        """How many notifications found no room, since the socket was made (SK_MEMINFO_DROPS)."""
        told = self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36)
        return int(struct.unpack_from("=I", told, 32)[0])

    def pending(self) -> list[Answer] | None:
        """Every notification that waits, without blocking; None if some were lost."""
        found: list[Answer] = []
        lost = False
        while True:
            try:
                size = self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None if lost else found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
            else:
                found += _answers(bytes(self._view[:size]))


def _answers(data: bytes) -> Iterator[Answer]:
    start, end = 0, len(data)
    while start + HEADER_SIZE <= end:
        length, kind, flags, seq, port = _HEADER.unpack_from(data, start)
        if length < HEADER_SIZE:
            return
        yield Answer(kind, flags, seq, port, data[start + HEADER_SIZE : start + length])
        start += length + 3 & ~3


def _offset(answer: Answer) -> int | None:
    """Where in the refused message the culprit is (NLMSGERR_ATTR_OFFS), if the kernel says."""
    if not (answer.flags & _ACK_TLVS and answer.flags & _CAPPED):
        return None
    for kind, data in attributes(answer.body, 4 + HEADER_SIZE):
        if kind == _ATTRIBUTE_OFFSET:
            return int(struct.unpack("=I", data)[0])
    return None

"""The load generator: client and server in one thread, which never waits for anybody.

On veth a packet is received within the system call that sends it.  So when connect(2) returns, the
handshake is over: client, node and server have done all their work on this thread's time, and no
other processor, process or wake-up takes part.  What is measured is that time, less the time the
thread was ready to run but had no processor (schedstat, proc(5)).
"""

from __future__ import annotations

import os
import resource
import select
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mesh.bench import records
from mesh.dataplane import netns
from mesh.errors import HostNotReady
from mesh.model.address import Family

if TYPE_CHECKING:
    from collections.abc import Sequence

Target = tuple[str, int]

_DOMAIN: Final = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_PACKET_INFO: Final = {
    # IP_PKTINFO (linux/in.h): with it a server answers from the address it was asked at.
    Family.V4: (socket.IPPROTO_IP, 8),
    Family.V6: (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO),
}
_BACKLOG: Final = 4096
_CHUNK: Final = bytes(1 << 18)
_MEBIBYTES: Final = 8
_WAIT_SECONDS: Final = 1
_TIME_OUT: Final = struct.pack("@ll", _WAIT_SECONDS, 0)
_CONTROL_BYTES: Final = 64
_SCHEDSTAT: Final = "/proc/thread-self/schedstat"


class Processor:
    """What this thread has used of its processor, in seconds.  `close` releases a descriptor."""

    def __init__(self) -> None:
        try:
            self._statistics = os.open(_SCHEDSTAT, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise HostNotReady(
                f"{_SCHEDSTAT} is missing: this needs a kernel with CONFIG_SCHED_INFO"
            ) from None

    def time(self) -> float:
        """Seconds that went by, less those spent waiting for the processor."""
        waited = int(os.pread(self._statistics, 64, 0).split()[1])
        return (time.perf_counter_ns() - waited) / 1e9

    def own(self) -> float:
        """Seconds of user time: what the generator itself takes."""
        return resource.getrusage(resource.RUSAGE_THREAD).ru_utime

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._statistics)


class Server:
    """Accepts and answers at every address of its namespace, by TCP and UDP."""

    def __init__(self, namespace: str, family: Family) -> None:
        with netns.entered(namespace):
            self.listener = socket.socket(_DOMAIN[family], socket.SOCK_STREAM)
            self.datagrams = socket.socket(_DOMAIN[family], socket.SOCK_DGRAM)
        for each in (self.listener, self.datagrams):
            each.bind(("", records.TARGET))
            each.setblocking(False)
        self.listener.listen(_BACKLOG)
        self.datagrams.setsockopt(*_PACKET_INFO[family], 1)

    def accept(self) -> socket.socket | None:
        """The next connection; None if there is none within a second."""
        try:
            return self.listener.accept()[0]
        except BlockingIOError:
            if not _readable(self.listener):
                return None
            return self.listener.accept()[0]

    def answer(self) -> bool:
        """Send the next request back to where it came from; whether there was one."""
        try:
            data, control, _, client = self.datagrams.recvmsg(64, _CONTROL_BYTES)
        except BlockingIOError:
            if not _readable(self.datagrams):
                return False
            data, control, _, client = self.datagrams.recvmsg(64, _CONTROL_BYTES)
        self.datagrams.sendmsg([data], control, 0, client)
        return True

    def close(self) -> None:
        """Stop answering."""
        self.listener.close()
        self.datagrams.close()


def _readable(each: socket.socket) -> bool:
    return bool(select.select([each], [], [], _WAIT_SECONDS)[0])


@dataclass(slots=True)
class Taken:
    """What was measured of one way to a service, in seconds.  Connections and round trips that
    did not succeed are only counted.
    """

    batches: list[float] = field(default_factory=list)
    connects: list[float] = field(default_factory=list)
    round_trips: list[float] = field(default_factory=list)
    downloads: list[float] = field(default_factory=list)
    """Of one mebibyte."""
    connections: int = 0
    failed: int = 0


class Generator:
    """Opens connections from the namespace the thread is in, to a server it also is."""

    def __init__(self, server: Server, family: Family, processor: Processor) -> None:
        self._server = server
        self._domain = _DOMAIN[family]
        self._processor = processor

    def batch(self, targets: Sequence[Target], taken: Taken) -> None:
        """Open a connection to each target, accept all, close both ends: processor time of one."""
        began = self._processor.time()
        clients = [
            socket.socket(self._domain, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in targets
        ]
        for client, target in zip(clients, targets, strict=True):
            client.connect_ex(target)
        accepted = []
        for _ in targets:
            if (served := self._server.accept()) is None:
                break
            accepted.append(served)
        for each in (*clients, *accepted):
            each.close()
        used = self._processor.time() - began
        taken.connections += len(targets)
        taken.failed += len(targets) - len(accepted)
        if len(accepted) == len(targets):
            taken.batches.append(used / len(targets))

    def connect(self, target: Target, taken: Taken) -> None:
        """One connection: how long connect(2) takes, which is the whole handshake."""
        taken.connections += 1
        with socket.socket(self._domain, socket.SOCK_STREAM) as client:
            # A blocking connect(2) that gives up; Python's own time-out would add a poll(2) to it.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIME_OUT)
            began = time.perf_counter_ns()
            try:
                client.connect(target)
            except OSError:
                taken.failed += 1
                return
            taken.connects.append((time.perf_counter_ns() - began) / 1e9)
            if (served := self._server.accept()) is None:
                taken.failed += 1
                return
        served.close()

    def round_trip(self, target: Target, taken: Taken) -> None:
        """One datagram of a new flow there and back."""
        taken.connections += 1
        with socket.socket(self._domain, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as client:
            began = time.perf_counter_ns()
            answered = False
            with suppress(OSError):
                client.sendto(b"x", target)
                answered = self._server.answer() and self._received(client)
            if answered:
                taken.round_trips.append((time.perf_counter_ns() - began) / 1e9)
            else:
                taken.failed += 1

    def download(self, target: Target, taken: Taken) -> None:
        """Some mebibytes from the server over one connection: kernel time of each of them."""
        taken.connections += 1
        with socket.socket(self._domain, socket.SOCK_STREAM) as client:
            client.settimeout(_WAIT_SECONDS)
            try:
                client.connect(target)
            except OSError:
                taken.failed += 1
                return
            if (served := self._server.accept()) is None:
                taken.failed += 1
                return
            with served:
                self._transfer(served, client, taken)

    def _transfer(self, served: socket.socket, client: socket.socket, taken: Taken) -> None:
        client.setblocking(False)
        served.setblocking(False)
        left, room = _MEBIBYTES << 20, bytearray(len(_CHUNK))
        began, own = self._processor.time(), self._processor.own()
        while left:
            with suppress(BlockingIOError):
                served.send(_CHUNK)
            try:
                left -= min(left, client.recv_into(room))
            except BlockingIOError:
                if not _readable(client):
                    taken.failed += 1
                    return
        used = self._processor.time() - began - (self._processor.own() - own)
        taken.downloads.append(used / _MEBIBYTES)

    def _received(self, client: socket.socket) -> bool:
        try:
            client.recv(64)
        except BlockingIOError:
            return _readable(client) and bool(client.recv(64))
        return True

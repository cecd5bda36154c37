"""Conntrack entries, read and forgotten through ctnetlink (linux/netfilter/nfnetlink_conntrack.h).

Sees the network namespace it was made in.  Never decides which flows are stale (mesh.rules.stale),
and must be called after the maps changed: else a flow would be pinned to what is gone again.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import socket
from struct import pack
from typing import TYPE_CHECKING, Final

from mesh.dataplane.nfnetlink import Message, Socket, attribute, attributes, generic, nested
from mesh.errors import ApplyFailed
from mesh.model.publish import Protocol
from mesh.rules import stale
from mesh.rules.stale import Flow, Stale

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from mesh.rules.marks import Layout
    from mesh.rules.stale import Endpoint

_CHANGE, _GET, _DELETE = 1 << 8, 1 << 8 | 1, 1 << 8 | 2
_ORIGINAL, _REPLY, _STATUS, _PROTOCOL, _MARK, _ID = 1, 2, 3, 4, 8, 12
_ZONE, _MARK_MASK, _FILTER, _STATUS_MASK = 18, 21, 25, 26
_ADDRESSES, _PORTS = 1, 2
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_BY_NUMBER, _BY_DESTINATION_PORT = 8, 32
_ANSWERED: Final = 0x02  # IPS_SEEN_REPLY
_ANSWERED_OR_TRANSLATED: Final = 0x32  # IPS_SEEN_REPLY, IPS_SRC_NAT, IPS_DST_NAT
_TOUCHED: Final = _ANSWERED_OR_TRANSLATED.to_bytes(4, "big")

_TCP, _TCP_STATE, _TCP_REPLY_FLAGS = 1, 1, 5  # CTA_PROTOINFO_TCP, and what is in it
_TCP_TIME_WAIT: Final = 7
_TCP_CLOSE_BEGUN: Final = 0x04  # IP_CT_TCP_FLAG_CLOSE_INIT
_TCP_CLOSING: Final = frozenset((6, 7, 8))
"""LAST_ACK, TIME_WAIT, CLOSE (linux/netfilter/nf_conntrack_tcp.h)."""

_MESSAGES: Final = 2
"""More to forget than this, and one dump costs less: a message walks the whole table."""

_IN_FLIGHT: Final = 64
_UNSUPPORTED: Final = (errno.EINVAL, errno.EOPNOTSUPP)
"""What kernels without filters in a delete answer: to them it is a tuple without addresses."""


class Conntrack:
    """The connection table of one network namespace.  Costs nothing until it is asked."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._socket = Socket()
        self._filters = True
        self._lock = asyncio.Lock()

    async def forget(self, wanted: Iterable[Stale]) -> None:
        """Delete these UDP flows; that there are none is no error.  Raises ApplyFailed."""
        found = tuple(wanted)
        assert all(each.mask for each in found), "a mask of zero matches everybody's flows"
        if found:
            async with self._lock:
                await asyncio.to_thread(self._forget, found)

    async def flows(self, mark: int, mask: int) -> list[Flow]:
        """Every entry that carries `mark` under `mask`, of both families and any protocol with
        ports.  Raises ApplyFailed.
        """
        async with self._lock:
            return await asyncio.to_thread(self._read, _marked(Stale(mark, mask)))

    async def udp_flows(self, mark: int, mask: int) -> list[Flow]:
        """The same of UDP only, which the kernel picks itself."""
        async with self._lock:
            return await asyncio.to_thread(self._read_udp, [Stale(mark, mask)])

    async def unanswered(self) -> list[Flow]:
        """Flows of ours, translated here, to which nothing ever came back."""
        async with self._lock:
            return await asyncio.to_thread(self._read_unanswered)

    async def delete(self, flows: Iterable[Flow]) -> None:
        """Delete these very flows; that one is gone already is no error.  Raises ApplyFailed."""
        found = list(flows)
        if found:
            async with self._lock:
                await asyncio.to_thread(self._delete, found)

    async def delete_unanswered(self, flows: Iterable[Flow]) -> None:
        """Delete those of these very flows to which nothing came back since.  Raises ApplyFailed.

        Not every kernel deletes on that condition: so it is looked at right before.
        """
        handles = {flow.handle for flow in flows}
        if handles:
            async with self._lock:
                await asyncio.to_thread(self._delete_unanswered, handles)

    async def flows_to(self, addresses: Collection[bytes]) -> list[Flow]:
        """Flows of ours, of any protocol with ports, that have to do with any of these addresses.

        Raises ApplyFailed.
        """
        async with self._lock:
            return await asyncio.to_thread(self._read_to, addresses)

    async def end(self, flows: Iterable[Flow]) -> None:
        """Have the program refuse what still comes of these very flows, from either side; that one
        is gone already is no error.  Raises ApplyFailed.

        To conntrack a TCP connection has been closed then: the entry stays as long as it would
        have, and two minutes from the next segment; a client that connects anew from the same port
        makes a new one at once.
        """
        wanted = [self._ended(flow) for flow in flows]
        if wanted:
            async with self._lock:
                await asyncio.to_thread(self._change, wanted)

    async def forget_marked(self, bit: int) -> None:
        """Delete every flow that carries a bit, of any protocol.  Raises ApplyFailed."""
        async with self._lock:
            (failed,) = await asyncio.to_thread(self._send, [_marked(Stale(bit, bit))])
        if failed not in (0, errno.ENOENT):
            raise _refused("delete", os.strerror(failed))

    async def remark(self, bit: int, mask: int, become: Callable[[int], int]) -> int:
        """Write what `become` makes of its mark to the bits in `mask` of each flow that carries a
        bit, of any protocol; how many there were.  Raises ApplyFailed.

        New ones must not come meanwhile; those that did before they were kept off are found too.
        """
        async with self._lock:
            return await asyncio.to_thread(self._remark, bit, mask, become)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _remark(self, bit: int, mask: int, become: Callable[[int], int]) -> int:
        done: set[bytes] = set()
        while True:
            found = dict(self._marks(bit))
            fresh = {handle: mark for handle, mark in found.items() if handle not in done}
            if not fresh:
                return len(done)
            self._change([_changed(handle, become(mark), mask) for handle, mark in fresh.items()])
            done |= fresh.keys()

    def _ended(self, flow: Flow) -> bytes:
        request = _changed(flow.handle, self._layout.end(flow.mark), self._layout.ct_mark)
        return request + _CLOSED if flow.protocol == Protocol.TCP.number else request

    def _change(self, wanted: list[bytes]) -> None:
        for first in range(0, len(wanted), _IN_FLIGHT):
            for number in self._send(wanted[first : first + _IN_FLIGHT], _CHANGE):
                if number not in (0, errno.ENOENT):
                    raise _refused("change", os.strerror(number))

    def _marks(self, bit: int) -> Iterator[tuple[bytes, int]]:
        """The flows that carry a bit, and their marks."""
        for body in self._dump(_marked(Stale(bit, bit))):
            parts = dict(attributes(body, 4))
            mark = int.from_bytes(parts.get(_MARK, b""), "big")
            if mark & bit:  # not every kernel filters
                yield _handle(body, parts), mark

    def _forget(self, wanted: tuple[Stale, ...]) -> None:
        if not (len(wanted) <= _MESSAGES and all(map(_is_plain, wanted)) and self._flush(wanted)):
            self._delete(list(stale.chosen(self._read_udp(wanted), wanted)))

    def _flush(self, wanted: tuple[Stale, ...]) -> bool:
        """Let the kernel pick and delete; False if it cannot."""
        if self._filters:
            failed = {number for number in self._send(_udp(wanted)) if number}
            if not failed.issubset(_UNSUPPORTED):
                raise _refused("delete", os.strerror(failed.pop()))
            self._filters = not failed
        return self._filters

    def _read_udp(self, wanted: Iterable[Stale]) -> list[Flow]:
        """At least the flows of `wanted`; the kernel looks at what all of these have in common.

        For one frontend id that is enough.  Else it has to look at the protocol as well: it wants
        one request per family then, and each walks the whole table.
        """
        common = functools.reduce(_union, wanted)
        if common.mask & self._layout.id == self._layout.id and not common.bare:
            return self._read(_marked(common))
        return [flow for body in _udp([common]) for flow in self._read(body)]

    def _delete_unanswered(self, handles: set[bytes]) -> None:
        self._delete([flow for flow in self._read_unanswered() if flow.handle in handles])

    def _read_unanswered(self) -> list[Flow]:
        ours, via = self._layout.ours, self._layout.via
        status = attribute(_STATUS, bytes(4))
        status += attribute(_STATUS_MASK, _ANSWERED.to_bytes(4, "big"))
        found = self._read(_marked(Stale(ours, ours | via)) + status)
        return [flow for flow in found if not flow.answered]  # kernels before 5.19 send all

    def _read_to(self, addresses: Collection[bytes]) -> list[Flow]:
        ours = self._layout.ours
        bodies = self._dump(_marked(Stale(ours, ours)))
        near = (body for body in bodies if any(address in body for address in addresses))
        return [flow for flow in _parsed(near) if flow.mark & ours]  # not every kernel filters

    def _read(self, body: bytes) -> list[Flow]:
        return list(_parsed(self._dump(body)))

    def _dump(self, body: bytes) -> list[bytes]:
        try:
            return self._socket.dump(Message(_GET, 0, body))
        except OSError as error:
            raise _refused("list", str(error.strerror or error)) from None

    def _delete(self, flows: list[Flow]) -> None:
        for first in range(0, len(flows), _IN_FLIGHT):
            for number in self._send([f.handle for f in flows[first : first + _IN_FLIGHT]]):
                if number not in (0, errno.ENOENT):
                    raise _refused("delete", os.strerror(number))

    def _send(self, bodies: list[bytes], kind: int = _DELETE) -> list[int]:
        try:
            return self._socket.each([Message(kind, 0, body) for body in bodies])
        except OSError as error:
            verb = "delete" if kind == _DELETE else "change"
            raise _refused(verb, str(error.strerror or error)) from None


def _refused(verb: str, reason: str) -> ApplyFailed:
    stays = "UDP clients may stay with backends that are gone; " if verb != "change" else ""
    return ApplyFailed(
        f"conntrack: the kernel does not {verb} entries: {reason}: {stays}"
        "check for CAP_NET_ADMIN and the module nf_conntrack_netlink"
    )


def _is_plain(wanted: Stale) -> bool:
    """Whether the kernel can pick these itself.

    Never by address: up to 6.18 at least it takes every IPv6 address but the one asked for.
    """
    return wanted.backend is None and not (wanted.destination and wanted.destination[0])


def _union(one: Stale, other: Stale) -> Stale:
    """What matches everything that either does."""
    mask = one.mask & other.mask & ~(one.mark ^ other.mark)
    return Stale(one.mark & mask, mask, bare=one.bare and other.bare)


# ---- packing


def _marked(wanted: Stale, domain: int = socket.AF_UNSPEC) -> bytes:
    """A request by mark; big-endian, unlike in nf_tables."""
    mark, mask = wanted.mark.to_bytes(4, "big"), wanted.mask.to_bytes(4, "big")
    return generic(domain) + attribute(_MARK, mark) + attribute(_MARK_MASK, mask)


def _udp(wanted: Iterable[Stale]) -> list[bytes]:
    """Requests for UDP flows, by all but addresses.

    A kernel that knows no filters gives more in a dump (before 5.8), and refuses to delete.
    """
    domains = (socket.AF_INET, socket.AF_INET6)
    return [_marked(each, domain) + _filter(each) for each in wanted for domain in domains]


def _filter(wanted: Stale) -> bytes:
    ports, flags = attribute(_NUMBER, bytes((Protocol.UDP.number,))), _BY_NUMBER
    if wanted.destination is not None:
        ports += attribute(_DESTINATION_PORT, wanted.destination[1].to_bytes(2, "big"))
        flags |= _BY_DESTINATION_PORT
    body = nested(_ORIGINAL, nested(_PORTS, ports))
    if wanted.bare:
        body += attribute(_STATUS, bytes(4)) + attribute(_STATUS_MASK, _TOUCHED)
    return body + nested(_FILTER, attribute(1, pack("=I", flags)) + attribute(2, bytes(4)))


def _changed(handle: bytes, mark: int, mask: int) -> bytes:
    """A request to give a flow other bits in its mark."""
    parts = attribute(_MARK, mark.to_bytes(4, "big"))
    return handle + parts + attribute(_MARK_MASK, mask.to_bytes(4, "big"))


_CLOSED: Final = nested(
    _PROTOCOL,
    nested(
        _TCP,
        attribute(_TCP_STATE, bytes((_TCP_TIME_WAIT,)))
        + attribute(_TCP_REPLY_FLAGS, bytes((_TCP_CLOSE_BEGUN, _TCP_CLOSE_BEGUN))),
    ),
)
"""A connection whose replica closed it, as conntrack sees it: it makes room for a SYN."""


# ---- parsing


def _parsed(bodies: Iterable[bytes]) -> Iterator[Flow]:
    """Flows of protocols with ports; others never were ours."""
    for body in bodies:
        parts = dict(attributes(body, 4))
        ends, answers = _ends(parts[_ORIGINAL]), _ends(parts[_REPLY])
        if ends is None or answers is None:
            continue
        protocol, source, destination = ends
        status = int.from_bytes(parts[_STATUS], "big")
        yield Flow(
            mark=int.from_bytes(parts.get(_MARK, b""), "big"),
            protocol=protocol,
            source=source,
            destination=destination,
            backend=answers[1],
            bare=not status & _ANSWERED_OR_TRANSLATED,
            handle=_handle(body, parts),
            answered=bool(status & _ANSWERED),
            live=_is_live(parts.get(_PROTOCOL, b"")),
        )


def _is_live(data: bytes) -> bool:
    """Whether what the kernel tells of a protocol's state is no TCP connection that is closing."""
    told = dict(attributes(dict(attributes(data)).get(_TCP, b"")))
    return not _TCP_CLOSING.intersection(told.get(_TCP_STATE, b""))


def _handle(body: bytes, parts: Mapping[int, bytes]) -> bytes:
    """What tells the kernel which entry this is."""
    handle = body[:4] + nested(_ORIGINAL, parts[_ORIGINAL]) + attribute(_ID, parts[_ID])
    return handle + attribute(_ZONE, parts[_ZONE]) if _ZONE in parts else handle


def _ends(data: bytes) -> tuple[int, Endpoint, Endpoint] | None:
    """Protocol, source and destination of a tuple; None if its protocol has no ports."""
    parts = dict(attributes(data))
    addresses, ports = dict(attributes(parts[_ADDRESSES])), dict(attributes(parts[_PORTS]))
    if _SOURCE_PORT not in ports:
        return None
    source, destination = (addresses[kind] for kind in sorted(addresses))
    return (
        ports[_NUMBER][0],
        (source, int.from_bytes(ports[_SOURCE_PORT], "big")),
        (destination, int.from_bytes(ports[_DESTINATION_PORT], "big")),
    )

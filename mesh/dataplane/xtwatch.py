"""Notices that somebody changed iptables' tables or ipsets, without starting a program.

Only tells; what a change means for the mesh is decided by who asks.  Own changes count like any
other until `settle`.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from typing import TYPE_CHECKING, Final

from mesh.dataplane.nfnetlink import Message, Socket, attribute, attributes, generic
from mesh.dataplane.nfwatch import Watch
from mesh.rules.xtables import TABLES

if TYPE_CHECKING:
    from collections.abc import Iterator

_FAMILIES: Final = ((socket.AF_INET, 0), (socket.AF_INET6, 41))
"""Address family and socket level of iptables and ip6tables (linux/in.h)."""

_GET_INFO: Final = 64
_INFO_SIZE: Final = 84
"""IPT_SO_GET_INFO: name, hooks, offsets, number of entries and bytes (linux/ip_tables.h)."""

_LIST_SETS: Final = 6 << 8 | 7
_PROTOCOL: Final = attribute(1, b"\6")
_HEADERS_ONLY: Final = attribute(6 | 0x4000, struct.pack(">I", 1 << 2))
_NAME, _DATA, _COUNT = 2, 7, 24
"""Attributes of a set in the answer: name, description, and in that how many entries it has
(linux/ipset/ip_set.h)."""

_libc = ctypes.CDLL(None, use_errno=True)


class XtablesWatch:
    """Looks at the network namespace it was made in.  `close` releases its sockets."""

    def __init__(self, flavour: str) -> None:
        self._sets = Socket()
        self._rules = Watch() if flavour == "nft" else None
        self._raw: list[tuple[socket.socket, int]] = []
        if self._rules is None:
            self._raw = [
                (socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW), level)
                for family, level in _FAMILIES
            ]
        self._seen = self._look()

    def changed(self) -> bool:
        """Whether a table or a set differs in size from what it was when last settled."""
        return self._heard() or self._look() != self._seen

    def settle(self) -> None:
        """Take what there is now as known."""
        self._heard()
        self._seen = self._look()

    def close(self) -> None:
        """Stop looking."""
        self._sets.close()
        if self._rules is not None:
            self._rules.close()
        for each, _ in self._raw:
            each.close()

    def _heard(self) -> bool:
        """Whether the kernel told of a change to a table of iptables-nft since last asked."""
        if self._rules is None:
            return False
        events = self._rules.read()
        return events is None or any(event.table in TABLES for event in events)

    def _look(self) -> tuple[bytes, ...]:
        return (*self._tables(), *self._counts())

    def _tables(self) -> Iterator[bytes]:
        for each, level in self._raw:
            for table in TABLES:
                info = ctypes.create_string_buffer(table.encode(), _INFO_SIZE)
                size = ctypes.c_uint(_INFO_SIZE)
                failed = _libc.getsockopt(each.fileno(), level, _GET_INFO, info, ctypes.byref(size))
                yield b"" if failed else info.raw

    def _counts(self) -> Iterator[bytes]:
        """Every set's name and number of entries."""
        message = Message(_LIST_SETS, 0, generic(0) + _PROTOCOL + _HEADERS_ONLY)
        for answer in self._sets.dump(message):
            parts = dict(attributes(answer, 4))
            described = dict(attributes(parts.get(_DATA, b"")))
            yield parts.get(_NAME, b"") + described.get(_COUNT, b"")

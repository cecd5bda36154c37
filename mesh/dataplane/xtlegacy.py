"""Looks at the tables of iptables-legacy through getsockopt(2), without starting a program.

The kernel tells nobody when such a table changes.  What costs microseconds: how large each table
is, and whether any program took the lock that all of them take to write.  What costs 2 us a rule:
everything but the counters.  Only looks, and creates no table.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import socket
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model.address import FAMILIES, Family

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LOCK: Final = "/run/xtables.lock"
"""What programs of iptables-legacy open before they write; `-w` waits for it."""

_GET_INFO, _GET_ENTRIES = 64, 65
_INFO_SIZE: Final = 84
"""IPT_SO_GET_INFO: name, hooks, offsets, number of entries and bytes (linux/ip_tables.h)."""

_NAMES: Final = {
    Family.V4: Path("/proc/thread-self/net/ip_tables_names"),
    Family.V6: Path("/proc/thread-self/net/ip6_tables_names"),
}

_HEAD: Final = struct.Struct("=32sI4x")
"""struct ipt_get_entries, before its first entry."""

_NEXT: Final = struct.Struct("=H")
_IN_OPEN: Final = 0x20


class _Layout(NamedTuple):
    """Address family and socket level; where in an entry its length and its counters are."""

    domain: int
    level: int
    length: int
    counters: int


_LAYOUTS: Final = {
    Family.V4: _Layout(socket.AF_INET, 0, 90, 96),
    Family.V6: _Layout(socket.AF_INET6, 41, 142, 152),
}
_COUNTERS: Final = 16

_SHARE: Final = 0.01
"""Of the time at most is spent with comparing what nobody is known to have changed."""

_libc = ctypes.CDLL(None, use_errno=True)


def names(family: Family) -> list[str]:
    """The tables there are: to ask the kernel, or iptables-legacy, for another creates it."""
    try:
        return _NAMES[family].read_text(encoding="ascii").split()
    except OSError:  # the kernel has none
        return []


class LegacyTables:
    """Some tables of both families, in the network namespace it was made in."""

    def __init__(self, tables: Iterable[str]) -> None:
        self._tables = tuple(tables)
        self._sockets: dict[Family, socket.socket] = {}
        for family in FAMILIES:
            layout = _LAYOUTS[family]
            try:
                made = socket.socket(layout.domain, socket.SOCK_RAW, socket.IPPROTO_RAW)
            except OSError:  # a kernel without IPv6
                continue
            self._sockets[family] = made
        self._lock = -1

    def sizes(self) -> tuple[tuple[str, bytes], ...]:
        """How large each table is that is there, and where its built-in chains are."""
        return tuple((table, self._info(family, table)) for family, table in self._present())

    def contents(self) -> bytes:
        """A digest of all rules, chains and policies."""
        digest = hashlib.blake2b(digest_size=16)
        for family, table in self._present():
            self._add(digest, family, table)
        return digest.digest()

    def _present(self) -> Iterator[tuple[Family, str]]:
        for family in self._sockets:
            there = names(family)
            yield from ((family, table) for table in self._tables if table in there)

    def locked(self) -> bool:
        """Whether anybody opened the lock since last asked; no, as long as there is none here."""
        if self._lock < 0:
            self._lock = _watched(LOCK)
            return False
        return _drained(self._lock)

    def close(self) -> None:
        """Stop looking."""
        for each in self._sockets.values():
            each.close()
        if self._lock >= 0:
            os.close(self._lock)

    def _add(self, digest: hashlib.blake2b, family: Family, table: str) -> None:
        info = self._info(family, table)
        size: int = struct.unpack_from("=I", info, _INFO_SIZE - 4)[0]
        head = _HEAD.pack(table.encode(), size)
        found = memoryview(self._ask(family, table, _GET_ENTRIES, _HEAD.size + size, head))
        layout, at = _LAYOUTS[family], _HEAD.size
        before, after = layout.counters, layout.counters + _COUNTERS
        digest.update(info)
        while at + after <= len(found):
            end = at + _NEXT.unpack_from(found, at + layout.length)[0]
            if end <= at:
                return
            digest.update(found[at : at + before])
            digest.update(found[at + after : end])
            at = end

    def _info(self, family: Family, table: str) -> bytes:
        return self._ask(family, table, _GET_INFO, _INFO_SIZE, table.encode())

    def _ask(self, family: Family, table: str, option: int, size: int, head: bytes) -> bytes:
        """An answer of the kernel; zeroes if the table changed its size meanwhile."""
        buffer = ctypes.create_string_buffer(head, size)
        length = ctypes.c_uint(size)
        made = self._sockets[family]
        failed = _libc.getsockopt(
            made.fileno(), _LAYOUTS[family].level, option, buffer, ctypes.byref(length)
        )
        return bytes(size) if failed else buffer.raw


class LegacyFilter:
    """Notices changes of the filter tables of iptables-legacy."""

    def __init__(self) -> None:
        self._tables = LegacyTables(["filter"])
        self._seen = b""
        self._due = 0.0

    def is_used(self) -> bool:
        """Whether there is such a table."""
        return any("filter" in names(family) for family in FAMILIES)

    def changed(self) -> bool:
        """Whether there is another rule, chain or policy than when last asked.

        Asked more often than is cheap it says no, unless a program took the lock.
        """
        now = time.monotonic()
        if not self._tables.locked() and now < self._due:
            return False
        before, self._seen = self._seen, self._tables.contents()
        spent = time.monotonic() - now
        self._due = now + spent / _SHARE
        return self._seen != before

    def close(self) -> None:
        """Stop looking."""
        self._tables.close()


def _watched(path: str) -> int:
    """A descriptor of inotify(7) that tells when `path` is opened; -1 if it is not there."""
    descriptor: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if descriptor < 0:
        return -1
    if _libc.inotify_add_watch(descriptor, path.encode(), _IN_OPEN) < 0:
        os.close(descriptor)
        return -1
    return descriptor


def _drained(descriptor: int) -> bool:
    """Whether there was anything to read."""
    any_ = False
    while True:
        try:
            os.read(descriptor, 65536)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return any_
            raise
        any_ = True

"""Hears from the kernel that links, addresses, routes or rules changed, whoever changed them.

Says only that something happened, our own changes included: the listener reads and compares.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_LINK, _IPV4_ADDRESS, _IPV4_ROUTE, _IPV4_RULE = 1, 0x10, 0x40, 0x80
_IPV6_ADDRESS, _IPV6_ROUTE, _IPV6_RULE = 0x100, 0x400, 1 << 18
# Neighbours are left out: every container's ARP would wake us, and ours are permanent.
_GROUPS: Final = (
    _LINK | _IPV4_ADDRESS | _IPV4_ROUTE | _IPV4_RULE | _IPV6_ADDRESS | _IPV6_ROUTE | _IPV6_RULE
)
_BUFFER: Final = 65536


class LinkWatch:
    """Calls `changed` on the event loop after one or many changes.  `close` ends it."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._socket.setblocking(False)
        self._socket.bind((0, _GROUPS))
        self._loop.add_reader(self._socket, self._drain)

    def close(self) -> None:
        """Stop listening."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    def _drain(self) -> None:
        while True:
            try:
                self._socket.recv(_BUFFER)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # events were lost: all the more reason to look
                    raise
        self._changed()

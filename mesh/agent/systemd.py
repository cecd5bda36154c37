"""What the agent and systemd tell each other: sd_notify(3), and descriptors kept for the next one.

Without systemd nothing happens.  Descriptors are kept under short names; systemd gives them back
after a restart, in one environment variable, which limits how many there can be.
"""

from __future__ import annotations

import array
import logging
import os
import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

log = logging.getLogger(__name__)

_FIRST: Final = 3  # SD_LISTEN_FDS_START
_MOST_AT_ONCE: Final = 253  # SCM_MAX_FD
_LONGEST: Final = 96 << 10
"""Bytes of LISTEN_FDNAMES: with one variable above 128 KiB (MAX_ARG_STRLEN) no program starts."""


def notify(state: str, descriptors: Sequence[int] = ()) -> bool:
    """Tell systemd something; whether there is one that heard it."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        try:
            one.connect("\0" + path[1:] if path[0] == "@" else path)
            one.sendmsg([state.encode()], [rights] if descriptors else [])
        except OSError as error:
            log.debug("systemd was not told %r: %s", state, error)
            return False
    return True


def given() -> dict[str, tuple[int, ...]]:
    """The descriptors that systemd kept, by their names; no child of this process gets them."""
    count = os.environ.get("LISTEN_FDS", "")
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, tuple[int, ...]] = {}
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and count.isdecimal():
        for descriptor, name in zip(range(_FIRST, _FIRST + int(count)), names, strict=False):
            os.set_inheritable(descriptor, False)
            found[name] = (*found.get(name, ()), descriptor)
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)
    return found


class Store:
    """What systemd keeps for the next agent.  Names are without colons."""

    def __init__(self, kept: Mapping[str, Collection[int]]) -> None:
        self._kept = {name: frozenset(descriptors) for name, descriptors in kept.items()}
        self._size = sum(map(_length, self._kept, self._kept.values()))
        self._full = False

    def keep(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Have these kept under their names, and what was there under them no more."""
        if "NOTIFY_SOCKET" not in os.environ:
            return
        for name in wanted:
            if name in self._kept and self._kept[name] != frozenset(wanted[name]):
                notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
                self._size -= _length(name, self._kept.pop(name))
        for name, descriptors in wanted.items():
            if descriptors and name not in self._kept:
                self._add(name, descriptors)

    def _add(self, name: str, descriptors: tuple[int, ...]) -> None:
        size = _length(name, descriptors)
        if self._size + size > _LONGEST or len(descriptors) > _MOST_AT_ONCE:
            if not self._full:
                log.warning("systemd keeps only %d held ports over a restart", len(self._kept))
            self._full = True
            return
        # A socket that is bound and no more counts as hung up: systemd must not look (FDPOLL).
        if notify(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", descriptors):
            self._kept[name] = frozenset(descriptors)
            self._size += size


def _length(name: str, descriptors: Collection[int]) -> int:
    return (len(name) + 1) * len(descriptors)

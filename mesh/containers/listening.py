"""Whether a container listens on its service's ports yet, by a look at the kernel's own tables.

Sends nothing: a connection made to find out would be a request the command never asked for.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.model.publish import Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LIMIT_SECONDS: Final = 10.0
"""After this a container is used although something is not listened on: it may never be."""

_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 0.2

_TABLES: Final = {
    Protocol.TCP: ("tcp", "tcp6"),
    Protocol.UDP: ("udp", "udp6"),
    Protocol.SCTP: ("sctp/eps",),
}
_STATES: Final = {Protocol.TCP: "0A", Protocol.UDP: "07", Protocol.SCTP: "10"}
"""TCP_LISTEN, which SCTP writes in decimal, and TCP_CLOSE for a UDP socket that is not connected
(net/tcp_states.h)."""

_log = logging.getLogger(__name__)

Port = tuple[Protocol, int]


def parse(table: str, protocol: Protocol) -> Iterator[Port]:
    """The ports somebody listens on, from the text of /proc/net/tcp or its likes (proc(5))."""
    for line in table.splitlines()[1:]:
        _, local, _, state, _, port, *_ = line.split()
        if state != _STATES[protocol]:
            continue
        if protocol is Protocol.SCTP:  # ENDPT SOCK STY SST HBKT LPORT (net/sctp/proc.c)
            yield protocol, int(port)
        else:
            yield protocol, int(local.rpartition(":")[2], 16)


async def until_listening(pid: int, wanted: Iterable[Port]) -> None:
    """Wait until the network namespace of process `pid` listens on all ports, within a limit."""
    missing, pause = set(wanted), _FIRST_PAUSE
    deadline = asyncio.get_running_loop().time() + LIMIT_SECONDS
    while missing := missing - set(listened(pid)):
        if asyncio.get_running_loop().time() > deadline:
            names = ", ".join(sorted(f"{port}/{protocol.value}" for protocol, port in missing))
            _log.warning("nobody listens on %s after %g s: used anyway", names, LIMIT_SECONDS)
            return
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def listened(pid: int) -> Iterator[Port]:
    """The ports somebody listens on in the network namespace of a process."""
    for protocol, tables in _TABLES.items():
        for table in tables:
            try:
                text = Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii")
            except OSError:  # no IPv6, no SCTP, or the process has just ended
                continue
            yield from parse(text, protocol)

"""Hears of every change to the ruleset, our own included, from the kernel.

Only tells; what a change means for the mesh is decided by who listens.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from mesh.dataplane.nfnetlink import NFTABLES_GROUP, Socket, attributes

_KINDS: Final = {
    0: ("new table", 1),
    2: ("del table", 1),
    3: ("new chain", 3),
    5: ("del chain", 3),
    6: ("new rule", 2),
    8: ("del rule", 2),
    9: ("new set", 2),
    11: ("del set", 2),
    12: ("new element", 2),
    14: ("del element", 2),
    15: ("commit", 3),
}
"""By message type: how people say it, and the attribute that holds a name."""


class Event(NamedTuple):
    """One change.  `name` is that of the table, chain or set; for a commit, of the program.

    `port` is the netlink port id of who made it: compare with NftablesDriver.port.
    """

    kind: str
    table: str
    name: str
    port: int


class Watch:
    """A subscription, in the network namespace it was made in.  `fileno` is for an event loop.

    Changes made through the socket with the port id `ignored` are left out.
    """

    def __init__(self, ignored: int = 0) -> None:
        self._socket = Socket(NFTABLES_GROUP)
        if ignored:
            self._socket.ignore(ignored)

    def fileno(self) -> int:
        """Readable when there is something to `read`."""
        return self._socket.fileno()

    def read(self) -> list[Event] | None:
        """What happened since the last call, without waiting; None if some of it was lost."""
        answers = self._socket.pending()
        if answers is None:
            return None
        found = []
        for answer in answers:
            known = _KINDS.get(answer.kind & 0xFF)
            if known is None:
                continue
            kind, attribute = known
            parts = dict(attributes(answer.body, 4))
            table = "" if kind == "commit" else _text(parts.get(1, b""))
            found.append(Event(kind, table, _text(parts.get(attribute, b"")), answer.port))
        return found

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")

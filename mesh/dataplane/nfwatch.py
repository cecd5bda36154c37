"""Hears of every change to the ruleset, our own included, from the kernel.

Only tells; what a change means for the mesh is decided by who listens.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.dataplane.nfnetlink import NFTABLES_GROUP, Socket, attributes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mesh.dataplane.nfnetlink import Answer

_NEW_CHAIN, _COMMIT = 3, 15
_KINDS: Final = {
    0: ("new table", 1),
    2: ("del table", 1),
    _NEW_CHAIN: ("new chain", 3),
    5: ("del chain", 3),
    6: ("new rule", 2),
    8: ("del rule", 2),
    9: ("new set", 2),
    11: ("del set", 2),
    12: ("new element", 2),
    14: ("del element", 2),
    _COMMIT: ("commit", 3),
}
"""By message type: how people say it, and the attribute that holds a name."""

_PID, _LISTED, _HOOK = 2, 3, 4
"""The attribute of a commit that holds a process id, as the first PID namespace counts
(NFTA_GEN_PROC_PID); that of elements that lists them; that of a chain that says where it is
hooked."""


class Event(NamedTuple):
    """One change.  `name` is that of the table, chain or set; for a commit, of the program.

    `port` is the netlink port id of who made it: compare with NftablesDriver.port.  `by` is its
    program and process id, as in "nft(4711)".  `hooked`: it is a new base chain.  `listed` are the
    elements, as the kernel lists them.
    """

    kind: str
    table: str
    name: str
    port: int
    family: int
    by: str
    hooked: bool
    listed: bytes = b""


def summary(events: Sequence[Event]) -> tuple[str, str]:
    """What happened in one phrase, the largest thing first, and who did it."""
    changes = [event for event in events if event.kind != "commit"]
    largest = min(changes, key=lambda event: _THINGS.index(event.kind.partition(" ")[2]))
    inside = " in" if largest.kind.endswith(("rule", "element")) else ""
    more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
    return f"{largest.kind}{inside} {largest.name}{more}", largest.by


_THINGS: Final = ("table", "chain", "rule", "set", "element")
"""From the largest to the smallest."""


class Watch:
    """A subscription, in the network namespace it was made in.  `fileno` is for an event loop.

    Changes made through the socket with the port id `ignored` are left out.
    """

    def __init__(self, ignored: int = 0) -> None:
        self._socket = Socket(NFTABLES_GROUP)
        self._unsigned: list[Event] = []
        if ignored:
            self._socket.ignore(ignored)

    def fileno(self) -> int:
        """Readable when there is something to `read`."""
        return self._socket.fileno()

    async def readable(self) -> None:
        """Wait until there is something to `read`."""
        loop = asyncio.get_running_loop()
        ready = loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        loop.add_reader(self.fileno(), wake)
        try:
            await ready
        finally:
            loop.remove_reader(self.fileno())

    def read(self) -> list[Event] | None:
        """What was committed since the last call, without waiting; None if some of it was lost.

        The kernel tells the changes of a transaction first, then who made it.
        """
        answers = self._socket.pending()
        if answers is None:
            self._unsigned.clear()
            return None
        found: list[Event] = []
        for answer in answers:
            event = _event(answer)
            if event is None:
                continue
            self._unsigned.append(event)
            if event.by:
                found += (each._replace(by=event.by) for each in self._unsigned)
                self._unsigned.clear()
        return found

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()


def _event(answer: Answer) -> Event | None:
    """What a notification says; None if it is of no kind that is listed above."""
    number = answer.kind & 0xFF
    if number not in _KINDS:
        return None
    kind, attribute = _KINDS[number]
    parts = dict(attributes(answer.body, 4))
    name = _text(parts.get(attribute, b""))
    if number == _COMMIT:
        by = f"{name}({int.from_bytes(parts.get(_PID, b''), 'big')})"
        return Event(kind, "", name, answer.port, 0, by, hooked=False)
    table, hooked = _text(parts.get(1, b"")), number == _NEW_CHAIN and _HOOK in parts
    listed = parts.get(_LISTED, b"") if kind.endswith("element") else b""
    return Event(kind, table, name, answer.port, answer.body[0], "", hooked, listed)


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")

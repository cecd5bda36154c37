"""Takes tables of the mesh off the host, also while packets go through them.

Owns the name of the stand-in: a table with the same program and elements that forwards while
`table inet mesh` is taken apart and put together anew.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Final

from mesh.dataplane import nfmessages
from mesh.dataplane.nfnetlink import BRIDGE, INET, Refused
from mesh.errors import HostNotReady

if TYPE_CHECKING:
    from mesh.dataplane.nfnetlink import Socket

STAND_IN: Final = f"{nfmessages.TABLE}-stand-in"

_IN_FLIGHT_SECONDS: Final = 0.05
"""A packet that has entered a chain has left it by then."""


def for_stand_in(text: str) -> str:
    """What is said of `table inet mesh`, of the stand-in."""
    return text.replace(f"inet {nfmessages.TABLE}", f"inet {STAND_IN}")


async def retire(netlink: Socket, name: str = nfmessages.TABLE) -> None:
    """Delete a table, if it is there, while another one takes over.  Raises HostNotReady.

    Dormant first: a packet that is still in one of its chains would miss in maps that go at once
    with the table, or with a rule, and be dropped.
    """
    if (INET, name) in nfmessages.tables(netlink):
        netlink.transact([nfmessages.sleep_table(INET, name)])
        await asyncio.sleep(_IN_FLIGHT_SECONDS)
        _delete(netlink, INET, name)


def remove(netlink: Socket) -> None:
    """Delete all our tables, if they are there.  Raises HostNotReady."""
    for family, name in ((INET, nfmessages.TABLE), (BRIDGE, nfmessages.TABLE), (INET, STAND_IN)):
        _delete(netlink, family, name)


def _delete(netlink: Socket, family: int, name: str) -> None:
    try:
        netlink.transact([nfmessages.delete_table(family, name)])
    except Refused as refused:
        if refused.errno != errno.ENOENT:
            raise HostNotReady(f"nftables cannot delete table {name}: {refused.strerror}") from None

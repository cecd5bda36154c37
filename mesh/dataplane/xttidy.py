"""Takes away what iptables-nft leaves behind: tables without a rule, which its programs make again
when they need them.

The kernel refuses to delete here what anybody uses: nothing is lost if a rule comes meanwhile.
"""

from __future__ import annotations

import struct
from contextlib import closing
from typing import Final

from mesh.dataplane.nfnetlink import Message, Socket, attributes, generic, text
from mesh.rules.xtables import TABLES

_NFTABLES: Final = 10 << 8
_DELTABLE, _GETCHAIN, _DELCHAIN = _NFTABLES | 2, _NFTABLES | 4, _NFTABLES | 5
_ONLY_UNUSED: Final = 0x100
"""NLM_F_NONREC: what is inside does not go with it."""

_FAMILIES: Final = (2, 10)
_TABLE, _NAME, _HOOK, _POLICY = 1, 3, 4, 5
_ACCEPT: Final = struct.pack(">I", 1)


def remove_empty() -> None:
    """Delete the tables of iptables-nft whose only chains are built-in ones that accept."""
    with closing(Socket()) as netlink:
        for family in _FAMILIES:
            for table in TABLES:
                try:
                    netlink.transact(_removal(netlink, family, table))
                except OSError:  # it is not there, or has rules
                    continue


def _removal(netlink: Socket, family: int, table: str) -> list[Message]:
    """What deletes a table; nothing if somebody has a chain or a policy of his own there."""
    named = generic(family) + text(_TABLE, table)
    found = []
    for answer in netlink.dump(Message(_GETCHAIN, 0, generic(family))):
        parts = dict(attributes(answer, 4))
        if parts[_TABLE] != table.encode() + b"\0":
            continue
        if _HOOK not in parts or parts.get(_POLICY) != _ACCEPT:
            return []
        name = parts[_NAME].rstrip(b"\0").decode(errors="replace")
        found.append(Message(_DELCHAIN, _ONLY_UNUSED, named + text(_NAME, name)))
    return [*found, Message(_DELTABLE, _ONLY_UNUSED, named)]

"""Holds the mesh's flows back while nobody could say what their marks mean.

Owns `table inet mesh-hold`, which is there only while a node takes other bits of the marks, and
after an agent that was killed while it did.  Never decides when that is (mesh.agent.remark).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.dataplane import command, host, nfmessages
from mesh.dataplane.nfnetlink import INET, Socket
from mesh.model.address import Family, family_of
from mesh.model.publish import PROTOCOLS
from mesh.rules import elements

if TYPE_CHECKING:
    from mesh.rules.elements import Elements

TABLE: Final = "mesh-hold"

_DOUBTFUL: Final = re.compile(r'comment "doubtful 0x([0-9a-f]+)"')
_IP: Final = {Family.V4: "ip", Family.V6: "ip6"}


class Held(NamedTuple):
    """What may not pass: packets of flows that carry one of `bits`, and new flows to `vips` and to
    the ports of `frontends`, which their senders will try again.
    """

    bits: frozenset[int]
    vips: tuple[str, ...]
    frontends: Elements

    def text(self, word: str) -> str:
        """The table for `nft -f`; `word` says how the marks of these flows are.  Pure."""
        marked = [
            f'ct mark & 0x{bit:x} != 0 drop comment "{word} 0x{bit:x}"' for bit in sorted(self.bits)
        ]
        fresh = [f"{_IP[family_of(vip)]} daddr {vip} drop" for vip in self.vips]
        keys = sorted({key[-8:] for name, key in self.frontends if name in elements.FRONTENDS})
        if keys:
            shown = (f"{PROTOCOLS[k[0]].value} . {int.from_bytes(k[4:6], 'big')}" for k in keys)
            fresh.append(f"ct state new meta l4proto . th dport {{ {', '.join(shown)} }} drop")
        chains = "".join(
            f" chain {hook} {{\n  type filter hook {hook} priority -190; policy accept;\n"
            + "".join(f"  {rule}\n" for rule in rules)
            + " }\n"
            for hook, rules in (
                ("prerouting", marked + fresh),
                ("output", marked + fresh),
                ("input", marked),
                ("postrouting", marked),
            )
        )
        return f"table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n{chains}}}\n"


class Hold:
    """The hold of the network namespace it was made in."""

    def __init__(self) -> None:
        self._socket = Socket()

    async def doubtful(self) -> frozenset[int]:
        """Bits of which some flows carry what nobody can tell the meaning of, as somebody was
        killed who rewrote their marks.  Raises CommandFailed.
        """
        if not self._exists():
            return frozenset()
        listed = await command.run("nft", "list", "table", "inet", TABLE)
        return frozenset(int(found, 16) for found in _DOUBTFUL.findall(listed))

    async def begin(self, held: Held) -> None:
        """Hold flows whose marks are about to be rewritten.  Raises HostNotReady, CommandFailed."""
        host.check_program("nft", "nftables")
        await command.run("nft", "-f", "-", input=held.text("doubtful"))

    async def settle(self, held: Held) -> None:
        """Go on holding: the marks are rewritten, all of them.  Raises CommandFailed."""
        await command.run("nft", "-f", "-", input=held.text("settled"))

    def end(self) -> None:
        """Let everything pass."""
        if self._exists():
            self._socket.transact([nfmessages.delete_table(INET, TABLE)])

    def _exists(self) -> bool:
        try:
            return (INET, TABLE) in nfmessages.tables(self._socket)
        except OSError:  # a kernel without nf_tables
            return False

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

"""What a host does with its own bits of the marks, next to the mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from mesh.rules.marks import Layout

_TABLE: Final = """
table inet host {{
 counter lost {{ }}
 chain first {{
  meta mark set meta mark | {packets:#x}
  ct state new ct mark set ct mark | {early:#x}
 }}
 chain look {{
  ct direction reply ct mark set ct mark | {late:#x}
  meta l4proto {{ tcp, udp, sctp }} {which} meta mark & {mask:#x} != {packets:#x} counter name lost
 }}
 chain pre {{ type filter hook prerouting priority -160; jump first; }}
 chain out {{ type filter hook output priority -160; jump first; }}
 chain back {{ type filter hook prerouting priority 0; jump look; }}
 chain own {{ type filter hook output priority 0; jump look; }}
 chain post {{
  type filter hook postrouting priority 400
  meta l4proto {{ tcp, udp, sctp }} {which} meta mark != {packets:#x} counter name lost
 }}
}}
"""


class HostsOwn(NamedTuple):
    """Bits that every new connection gets before the mesh sees it, those that it gets when it is
    answered, and those that every packet gets.
    """

    layout: Layout
    early: int
    late: int
    packets: int

    @staticmethod
    def of(layout: Layout) -> HostsOwn:
        """Something of each kind, for a layout that leaves bits to the host."""
        first, *others = layout.waiting()
        packets = (0x5A5A5A5A | layout.foreign & ~first) & ~layout.packet_mark
        return HostsOwn(layout, first | others[-1], sum(others[:-1]), packets)

    @property
    def kept(self) -> int:
        """What the host has in the ct mark of a connection that was answered."""
        return self.early | self.late

    def text(self, which: str, *, steered: bool) -> str:
        """The host's table for nft.  It counts packets (`which`, in nft's words) whose mark is not
        as the host gave it; where packets are steered, of them what is not in the mesh's field.
        """
        mask = 0xFFFFFFFF & ~self.layout.packet_mark if steered else 0xFFFFFFFF
        return _TABLE.format(**self._asdict(), which=which, mask=mask)


def lost(listed: str) -> int:
    """How many packets that is, in what `nft list counter inet host lost` printed."""
    return int(listed.split("packets ")[1].split(maxsplit=1)[0])

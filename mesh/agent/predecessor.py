"""Whether the rules on this host are such that this agent may take them over.

Only looks, and opens no table that is not there.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from typing import TYPE_CHECKING

from mesh.dataplane import command, nfmessages, xtlegacy
from mesh.dataplane.nfnetlink import INET, Socket
from mesh.errors import HostNotReady
from mesh.model.address import Family
from mesh.rules import edition, xtables

if TYPE_CHECKING:
    from collections.abc import Iterator

_IP = 2


async def check() -> None:
    """Raise HostNotReady if a later version's agent left rules here."""
    refusal = edition.refusal("table inet mesh", _of_nftables())
    for flavour in _flavours():
        found = await _of_iptables(flavour)
        refusal = refusal or edition.refusal(f"iptables-{flavour}", found)
    if refusal is not None:
        raise HostNotReady(refusal)


def _of_nftables() -> int:
    try:
        with closing(Socket()) as netlink:
            if (INET, nfmessages.TABLE) not in nfmessages.tables(netlink):
                return 0
            return edition.of_fingerprint(nfmessages.read_elements(netlink, ["fingerprint"]))
    except OSError:  # no nf_tables, no such set, or no right to look: others say so
        return 0


def _flavours() -> Iterator[str]:
    """The flavours of iptables whose table raw is there."""
    if "raw" in xtlegacy.names(Family.V4):
        yield "legacy"
    try:
        with closing(Socket()) as netlink:
            if (_IP, "raw") in nfmessages.tables(netlink):
                yield "nft"
    except OSError:
        return


async def _of_iptables(flavour: str) -> int:
    program = f"iptables-{flavour}-save"
    if shutil.which(program) is None:
        return 0
    saved = xtables.parse(await command.run(program, "-t", "raw"))
    chains = saved["raw"].chains if "raw" in saved else {}
    return edition.of_canary(xtables.comment(chains.get(xtables.CANARY, ())))

"""Whether the rules on this host are such that one may take them over: whose, and which version's.

Only looks, and opens no table that is not there.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from mesh.dataplane import command, nfmessages, xtlegacy
from mesh.dataplane.nfnetlink import INET, Socket
from mesh.errors import Conflict, HostNotReady
from mesh.model.address import Family
from mesh.rules import edition, owner, xtables

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

_IP = 2


class Found(NamedTuple):
    """What a backend's rules say of themselves."""

    where: str
    edition: int
    owner: int


async def check(own: int = owner.AGENT, *, downgrade: bool = False) -> None:
    """Raise Conflict if somebody but `own` left rules here, and HostNotReady if a later version did
    and it is no `downgrade`.
    """
    found = [each async for each in _all()]
    for each in found:
        refusal = edition.refusal(each.where, each.edition)
        if refusal is not None and not downgrade:
            raise HostNotReady(refusal)
    for each in found:
        if (refusal := owner.refusal(each.where, each.owner, own)) is not None:
            raise Conflict(refusal)


def check_nftables(own: int, netlink: Socket) -> None:
    """The same of nftables alone, which tells in no time, and of whose rules only.

    Raises Conflict.  With a socket that stays: to close one after elements were deleted waits for
    all processors (nft_rcv_nl_event), some 15 ms.
    """
    for each in _of_nftables(netlink):
        if (refusal := owner.refusal(each.where, each.owner, own)) is not None:
            raise Conflict(refusal)


async def owners() -> frozenset[int]:
    """Whose rules there are."""
    return frozenset([each.owner async for each in _all()])


async def _all() -> AsyncIterator[Found]:
    try:
        with closing(Socket()) as netlink:
            there = list(_of_nftables(netlink))
    except OSError:  # a kernel without netfilter's netlink
        there = []
    for found in there:
        yield found
    for flavour in _flavours():
        async for found in _of_iptables(flavour):
            yield found


def _of_nftables(netlink: Socket) -> Iterator[Found]:
    try:
        if (INET, nfmessages.TABLE) in nfmessages.tables(netlink):
            told = nfmessages.read_elements(netlink, ["fingerprint"])
            if told:  # else it is damaged, and anybody may mend it
                whose = owner.of_fingerprint(told)
                yield Found("table inet mesh", edition.of_fingerprint(told), whose)
    except OSError:  # no nf_tables, no such set, or no right to look: others say so
        return


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


async def _of_iptables(flavour: str) -> AsyncIterator[Found]:
    program = f"iptables-{flavour}-save"
    if shutil.which(program) is None:
        return
    saved = xtables.parse(await command.run(program, "-t", "raw"))
    chains = saved["raw"].chains if "raw" in saved else {}
    told = xtables.comment(chains.get(xtables.CANARY, ()))
    if told:
        yield Found(f"iptables-{flavour}", edition.of_canary(told), owner.of_canary(told))

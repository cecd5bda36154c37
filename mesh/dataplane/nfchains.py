"""Other people's chains of nf_tables that filter what comes in or is forwarded.

A table is listed with `nft` only if it has such a chain, and without what its sets hold: others'
sets may be large, or of a kind that this `nft` does not know.  Owns the rules there that have our
comment, which are written only if the operator asked for it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mesh.dataplane import command, hold
from mesh.dataplane.nfmessages import TABLE
from mesh.dataplane.nfnetlink import INET, Message, attributes, generic
from mesh.errors import CommandFailed
from mesh.rules import needs, passage_nft
from mesh.rules.needs import Place

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.dataplane.nfnetlink import Socket
    from mesh.rules.needs import Need
    from mesh.rules.passage import Chains

_GETCHAIN: Final = 10 << 8 | 4
FAMILIES: Final = {INET: "inet", 2: "ip", 10: "ip6"}
_HOOKS: Final = {1: needs.INPUT, 2: needs.FORWARD}
_TABLE, _NAME, _HOOK, _TYPE, _NUMBER = 1, 3, 4, 7, 1
"""Attributes of a chain, and of its hook (linux/netfilter/nf_tables.h)."""

_OURS: Final = (TABLE, hold.TABLE)

_WORD: Final = re.compile(r"[A-Za-z0-9_./\\-]+")
"""Names that nft takes as they are."""


class Hooked(NamedTuple):
    """A base chain: where it is, and which hook calls it."""

    family: str
    table: str
    name: str
    hook: str


def foreign(socket: Socket) -> list[Hooked]:
    """The filter chains of others at the hooks input and forward.  Raises OSError."""
    found = []
    for answer in socket.dump(Message(_GETCHAIN, 0, generic(0))):
        parts = dict(attributes(answer, 4))
        family = FAMILIES.get(answer[0])
        table, kind = _text(parts[_TABLE]), _text(parts.get(_TYPE, b""))
        if family is None or kind != "filter" or (answer[0] == INET and table in _OURS):
            continue
        hook = _HOOKS.get(int.from_bytes(dict(attributes(parts[_HOOK])).get(_NUMBER, b""), "big"))
        if hook is not None:
            found.append(Hooked(family, table, _text(parts[_NAME]), hook))
    return found


@dataclass(frozen=True, slots=True)
class Table:
    """A table of somebody else; `hooked` are its chains that matter."""

    family: str
    table: str
    hooked: tuple[Hooked, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """How people name it."""
        return f"nft table {self.family} {self.table}"

    def places(self) -> list[tuple[str, Place]]:
        """Its base chains, each with the hook that calls it."""
        return [(h.hook, Place("nft", h.family, h.table, h.name)) for h in self.hooked]

    async def read(self) -> Listed:
        """All of it but the contents of sets.  Raises CommandFailed."""
        if not all(map(_WORD.fullmatch, (self.table, *(h.name for h in self.hooked)))):
            raise CommandFailed(f"{self.name} or a chain of it has a name that nft cannot take")
        text = await command.run("nft", "-t", "-j", "list", "table", self.family, self.table)
        try:
            return Listed(self.places(), json.loads(text))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            text = f"{self.name} is listed in a form that is not understood: {error!r}"
            raise CommandFailed(text) from None


def accepting(match: str) -> str:
    """A line of ours that lets pass what matches."""
    return f'{match} accept comment "{needs.COMMENT}"'


class Listed:
    """What `nft -j` printed of a table.

    `chains` are all of it, `foreign` the same without our lines.
    """

    def __init__(self, places: list[tuple[str, Place]], document: dict[str, Any]) -> None:
        self._places = places
        objects = document["nftables"]
        self._handles: dict[str, list[int]] = {}
        theirs = []
        for each in objects:
            rule = each.get("rule", {})
            if rule.get("comment") == needs.COMMENT:
                self._handles.setdefault(rule["chain"], []).append(int(rule["handle"]))
            else:
                theirs.append(each)
        self.chains: Chains = passage_nft.parse({"nftables": objects})
        self.foreign: Chains = passage_nft.parse({"nftables": theirs})

    def count(self, chain: str) -> int:
        """How many lines of ours a chain has."""
        return len(self._handles.get(chain, ()))

    def may_drop(self, _chain: str) -> bool:
        """Whether to ask: always."""
        return True

    async def write(self, needed: Mapping[str, tuple[Need, ...]]) -> bool:
        """Have a line for each need first in its chain, and no other line; whether anything had to
        be written.  Raises CommandFailed.
        """
        commands: list[str] = []
        for hook, place in self._places:
            where = f"{place.family} {place.table} {place.chain}"
            wishes, handles = needed.get(place.chain, ()), self._handles.get(place.chain, [])
            if len(wishes) == len(handles) and not any(
                needs.blocked(place, self.chains, hook, wishes)
            ):
                continue
            commands += (f"delete rule {where} handle {handle}" for handle in handles)
            commands += (f"insert rule {where} {accepting(need.nft)}" for need in wishes)
        if commands:
            await command.run("nft", "-f", "-", input="\n".join([*commands, ""]))
        return bool(commands)


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")

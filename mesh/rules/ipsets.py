"""Elements as ipset's entries and back: frontends, addresses, allow lists.

A frontend's entry carries its mark (skbinfo), so a look-up gives what the nftables map gives.
Pure: text that `ipset restore` reads and `ipset save` prints.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Final

from mesh.model import address
from mesh.model.address import FAMILIES, Family
from mesh.model.publish import PROTOCOLS, Protocol
from mesh.rules import elements

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mesh.rules.elements import ElementKey, Elements
    from mesh.rules.marks import Layout

CANARY: Final = "mesh-canary"
"""A set with one entry: gone when somebody flushes or destroys sets."""

_HALVES: Final = {
    Family.V4: ("0.0.0.0/1", "128.0.0.0/1"),
    Family.V6: ("::/1", "8000::/1"),
}
"""Everything: ipset has no prefix of length 0.  A port of any address is stored as a pair."""

_ALL: Final = {Family.V4: "0.0.0.0/0", Family.V6: "::/0"}

_LIST: Final = re.compile(r"mesh-(allow|grant)([46])-([0-9a-f]+)")
_FAMILY: Final = {Family.V4: "inet", Family.V6: "inet6"}
_TYPES: Final = {
    "vips": "hash:ip,port",
    "hostips": "hash:ip,port",
    "meshports": "hash:net,port",
    "ports": "hash:net,port",
    "nodes": "hash:ip",
    "known": "hash:ip",
    "hairpin": "hash:ip",
}

KEPT: Final = frozenset(f"{name}{f.suffix}" for name in _TYPES for f in FAMILIES)
"""The sets of elements that are ipsets, one to one; each allow list and each grant is one of its
own."""

_GRANTS: Final = frozenset(f"grants{f.suffix}" for f in FAMILIES)


def set_name(name: str) -> str:
    """The ipset that holds a set of elements."""
    return f"mesh-{name}"


def allow_name(family: Family, mark: int) -> str:
    """The ipset of an allow list: the ranges from which the frontends with `mark` are reached."""
    return f"mesh-allow{family.suffix}-{mark:x}"


def grant_name(family: Family, number: int) -> str:
    """The ipset of a grant: the prefixes that it lets in."""
    return f"mesh-grant{family.suffix}-{number:x}"


def is_ours(name: str) -> bool:
    """Whether a set of the host belongs to the mesh."""
    return name == CANARY or name[5:] in KEPT or bool(_LIST.fullmatch(name))


def ours(listed: str) -> set[str]:
    """The names of our sets in what `ipset list -n` printed."""
    return set(filter(is_ours, listed.split()))


def program() -> list[str]:
    """Creates the sets; harmless where they exist."""
    lines = [
        f"create {set_name(name + f.suffix)} {kind} family {_FAMILY[f]} maxelem 1048576"
        + (" skbinfo" if name + f.suffix in elements.FRONTENDS else "")
        for f in FAMILIES
        for name, kind in _TYPES.items()
    ]
    return [*lines, f"create {CANARY} hash:ip", f"add {CANARY} 127.0.0.1"]


def create_list(name: str) -> str:
    """Creates the set of an allow list or a grant."""
    match = _LIST.fullmatch(name)
    assert match is not None
    family = _FAMILY[Family(int(match[2]))]
    return f"create {name} hash:net family {family} maxelem 1048576"


def list_of(key: ElementKey, layout: Layout) -> str | None:
    """The ipset of a prefix of an allow list or a grant; None for other elements."""
    if key[0].startswith("allow"):
        return allow_name(Family(int(key[0][-1])), elements.allow_range(key, layout)[0])
    if key[0] in _GRANTS:
        return grant_name(Family(int(key[0][-1])), elements.grant_range(key)[0])
    return None


def holds(key: ElementKey) -> bool:
    """Whether an element is an entry of a set; others are rules."""
    return key[0].startswith("allow") or key[0] in _GRANTS or key[0] in KEPT


def is_prefix(key: ElementKey, layout: Layout) -> bool:
    """Whether a prefix is one that ipset can hold; others do not come from records."""
    is_grant = key[0] in _GRANTS
    try:
        ipaddress.ip_network(
            (elements.grant_range(key) if is_grant else elements.allow_range(key, layout))[1]
        )
    except ValueError:
        return False
    return True


def additions(key: ElementKey, data: bytes, layout: Layout) -> list[str]:
    """Commands that add an element, or change what it maps to."""
    name, entries = _entries(key, layout)
    told = _mark(elements.mark_of(data), layout) if data else ""
    return [f"add {name} {entry}{told}" for entry in entries]


def _mark(mark: int, layout: Layout) -> str:
    """With affinity the slot count makes room for a draw (xtables.rules), and is kept as a queue's
    number, which nothing reads.
    """
    if not mark & layout.hash:
        return f" skbmark 0x{mark:x}"
    rest = 0xFFFFFFFF & ~layout.slots
    return f" skbmark 0x{mark & rest:x}/0x{rest:x} skbqueue {layout.slots_of(mark)}"


def removals(key: ElementKey, layout: Layout) -> list[str]:
    """Commands that delete an element."""
    name, entries = _entries(key, layout)
    return [f"del {name} {entry}" for entry in entries]


def _entries(key: ElementKey, layout: Layout) -> tuple[str, tuple[str, ...]]:
    name, data = key
    family = Family(int(name[-1]))
    listed = list_of(key, layout)
    if listed is not None:
        is_grant = name in _GRANTS
        _, prefix = elements.grant_range(key) if is_grant else elements.allow_range(key, layout)
        return listed, _HALVES[family] if prefix == _ALL[family] else (prefix,)
    width = family.bits // 8
    if name not in elements.FRONTENDS:
        return set_name(name), (address.unpacked(data[:width]),)
    hosts: tuple[str, ...] = _HALVES[family]
    if len(data) > width + 4:
        hosts, data = (address.unpacked(data[:width]),), data[width:]
    protocol = PROTOCOLS[data[0]].value
    port = int.from_bytes(data[4:6], "big")
    return set_name(name), tuple(f"{host},{protocol}:{port}" for host in hosts)


def parse(text: str, layout: Layout) -> tuple[Elements, set[str]]:
    """The elements in what `ipset save` printed, and the names of our sets."""
    found: Elements = {}
    names: set[str] = set()
    for line in text.splitlines():
        command, name, *words = line.split()
        if not is_ours(name):
            continue
        if command == "create":
            names.add(name)
        elif name == CANARY:
            names.add(f"{CANARY} {words[0]}")
        elif match := _LIST.fullmatch(name):
            found[_list_key(match, words[0], layout)] = b""
        else:
            _parse_entry(found, name[5:], words, layout)
    for name in names:
        if match := _LIST.fullmatch(name):
            _join_halves(found, match, layout)
    return found, names


def is_whole(names: set[str]) -> bool:
    """Whether all sets that the program uses exist, and nobody flushed them."""
    return {*map(set_name, KEPT), CANARY, f"{CANARY} 127.0.0.1"} <= names


def _list_key(listed: re.Match[str], entry: str, layout: Layout) -> ElementKey:
    """The element of an entry; ipset shows a prefix of one address without a length."""
    prefix = entry if "/" in entry else f"{entry}/{Family(int(listed[2])).bits}"
    number = int(listed[3], 16)
    if listed[1] == "grant":
        host, _, length = prefix.partition("/")
        return elements.grant_key(number, host, int(length))
    return elements.allow_key(number, prefix, layout)


def _join_halves(found: Elements, listed: re.Match[str], layout: Layout) -> None:
    """Two halves of a list are everything; one alone is a range like any other."""
    family = Family(int(listed[2]))
    halves = [_list_key(listed, half, layout) for half in _HALVES[family]]
    if all(half in found for half in halves):
        for half in halves:
            del found[half]
        found[_list_key(listed, _ALL[family], layout)] = b""


def _parse_entry(found: Elements, name: str, words: list[str], layout: Layout) -> None:
    host, _, port = words[0].partition(",")
    key = b"" if "/" in host else address.packed(host)
    if not port:
        found[name, key * 2 if name.startswith("hairpin") else key] = b""
        return
    protocol, _, number = port.partition(":")
    key += elements.proto_bytes(Protocol(protocol).number) + elements.port_bytes(int(number))
    options = dict(zip(words[1::2], words[2::2], strict=False))
    mark = int(options.get("skbmark", "0").partition("/")[0], 16)
    slots = int(options.get("skbqueue", 0)) << layout.shift
    found[name, key] = elements.mark_bytes(mark + slots)


def by_use(names: set[str]) -> list[str]:
    """Those of `names` that are sets, such that the first is in use if any is."""
    return [
        *sorted(names & {set_name(name) for name in KEPT}),
        *sorted(filter(_LIST.fullmatch, names)),
        *sorted(names & {CANARY}),
    ]


def lists(names: set[str]) -> set[str]:
    """Those of `names` that are sets of allow lists or grants."""
    return set(filter(_LIST.fullmatch, names))


def sets_of(found: Mapping[ElementKey, bytes], layout: Layout) -> Iterator[str]:
    """The lists that some elements need: of ranges, of marks that are limited, and of doors."""
    for key, data in found.items():
        listed = list_of(key, layout)
        if listed is not None:
            yield listed
        elif key[0] == "limited":
            yield from (allow_name(f, elements.mark_of(key[1])) for f in FAMILIES)
        elif key[0] == "doors":
            number = elements.mark_of(data) >> elements.ID_SHIFT
            yield from (grant_name(f, number) for f in FAMILIES)

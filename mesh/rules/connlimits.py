"""How many connections at a time a client has: what the program has while services limit it.

Each limit that some service has is one chain and two sets of the kernel's own counts (`ct count`,
Linux 4.18), by frontend and client, so that a kernel without them loads the program all the same.
A count cannot be moved to another limit, so one begins with the limit.  Pure.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model import address
from mesh.model.address import FAMILIES, Family

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mesh.rules.marks import Layout

CLIENT6: Final = 64
"""An IPv6 client outside the mesh is a network of this size: a host has all addresses of one."""

SURPLUS: Final = "surplus"
"""The set that counts, by frontend, what was refused."""

_CHAIN: Final = re.compile(r"connlimit_([0-9]+)")
_CLIENTS: Final = 1 << 20
"""How many clients are counted at a time, for each limit; more go uncounted, and pass."""

_MASK6: Final = "ffff:ffff:ffff:ffff::"


class Words(NamedTuple):
    """What the text says about one node: bits of marks, and the mesh's own IPv6 prefixes."""

    layout: Layout
    prefixes6: tuple[str, ...]


def chain(limit: int) -> str:
    """The chain that counts towards a limit."""
    return f"connlimit_{limit}"


def loaded(chains: Iterable[str]) -> frozenset[int]:
    """The limits that have such a chain."""
    return frozenset(int(match[1]) for match in map(_CHAIN.fullmatch, chains) if match)


def added(limits: frozenset[int], known: frozenset[int], words: Words) -> str:
    """The text that adds limits to a program that has those that are `known`."""
    if not limits:
        return ""
    blocks = "".join(
        f"{line}\n" for limit in sorted(limits - known) for line in _counting(limit, words)
    )
    first = "" if known else f"{_SURPLUS_SET}{_surplus(words)}"
    return f"table inet mesh {{\n{first}{blocks}}}\n" + _dispatch(limits | known, words)


def removed(gone: frozenset[int], kept: frozenset[int], words: Words) -> str:
    """The text that takes limits out, of which `kept` are left."""
    text = _dispatch(kept, words)
    for limit in sorted(gone):
        text += f"flush chain inet mesh {chain(limit)}\ndelete chain inet mesh {chain(limit)}\n"
        text += "".join(f"delete set inet mesh {_counts(limit, f)}\n" for f in FAMILIES)
    if not kept:
        text += f"flush chain inet mesh {SURPLUS}\ndelete chain inet mesh {SURPLUS}\n"
        text += f"delete set inet mesh {SURPLUS}\n"
    return text


_SURPLUS_SET: Final = f" set {SURPLUS} {{ typeof ct mark; size {_CLIENTS}; flags dynamic; }}\n"


def _surplus(words: Words) -> str:
    counted = f"update @{SURPLUS} {{ ct mark & 0x{words.layout.id:x} counter }}"
    return f" chain {SURPLUS} {{\n  {counted} goto refuse\n }}\n"


def _counts(limit: int, family: Family) -> str:
    return f"counts{family.suffix}_{limit}"


def _counting(limit: int, words: Words) -> Iterator[str]:
    """The sets and the chain of a limit.  Containers and nodes are told apart by their addresses,
    IPv6 clients elsewhere by their networks.
    """
    frontend = f"ct mark & 0x{words.layout.id:x}"
    for family in FAMILIES:
        ip = "ip" if family is Family.V4 else "ip6"
        key = f"typeof ct mark . {ip} saddr"
        yield f" set {_counts(limit, family)} {{ {key}; size {_CLIENTS}; flags dynamic; }}"
    over = f"ct count over {limit} }} goto {SURPLUS}"
    four, six = (f"add @{_counts(limit, family)} {{ {frontend} ." for family in FAMILIES)
    yield f" chain {chain(limit)} {{"
    yield f"  {four} ip saddr {over}"
    for prefix in words.prefixes6:
        yield f"  ip6 saddr {prefix} {six} ip6 saddr {over}"
    outside = "".join(f"ip6 saddr != {prefix} " for prefix in words.prefixes6)
    yield f"  {outside}{six} ip6 saddr & {_MASK6} {over}"
    yield " }"


def client(host: str, prefixes6: Iterable[str]) -> str:
    """What an address counts as: itself, or a network."""
    if address.family_of(host) is Family.V4 or any(address.contains(p, host) for p in prefixes6):
        return host
    return address.unpacked(address.packed(host)[: CLIENT6 // 8] + bytes(16 - CLIENT6 // 8))


def _dispatch(limits: frozenset[int], words: Words) -> str:
    """The chain that leads to those of limits.  nft takes no number in a key, but what is left of
    a mark of which nothing is left.
    """
    rules = "".join(
        f"  ct mark & 0x{words.layout.id:x} . (ct mark & 0x0 | 0x{limit:x}) @connlimits "
        f"goto {chain(limit)}\n"
        for limit in sorted(limits)
    )
    flushed = "flush chain inet mesh connlimit\n"
    return f"{flushed}table inet mesh {{\n chain connlimit {{\n{rules} }}\n}}\n"

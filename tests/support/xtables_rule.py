"""One rule of iptables, read from its text, against the first packet of a flow.

As the kernel's modules do it (net/netfilter/xt_*.c); for tests.support.xtables_walk.
"""

from __future__ import annotations

import ipaddress
import shlex
import struct
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial, reduce
from operator import xor
from typing import TYPE_CHECKING, Final

from mesh.model import address
from mesh.model.address import Family
from mesh.model.publish import Protocol
from mesh.rules import jhash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Sets = dict[str, dict[str, dict[str, str]]]
    """Entries and their options, by the set's name."""

    Match = Callable[["Flow", Sets], bool]
    Act = Callable[["Flow", Sets], str]

_ALL: Final = 0xFFFFFFFF


@dataclass(slots=True)
class Flow:
    """What the kernel knows of the packet; rules change it."""

    family: Family
    source: str
    destination: str
    protocol: Protocol
    port: int
    iif: str = ""
    oif: str = ""
    ether: str = ""
    local: bool = False
    mark: int = 0
    ct_mark: int = 0
    tracked: bool = True
    target: str = ""
    masqueraded: bool = False
    verdict: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule: what must hold, how often it then counts, and what it does.

    `act` tells how to go on: "goto" and "jump" to `aim`, "return", "continue", "end".
    """

    text: str
    checks: tuple[Match, ...]
    odds: Fraction
    aim: str
    act: Act

    def matches(self, flow: Flow, sets: Sets) -> bool:
        return all(check(flow, sets) for check in self.checks)


@cache
def parse(text: str) -> Rule:
    """Raises KeyError for a word that is not known."""
    words = iter(shlex.split(text))
    checks: list[Match] = []
    odds, module, negated = Fraction(1), "", False
    for word in words:
        if word == "!":
            negated = True
        elif word == "-m":
            module = next(words)
        elif word in ("-j", "-g"):
            aim = next(words)
            return Rule(text, tuple(checks), odds, aim, _action(word, aim, list(words)))
        elif word == "--probability":
            # iptables rounds to units of 2^-31 (libxt_statistic.c: lround).
            odds = Fraction(int(Fraction(next(words)) * (1 << 31) + Fraction(1, 2)), 1 << 31)
        elif (module, word) in _MATCHES or ("", word) in _MATCHES:
            read = _MATCHES.get((module, word)) or _MATCHES["", word]
            check = read(words)
            checks.append(partial(_not, check) if negated else check)
            negated = False
        else:
            _IGNORED[word](words)
    return Rule(text, tuple(checks), odds, "", lambda _flow, _sets: "continue")


def _not(check: Match, flow: Flow, sets: Sets) -> bool:
    return not check(flow, sets)


# ---- matches

_IGNORED: Final[dict[str, Callable[[Iterator[str]], str]]] = {
    "--comment": next,
    "--mode": next,
    "--connlimit-mask": next,
    "--connlimit-saddr": lambda _words: "",
}


def _masked(words: Iterator[str]) -> tuple[int, int]:
    value, _, mask = next(words).partition("/")
    return int(value, 0), int(mask or "0xffffffff", 0)


def _within(name: str, words: Iterator[str]) -> Match:
    network = ipaddress.ip_network(next(words))
    return lambda flow, _sets: ipaddress.ip_address(getattr(flow, name)) in network


def _equals(name: str, words: Iterator[str]) -> Match:
    wanted = next(words)
    return lambda flow, _sets: str(getattr(flow, name)) == wanted


def _ports(words: Iterator[str]) -> Match:
    first, _, last = next(words).partition(":")
    return lambda flow, _sets: int(first) <= flow.port <= int(last or first)


def _protocol(words: Iterator[str]) -> Match:
    wanted = next(words)
    return lambda flow, _sets: flow.protocol.value == wanted


def _marked(name: str, words: Iterator[str]) -> Match:
    value, mask = _masked(words)
    return lambda flow, _sets: getattr(flow, name) & mask == value


def _set(words: Iterator[str]) -> Match:
    name, flags = next(words), next(words)
    return lambda flow, sets: entry(sets[name], flow, flags) is not None


def _state(words: Iterator[str]) -> Match:
    wanted = set(next(words).split(","))

    def check(flow: Flow, _sets: Sets) -> bool:
        held = {"NEW"} if flow.tracked else {"UNTRACKED"}
        return bool(wanted & (held | {"DNAT"} if flow.target else held))

    return check


def _direction(words: Iterator[str]) -> Match:
    wanted = next(words)
    return lambda flow, _sets: flow.tracked and wanted == "ORIGINAL"


def _local(words: Iterator[str]) -> Match:
    assert next(words) == "LOCAL"
    return lambda flow, _sets: flow.local


def _flags(words: Iterator[str]) -> Match:
    looked_at, wanted = next(words).split(","), next(words)
    assert set(looked_at) <= {"SYN", "RST"}, "what else a first packet has is not known here"
    is_syn = wanted == ("SYN" if "SYN" in looked_at else "")
    return lambda flow, _sets: is_syn and flow.protocol is Protocol.TCP


def _never(words: Iterator[str]) -> Match:
    next(words)
    return lambda _flow, _sets: False


def _bytecode(words: Iterator[str]) -> Match:
    count, *listed = next(words).split(",")
    code = [tuple(map(int, each.split())) for each in listed]
    assert len(code) == int(count)
    return lambda flow, _sets: bool(_run(code, _header(flow)))


def _header(flow: Flow) -> bytes:
    """The IP header, as far as addresses are concerned."""
    before = bytes(12 if flow.family is Family.V4 else 8)
    return before + address.packed(flow.source) + address.packed(flow.destination)


def _run(code: list[tuple[int, ...]], packet: bytes) -> int:
    """Classic BPF, of which four instructions occur (linux/filter.h)."""
    accumulator = index = at = 0
    while True:
        operation, if_true, if_false, operand = code[at]
        at += 1
        if operation == 0x20:  # ld [operand]
            (accumulator,) = struct.unpack_from(">I", packet, operand)
        elif operation == 0x07:  # tax
            index = accumulator
        elif operation == 0x1D:  # jeq x
            at += if_true if accumulator == index else if_false
        elif operation == 0x06:  # ret operand
            return operand
        else:
            raise KeyError(operation)


_MATCHES: Final[dict[tuple[str, str], Callable[[Iterator[str]], Match]]] = {
    ("", "-i"): partial(_equals, "iif"),
    ("", "-o"): partial(_equals, "oif"),
    ("", "-s"): partial(_within, "source"),
    ("", "-d"): partial(_within, "destination"),
    ("", "-p"): _protocol,
    ("", "--dport"): _ports,
    ("", "--tcp-flags"): _flags,
    ("", "--icmp-type"): _never,
    ("", "--icmpv6-type"): _never,
    ("mac", "--mac-source"): partial(_equals, "ether"),
    ("mark", "--mark"): partial(_marked, "mark"),
    ("connmark", "--mark"): partial(_marked, "ct_mark"),
    ("set", "--match-set"): _set,
    ("conntrack", "--ctstate"): _state,
    ("conntrack", "--ctdir"): _direction,
    ("addrtype", "--dst-type"): _local,
    ("bpf", "--bytecode"): _bytecode,
    ("connlimit", "--connlimit-above"): _never,  # the client of a first packet has no other
}


def entry(held: dict[str, dict[str, str]], flow: Flow, flags: str) -> dict[str, str] | None:
    """The options of the entry that a packet matches; the longest prefix counts."""
    host = ipaddress.ip_address(flow.source if flags == "src" else flow.destination)
    service = f"{flow.protocol.value}:{flow.port}" if "," in flags else ""
    best: tuple[int, dict[str, str]] | None = None
    for text, options in held.items():
        prefix, _, port = text.partition(",")
        if port != service:
            continue
        network = ipaddress.ip_network(prefix)
        if host in network and (best is None or network.prefixlen > best[0]):
            best = network.prefixlen, options
    return best[1] if best is not None else None


# ---- targets


def _action(word: str, aim: str, words: list[str]) -> Act:
    if aim not in _TARGETS:
        return lambda _flow, _sets: "goto" if word == "-g" else "jump"
    return _TARGETS[aim](words)


def _ends(verdict: str, outcome: str, _words: list[str]) -> Act:
    def act(flow: Flow, _sets: Sets) -> str:
        flow.verdict = verdict
        return outcome

    return act


def _option(words: list[str], name: str, default: str = "") -> str:
    return words[words.index(name) + 1] if name in words else default


def _dnat(words: list[str]) -> Act:
    target = _option(words, "--to-destination")
    host, _, port = target.rpartition(":")

    def act(flow: Flow, _sets: Sets) -> str:
        flow.target, flow.destination, flow.port = target, host.strip("[]"), int(port)
        return "end"

    return act


def _masquerade(_words: list[str]) -> Act:
    def act(flow: Flow, _sets: Sets) -> str:
        flow.masqueraded = True
        return "end"

    return act


def _ct(words: list[str]) -> Act:
    def act(flow: Flow, _sets: Sets) -> str:
        flow.tracked = flow.tracked and "--notrack" not in words
        return "continue"

    return act


def _mark(words: list[str]) -> Act:
    value, mask = _masked(iter([_option(words, "--set-xmark")]))

    def act(flow: Flow, _sets: Sets) -> str:
        flow.mark = flow.mark & ~mask & _ALL ^ value
        return "continue"

    return act


def _connmark(words: list[str]) -> Act:
    """xt_connmark.c: what is written is cleared by its own mask, then XORed."""
    there = int(_option(words, "--nfmask", "0xffffffff"), 0)
    kept = int(_option(words, "--ctmask", "0xffffffff"), 0)
    setting = "--set-xmark" in words
    value, mask = _masked(iter([_option(words, "--set-xmark", "0")]))

    def act(flow: Flow, _sets: Sets) -> str:
        if setting:
            flow.ct_mark = flow.ct_mark & ~mask & _ALL ^ value
        elif "--save-mark" in words:
            flow.ct_mark = flow.ct_mark & ~kept & _ALL ^ flow.mark & there
        else:
            flow.mark = flow.mark & ~there & _ALL ^ flow.ct_mark & kept
        return "continue"

    return act


def _hmark(words: list[str]) -> Act:
    """xt_HMARK.c, for a tuple of the source alone, or of a prefix of it."""
    length = int(_option(words, "--hmark-src-prefix", "128"))
    assert _option(words, "--hmark-tuple", "src") == "src"
    numbers = (int(_option(words, f"--hmark-{name}"), 0) for name in ("mod", "offset", "rnd"))
    modulus, offset, seed = numbers

    def act(flow: Flow, _sets: Sets) -> str:
        network = ipaddress.ip_network(
            f"{flow.source}/{min(length, flow.family.bits)}", strict=False
        )
        packed = network.network_address.packed
        folded = reduce(xor, struct.unpack(f">{len(packed) // 4}I", packed))
        drawn = jhash.jhash(struct.pack("<3I", 0, folded, 0), seed)
        flow.mark = (drawn * modulus >> 32) + offset
        return "continue"

    return act


def _map(words: list[str]) -> Act:
    name, flags = _option(words, "--map-set"), words[words.index("--map-set") + 2]

    def act(flow: Flow, sets: Sets) -> str:
        options = entry(sets[name], flow, flags)
        if options is not None and "--map-mark" in words:
            value, mask = _masked(iter([options.get("skbmark", "0/0")]))
            flow.mark = flow.mark & ~mask & _ALL ^ value
        return "continue"

    return act


def _passes(_words: list[str]) -> Act:
    return lambda _flow, _sets: "continue"


_TARGETS: Final[dict[str, Callable[[list[str]], Act]]] = {
    "ACCEPT": partial(_ends, "", "end"),
    "DROP": partial(_ends, "DROP", "end"),
    "REJECT": partial(_ends, "REJECT", "end"),
    "RETURN": partial(_ends, "", "return"),
    "REDIRECT": partial(_ends, "", "end"),
    "DNAT": _dnat,
    "MASQUERADE": _masquerade,
    "CT": _ct,
    "MARK": _mark,
    "CONNMARK": _connmark,
    "HMARK": _hmark,
    "SET": _map,
    "TCPMSS": _passes,
}

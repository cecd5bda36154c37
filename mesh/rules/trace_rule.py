"""One rule of the program read against the first packet of a flow.

Pure.  Knows the words that program.nft is written in; one that it does not know is a KeyError,
never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model import address
from mesh.model.address import Family
from mesh.rules import jhash, marks, trace_sets, xtables_pools
from mesh.rules.trace_sets import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mesh.rules.marks import Layout
    from mesh.rules.trace_program import Rule
    from mesh.rules.trace_sets import Sets, Value

VERDICTS: Final = frozenset(("accept", "drop", "return", "reject", "redirect", "masquerade"))
AIMED: Final = frozenset(("jump", "goto"))
_IP: Final = {"ip": Family.V4, "ip6": Family.V6}
_NUMBERS: Final = {"tcp": 6, "udp": 17, "sctp": 132, "fin": 1, "syn": 2, "rst": 4}


class Draw(NamedTuple):
    """A slot drawn among `slots` of the pool that `mark` stands for in the map `targets`."""

    targets: str
    mark: int
    slots: int
    slot: int
    hashed: bool


@dataclass(slots=True)
class Flow:
    """What the kernel knows of the packet; rules change it.

    `slot` is the dice of numgen; `by_iptables` says whose hash of a client's address counts, and
    `layout` what marks mean.
    """

    family: Family
    source: bytes
    destination: bytes
    protocol: int
    port: int
    slot: int = 0
    iif: str = ""
    oif: str = ""
    ether: bytes = b""
    local: bool = False
    mark: int = 0
    priority: int = 0
    ct_mark: int = 0
    tracked: bool = True
    translated: bool = False
    draw: Draw | None = None
    by_iptables: bool = False
    layout: Layout = marks.DEFAULT
    held: Mapping[int, int] = field(default_factory=dict)
    """How many connections the client has already, by frontend id."""


class Look(NamedTuple):
    """A look-up: the set, the key in words, and what was found (None: nothing)."""

    name: str
    key: str
    found: int | str | Target | None


@dataclass(slots=True)
class Outcome:
    """What came of a rule: the verdict and the chain it leads to, what it set and looked up."""

    matched: bool = True
    verdict: str = ""
    aim: str = ""
    set: str = ""
    looks: list[Look] = field(default_factory=list)


def read(rule: Rule, flow: Flow, sets: Sets) -> Outcome:
    """Match a rule against a packet, and do to it what the rule says if it matches."""
    reader = _Reader(list(reversed(rule.words)), flow, sets)
    while reader.words and reader.outcome.matched:
        reader.step()
    return reader.outcome


_HOSTS: Final[Mapping[str, Callable[[Flow], bytes]]] = {
    "saddr": lambda flow: flow.source,
    "daddr": lambda flow: flow.destination,
}
_SELECT: Final[Mapping[tuple[str, str], Callable[[Flow], Value | None]]] = {
    ("meta", "l4proto"): lambda flow: flow.protocol,
    ("meta", "nfproto"): lambda flow: f"ipv{flow.family.suffix}",
    ("meta", "mark"): lambda flow: flow.mark,
    ("meta", "priority"): lambda flow: flow.priority,
    ("th", "dport"): lambda flow: flow.port,
    ("tcp", "dport"): lambda flow: flow.port if flow.protocol == 6 else None,
    ("udp", "dport"): lambda flow: flow.port if flow.protocol == 17 else None,
    ("tcp", "flags"): lambda flow: _NUMBERS["syn"] if flow.protocol == 6 else None,
    ("icmp", "type"): lambda _flow: None,
    ("icmpv6", "type"): lambda _flow: None,
    ("ether", "saddr"): lambda flow: flow.ether,
    ("ct", "mark"): lambda flow: flow.ct_mark,
    ("ct", "state"): lambda flow: "new" if flow.tracked else "untracked",
    ("ct", "status"): lambda flow: "dnat" if flow.translated else "confirmed",
    ("ct", "direction"): lambda _flow: "original",
}


class _Reader:
    """The words of a rule from left to right (the next one is the last of the list)."""

    def __init__(self, words: list[str], flow: Flow, sets: Sets) -> None:
        self.words = words
        self.flow = flow
        self.sets = sets
        self.outcome = Outcome()

    def step(self) -> None:
        """One statement or one match; the rule ends where something does not match."""
        word = self.words[-1]
        if word in VERDICTS:
            self.outcome.verdict = word
            self.words.clear()  # "with tcp reset", "fully-random"
        elif word in AIMED:
            self._aim(f"{self.words.pop()} {self.words.pop()}")
        elif word == "notrack":
            self.words.pop()
            self.flow.tracked = False
        elif word == "dnat":
            self._dnat()
        elif word in ("add", "update"):
            self._count()
        elif self.words[-2:-5:-1] == ["option", "maxseg", "size"]:
            self.outcome.set = "TCP MSS = path MTU"
            self.words.clear()
        elif "set" in self.words[-4:-2]:  # "ct mark set", "ct original zone set"
            self._set()
        else:
            self.outcome.matched = self._matches(self._key())

    def _aim(self, text: str) -> None:
        self.outcome.verdict, _, self.outcome.aim = text.partition(" ")

    def _count(self) -> None:
        """A set of counts: nothing is too many, but what the client has already."""
        del self.words[-3:]  # add @counts4_10 {
        words = self._listed()
        if "over" not in words:
            return
        self.outcome.matched = _IP[words[words.index("saddr") - 1]] is self.flow.family
        if self.outcome.matched:
            limit, held = (
                int(words[-1]),
                self.flow.held.get(self.flow.layout.id_of(self.flow.ct_mark), 0),
            )
            self.outcome.looks.append(Look("counts", f"{held} of {limit}", ""))
            self.outcome.matched = held >= limit

    def _dnat(self) -> None:
        del self.words[-3:]  # dnat ip to
        found = self._mapped(self._key())
        if isinstance(found, Target):
            self.flow.destination = address.packed(found.address)
            self.flow.port = found.port
            self.flow.translated = True
            self.outcome.verdict = "dnat"
            self.outcome.set = str(found)
        else:
            self.outcome.matched = False

    def _set(self) -> None:
        what = self.words.pop()
        while (word := self.words.pop()) != "set":
            what += f" {word}"
        key = self._key()
        value = self._mapped(key) if self.words and self.words[-1] == "map" else key[0]
        if value is None:
            self.outcome.matched = False
            return
        if what == "ct mark" and isinstance(value, int):
            self.flow.ct_mark = value
        elif what == "meta mark" and isinstance(value, int):
            self.flow.mark = value
        elif what == "meta priority" and isinstance(value, int):
            self.flow.priority = value
            return  # where the program keeps what it looks up next: nothing for people
        shown = f"0x{value:x}" if isinstance(value, int) else str(value)
        self.outcome.set = f"{what} = {shown}"

    def _key(self) -> tuple[Value | None, ...]:
        parts = [self._term()]
        while self.words and self.words[-1] == ".":
            self.words.pop()
            parts.append(self._term())
        return tuple(parts)

    def _term(self) -> Value | None:
        """A field of the packet, perhaps masked; None if this packet has none."""
        word = self.words.pop()
        if word == "(":
            value = self._term()
            self.words.pop()
        elif word in ("iifname", "oifname"):
            value = self.flow.iif if word == "iifname" else self.flow.oif
        elif word == "fib":
            del self.words[-2:]  # daddr type
            value = "local" if self.flow.local else "unicast"
        elif word in ("numgen", "jhash"):
            value = self._drawn(word)
        elif word in _IP:
            host = _HOSTS[self.words.pop()](self.flow)
            value = host if self.flow.family is _IP[word] else None
        elif word[0].isdigit():
            value = int(word, 0)
        else:
            value = _SELECT[word, self.words.pop()](self.flow)
        while self.words and self.words[-1] in ("&", "|"):
            value = self._masked(value)
        return value

    def _masked(self, value: Value | None) -> Value | None:
        while self.words and self.words[-1] in ("&", "|"):
            sign, operand = self.words.pop(), self.words.pop()
            if operand == "(":
                operand = self.words.pop()
                self.words.pop()
            if isinstance(value, bytes):
                mask = address.packed(operand)
                value = bytes(one & other for one, other in zip(value, mask, strict=True))
            elif isinstance(value, int):
                number = _number(operand)
                value = value & number if sign == "&" else value | number
        return value

    def _drawn(self, kind: str) -> int:
        """The slot: of the dice, or of the client's address."""
        flow, words = self.flow, self.words
        if kind == "numgen":
            del words[-2:]  # random mod
            slots = int(words.pop())
            slot = flow.slot
        else:
            del words[-2:]  # ip saddr
            source = self._masked(flow.source)
            words.pop()  # mod
            slots = int(words.pop())
            words.pop()  # seed
            assert isinstance(source, bytes)
            slot = jhash.slot(source, int(words.pop(), 0), slots)
            if flow.by_iptables:
                slot = xtables_pools.slot_of(address.unpacked(source), flow.ct_mark, flow.layout)
        flow.draw = Draw(words[-2].removeprefix("@"), flow.ct_mark, slots, slot, kind == "jhash")
        return slot

    def _matches(self, key: tuple[Value | None, ...]) -> bool:
        """Compare with what follows."""
        wanted = True
        word = self.words.pop()
        if word in ("!=", "=="):
            wanted, word = word == "==", self.words.pop()
        if word == "vmap":
            self._aim(self._led(key[0]) if self.words[-1] == "{" else str(self._mapped(key) or ""))
            return bool(self.outcome.verdict)
        listed = self._listed() if word == "{" else [word]
        if None in key:
            return False
        if word.startswith("@"):
            return (self._found(word, key) is not None) is wanted
        return any(_equals(key[0], each) for each in listed) is wanted

    def _listed(self) -> list[str]:
        found = []
        while (word := self.words.pop()) != "}":
            found.append(word)
        return found

    def _led(self, key: Value | None) -> str:
        """The verdict of a map that stands in the rule: { "lo" : accept "br0" : goto bridge }."""
        self.words.pop()
        found: dict[str, str] = {}
        name = ""
        for word, follows in pairwise((*self._listed(), "")):
            if follows == ":":
                name = word.strip('"')
                found[name] = ""
            elif word != ":":
                found[name] = f"{found[name]} {word}".lstrip()
        verdict = found.get(str(key), "")
        self.outcome.looks.append(Look("device", str(key), verdict or None))
        return verdict

    def _mapped(self, key: tuple[Value | None, ...]) -> int | str | Target | None:
        """What a map of the table makes of a key."""
        if self.words[-1] == "map":
            self.words.pop()
        name = self.words.pop()
        return self._found(name, key) if None not in key else None

    def _found(self, name: str, key: tuple[Value | None, ...]) -> int | str | Target | None:
        present = tuple(value for value in key if value is not None)
        found = self.sets.find(name[1:], present)
        self.outcome.looks.append(Look(name[1:], trace_sets.shown(name[1:], present), found))
        return found


def _number(word: str) -> int:
    """A constant: a number, or names of bits."""
    if word[0].isdigit():
        return int(word, 0)
    return sum(_NUMBERS[name] for name in word.split("|"))


def _equals(value: Value | None, word: str) -> bool:
    """Whether a field equals a constant; an address, whether it lies in a prefix."""
    if isinstance(value, bytes):
        return address.contains(word, address.unpacked(value))
    if isinstance(value, int):
        return value == _number(word)
    return value in word.strip('"').split(",")

"""An exact walk of first packets through the text that iptables-restore and ipset are given.

Knows nothing of the mesh but where routes lead (Place): chains, sets and marks mean what the
kernel makes of them.  A word that it does not know is a KeyError, never a guess.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model import address
from mesh.model.publish import Protocol
from mesh.rules.trace import Entry, Packet, Path, Verdict
from tests.support import xtables_rule
from tests.support.xtables_rule import Flow

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mesh.model.address import Family
    from mesh.rules.trace import Place
    from tests.support.xtables_rule import Rule, Sets

Chains = dict[str, list["Rule"]]
Stack = tuple[tuple[str, int], ...]
"""Chains, each with the rule that is next there."""

UNIT: Final = Fraction(1, 1 << 31)
"""What the kernel counts the probability of a `statistic` rule in (xt_statistic.h)."""

ROUNDING: Final = Fraction(61, 100) * UNIT
"""How far one rule is from what its ten digits stand for: a tenth of a unit for the digits, which
are within 0.5e-10, and half of one for iptables, which rounds them to whole units."""

_BUILT_IN: Final = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_IN: Final = (("raw", "PREROUTING"), ("mangle", "PREROUTING"), ("nat", "PREROUTING"))
_OWN: Final = (("raw", "OUTPUT"), ("mangle", "OUTPUT"), ("nat", "OUTPUT"))
_HERE: Final = (("filter", "INPUT"),)
_ON: Final = (("mangle", "FORWARD"), ("filter", "FORWARD"))
_OUT: Final = (("mangle", "POSTROUTING"), ("nat", "POSTROUTING"))


class End(NamedTuple):
    """What may become of a packet; `target` is the backend it was translated to."""

    verdict: Verdict
    target: str = ""
    path: Path | None = None
    seen: str = ""


@dataclass
class Host:
    """What the programs made of the text they were given."""

    tables: dict[tuple[Family, str], Chains] = field(default_factory=dict)
    sets: Sets = field(default_factory=dict)

    def restore(self, family: Family, text: str) -> None:
        """What `iptables-restore --noflush` does."""
        chains: Chains = {}
        for line in text.splitlines():
            if line.startswith("*"):
                fresh: Chains = {name: [] for name in _BUILT_IN}
                chains = self.tables.setdefault((family, line[1:]), fresh)
            elif line.startswith(":"):
                chains[line[1:].split()[0]] = []
            elif line != "COMMIT":
                _edit(chains, line)

    def ipset(self, text: str) -> None:
        """What `ipset restore -exist` does."""
        for line in text.splitlines():
            command, name, *words = line.split()
            if command == "create":
                self.sets.setdefault(name, {})
            elif command == "add":
                self.sets[name][words[0]] = dict(zip(words[1::2], words[2::2], strict=True))
            elif command == "del":
                self.sets[name].pop(words[0], None)
            elif command == "flush":
                self.sets[name].clear()
            else:
                raise KeyError(line)

    def walk(self, packet: Packet, place: Place) -> dict[End, Fraction]:
        """Everything that may become of a packet, and how likely that is."""
        found: defaultdict[End, Fraction] = defaultdict(Fraction)
        for end, share in self._walk(packet, place):
            found[end] += share
        return dict(found)

    def pool(self, family: Family, flow_marks: Iterable[int]) -> dict[str, Fraction]:
        """How often each backend is drawn for flows with these marks, all as likely."""
        found: Counter[str] = Counter()
        for mark in flow_marks:
            flow = Flow(family, "", "", Protocol.TCP, 0, ct_mark=mark)
            for ended, share in self._run(self.tables[family, "nat"], "MESH-POOLS", flow):
                found[ended.target] += share  # type: ignore[assignment]
        return {target: Fraction(share, sum(found.values())) for target, share in found.items()}

    def _walk(self, packet: Packet, place: Place) -> Iterator[tuple[End, Fraction]]:
        host, own = packet.destination, packet.entry is Entry.NODE
        begun = Flow(
            family=address.family_of(host),
            source=packet.source,
            destination=host,
            protocol=packet.protocol,
            port=packet.port,
            iif=place.device(packet.entry),
            oif=place.route(host, 0) if own else "",
            ether=packet.ether,
            local=place.is_local(host),
        )
        for flow, share in self._hooks(begun, _OWN if own else _IN):
            flow.local = place.is_local(flow.destination)
            flow.oif = place.route(flow.destination, flow.mark)
            onward = (("filter", "OUTPUT"), *_OUT) if own else (*_ON, *_OUT)
            for ended, part in self._hooks(flow, _HERE if flow.local and not own else onward):
                yield _end(ended, place), share * part

    def _hooks(
        self, flow: Flow, hooks: Iterable[tuple[str, str]]
    ) -> Iterator[tuple[Flow, Fraction]]:
        """Every way through some hooks; a packet that was refused or dropped goes no further."""
        ways = [(flow, Fraction(1))]
        for table, hook in hooks:
            chains = self.tables.get((flow.family, table), {})
            ways = [
                (ended, share * part)
                for each, share in ways
                for ended, part in (
                    [(each, Fraction(1))] if each.verdict else self._run(chains, hook, each)
                )
            ]
        yield from ways

    def _run(self, chains: Chains, name: str, flow: Flow) -> Iterator[tuple[Flow, Fraction]]:
        """Every way through a built-in chain, whose policy is ACCEPT."""
        if name not in chains:
            yield flow, Fraction(1)
            return
        open_ways: list[tuple[Flow, Stack, Fraction]] = [(flow, ((name, 0),), Fraction(1))]
        while open_ways:
            at, stack, share = open_ways.pop()
            if not stack:
                yield at, share
                continue
            (chain, index), rest = stack[-1], stack[:-1]
            if index == len(chains[chain]):
                open_ways.append((at, rest, share))
                continue
            rule, after = chains[chain][index], (*rest, (chain, index + 1))
            if not rule.matches(at, self.sets):
                open_ways.append((at, after, share))
                continue
            if rule.odds < 1:
                open_ways.append((replace(at), after, share * (1 - rule.odds)))
            share *= rule.odds
            outcome = rule.act(at, self.sets)
            if outcome == "goto":
                open_ways.append((at, (*rest, (rule.aim, 0)), share))
            elif outcome == "jump":
                open_ways.append((at, (*after, (rule.aim, 0)), share))
            elif outcome == "return":
                open_ways.append((at, rest, share))
            elif outcome == "continue":
                open_ways.append((at, after, share))
            else:
                yield at, share


def _edit(chains: Chains, line: str) -> None:
    """One command of iptables."""
    command, name, *rest = line.split(" ", 2)
    text = rest[0] if rest else ""
    if command == "-A":
        chains[name].append(xtables_rule.parse(text))
    elif command == "-I":
        number, _, text = text.partition(" ")
        chains[name].insert(int(number) - 1, xtables_rule.parse(text))
    elif command == "-D":
        chains[name].remove(xtables_rule.parse(text))
    elif command == "-F":
        chains[name].clear()
    elif command == "-X":
        del chains[name]
    else:
        raise KeyError(line)


def _end(flow: Flow, place: Place) -> End:
    """Where a packet leaves, and as whose."""
    if flow.verdict:
        return End(Verdict.REFUSED if flow.verdict == "REJECT" else Verdict.DROPPED)
    devices, network = place.parameters.devices, place.parameters.network
    path, own = {
        devices.bridge: (Path.LOCAL, network.gateway(flow.family)),
        devices.overlay: (Path.OVERLAY, network.overlay_address(flow.family)),
        devices.steering: (Path.STEERED, ""),
        "": (Path.UNDERLAY, ""),
    }.get(flow.oif, (Path.NODE, ""))
    seen = flow.source
    if flow.masqueraded:
        itself = path is Path.LOCAL and flow.source == flow.destination
        path, seen = (Path.HAIRPIN if itself else Path.MASQUERADED), own
    verdict = Verdict.FORWARDED if flow.target else Verdict.PASSED
    return End(verdict, flow.target, path, seen)

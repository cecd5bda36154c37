"""Walks the first packet of a flow through the program and its elements, and tells every step.

Pure: the same text that `nft` loads, read rule by rule, so it cannot disagree with the program.
What is not the mesh's (foreign firewalls, the routes themselves) is taken as the agent makes it.
"""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model import address
from mesh.model.address import FAMILIES
from mesh.rules import (
    elements,
    extras,
    trace_program,
    trace_rule,
    trace_sets,
    trace_words,
    xtables_pools,
)
from mesh.rules.trace_sets import Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mesh.model.publish import Protocol
    from mesh.rules.elements import Elements
    from mesh.rules.program import Parameters


class Entry(enum.Enum):
    """Where a packet meets the node."""

    OUTSIDE = "outside"
    """On an interface that is not the mesh's."""
    CONTAINER = "container"
    """On the bridge, from one of the node's own containers."""
    NODE = "node"
    """Nowhere: the node itself sends it."""
    OVERLAY = "overlay"
    """From another node or its containers, by WireGuard."""
    STEERING = "steering"
    """From a client of another node, by the steering device."""


class Packet(NamedTuple):
    """The first packet of a flow.  `ether` is the MAC address of the peer that steered it."""

    source: str
    destination: str
    protocol: Protocol
    port: int
    entry: Entry = Entry.OUTSIDE
    ether: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """A node: its program, what the maps hold, and its addresses beyond those of the mesh.

    `owners` names the service of each frontend id, as far as that is known.  `backend` is what
    drives the node: clients are hashed, and chains are called, as it does.  `held` is how many
    connections the packet's client has, by frontend id.
    """

    parameters: Parameters
    elements: Elements
    addresses: tuple[str, ...]
    owners: Mapping[int, str] = field(default_factory=dict)
    backend: str = "nftables"
    held: Mapping[int, int] = field(default_factory=dict)

    @property
    def by_iptables(self) -> bool:
        """Whether chains of iptables do what the program says."""
        return self.backend != "nftables"

    def is_local(self, host: str) -> bool:
        """Whether the kernel would deliver to the node itself."""
        family, network = address.family_of(host), self.parameters.network
        own = (network.overlay_address(family), network.gateway(family), *self.addresses)
        return host in own or address.is_loopback(host)

    def device(self, entry: Entry) -> str:
        """The device by which a packet comes in, "" for one that is not the mesh's."""
        devices = self.parameters.devices
        return {
            Entry.CONTAINER: devices.bridge,
            Entry.OVERLAY: devices.overlay,
            Entry.STEERING: devices.steering,
        }.get(entry, "")

    def route(self, host: str, mark: int) -> str:
        """The device that leads to an address, "" for one that is not the mesh's."""
        family, devices = address.family_of(host), self.parameters.devices
        if self.is_local(host):
            return "lo"
        if address.contains(self.parameters.network.subnet(family), host):
            return devices.bridge
        prefixes = self.parameters.prefixes[FAMILIES.index(family)]
        if not any(address.contains(prefix, host) for prefix in prefixes):
            return ""
        steered = not ~mark & self.parameters.layout.packet_mark
        return devices.steering if steered else devices.overlay


_HOOKS: Final = ("prerouting", "forward", "postrouting")
_OWN_HOOKS: Final = ("output", "postrouting")


class Verdict(enum.Enum):
    """What becomes of a packet."""

    FORWARDED = "forwarded"
    """Translated to a backend."""
    PASSED = "passed"
    """Not translated: goes where it is addressed to."""
    REFUSED = "refused"
    """Answered with a reset or an ICMP error."""
    DROPPED = "dropped"
    """Lost without a word."""


class Path(enum.Enum):
    """How a packet leaves the program, and with that whose address the other end sees."""

    NODE = "node"
    """To the node itself."""
    LOCAL = "local"
    """To a container of this node; the source is kept."""
    HAIRPIN = "hairpin"
    """To the container it came from, with the bridge's address as source."""
    STEERED = "steered"
    """To another node through the steering device; the source is kept."""
    OVERLAY = "overlay"
    """To another node by WireGuard; the source is one of the mesh, and kept."""
    MASQUERADED = "masqueraded"
    """With this node's address as source."""
    UNDERLAY = "underlay"
    """Out of the mesh; the source is kept."""


class Step(NamedTuple):
    """One rule that mattered: what it asked, in which chain, what came of it, and its text."""

    what: str
    where: str
    outcome: str
    rule: str


class Ending(NamedTuple):
    """What became of the packet and why; `seen` is the source address that the other end sees."""

    verdict: Verdict
    reason: str = ""
    path: Path | None = None
    seen: str = ""


class Answer(NamedTuple):
    """A backend that may be drawn, and what happens then.  `target` None: a slot is missing."""

    target: Target | None
    slots: int
    probability: Fraction
    ending: Ending
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """The walk: `steps` up to where a slot is drawn, or to the end where none is.

    `answers` are the backends this packet may get; `pool` is every backend's share of the slots,
    which with affinity says how many clients it has; `service` is whose frontend it met, if known.
    """

    packet: Packet
    steps: tuple[Step, ...]
    ending: Ending
    answers: tuple[Answer, ...] = ()
    pool: tuple[tuple[Target | None, Fraction], ...] = ()
    service: str | None = None

    @property
    def verdict(self) -> Verdict:
        """What becomes of the packet; of several backends, the best that can happen."""
        return self.ending.verdict

    @property
    def backends(self) -> dict[str, Fraction]:
        """The probability of each backend that would really be reached, by "address:port"."""
        reached = [a for a in self.answers if a.ending.verdict is Verdict.FORWARDED]
        return {str(answer.target): answer.probability for answer in reached}


def walk(packet: Packet, place: Place) -> Trace:
    """Everything that can become of a packet.

    Raises ValueError for a packet that cannot be: two families, or a sender that is not there.
    """
    _check(packet, place)
    needed = extras.needed(place.elements, place.parameters.layout)
    loaded = trace_program.whole(place.parameters, needed)
    sets = trace_sets.Sets(place.elements, loaded)
    first = _Walk(packet, place, loaded, sets)
    ending = first.run()
    service = place.owners.get(place.parameters.layout.id_of(first.flow.ct_mark))
    if first.flow.draw is None:
        return Trace(packet, tuple(first.steps), ending, service=service)
    slots, total = _slots(first.flow.draw, sets), first.flow.draw.slots
    pool = tuple(_shares(first.flow.draw, slots, place))
    if first.flow.draw.hashed:
        slots = {target: of for target, of in slots.items() if first.flow.draw.slot in of}
        total = len(next(iter(slots.values())))
    answers = []
    for target, of in slots.items():
        again = _Walk(packet, place, loaded, sets, of[0])
        ending = again.run()
        steps = tuple(again.steps[first.before_draw :])
        answers.append(Answer(target, len(of), Fraction(len(of), total), ending, steps))
    best = next((a for a in answers if a.ending.verdict is Verdict.FORWARDED), answers[0])
    told = tuple(first.steps[: first.before_draw])
    return Trace(packet, told, best.ending, tuple(answers), pool, service)


def _check(packet: Packet, place: Place) -> None:
    family = address.family_of(packet.source)
    if family is not address.family_of(packet.destination):
        raise ValueError(f"{packet.source} and {packet.destination} are of two families")
    if packet.entry is Entry.STEERING and not packet.ether:
        raise ValueError(
            "a steered packet comes from the steering device of a peer: say which (--via NODE)"
        )
    if packet.entry is Entry.NODE and not place.is_local(packet.source):
        raise ValueError(f"{packet.source} is not an address of the node: it cannot send from it")


def _slots(draw: trace_rule.Draw, sets: trace_sets.Sets) -> dict[Target | None, list[int]]:
    """Which slots of a pool lead to which backend."""
    found: defaultdict[Target | None, list[int]] = defaultdict(list)
    for slot in range(draw.slots):
        target = sets.find(draw.targets, (draw.mark, slot))
        found[target if isinstance(target, Target) else None].append(slot)
    return dict(found)


def _shares(
    draw: trace_rule.Draw, slots: Mapping[Target | None, list[int]], place: Place
) -> Iterator[tuple[Target | None, Fraction]]:
    """Which part of all clients, or of all draws, each backend gets."""
    weights = Counter(range(draw.slots))
    if draw.hashed and place.by_iptables:
        weights = xtables_pools.draws(draw.mark, place.parameters.layout)
    for target, of in slots.items():
        yield target, Fraction(sum(weights[slot] for slot in of), weights.total())


class _Walk:
    """One packet, and the dice it throws."""

    def __init__(
        self,
        packet: Packet,
        place: Place,
        loaded: trace_program.Loaded,
        sets: trace_sets.Sets,
        slot: int = 0,
    ) -> None:
        self.place = place
        self.loaded = loaded
        self.sets = sets
        self.steps: list[Step] = []
        self.before_draw = 0
        self.masqueraded = False
        self._chains: list[str] = []
        self._reason = ""
        self._entry = packet.entry
        self.flow = trace_rule.Flow(
            family=address.family_of(packet.source),
            source=address.packed(packet.source),
            destination=address.packed(packet.destination),
            protocol=packet.protocol.number,
            port=packet.port,
            slot=slot,
            iif=place.device(packet.entry),
            ether=elements.ether_bytes(packet.ether),
            by_iptables=place.by_iptables,
            layout=place.parameters.layout,
            held=place.held,
        )

    def run(self) -> Ending:
        """Through every hook that the packet meets."""
        own = self._entry is Entry.NODE
        for hook in _OWN_HOOKS if own else _HOOKS:
            if own or hook != "postrouting":  # what is forwarded lost its mark, but has its route
                self._route(inward=hook == "prerouting")
            delivered = hook == "forward" and self.flow.local
            ending = self._hook("input" if delivered else hook)
            if ending is not None:
                return ending
            if delivered:
                break
        return self._end()

    def _route(self, *, inward: bool) -> None:
        host = address.unpacked(self.flow.destination)
        self.flow.oif = "" if inward else self.place.route(host, self.flow.mark)

    def _hook(self, hook: str) -> Ending | None:
        for base in self.loaded.hooked(hook):
            self.flow.local = self.place.is_local(address.unpacked(self.flow.destination))
            if base.kind == "nat" and not self.flow.tracked:
                continue
            verdict = self._chain(base.chain)
            if verdict in ("drop", "reject"):
                kind = Verdict.DROPPED if verdict == "drop" else Verdict.REFUSED
                return Ending(kind, self._reason)
            self.masqueraded |= verdict == "masquerade"
        return None

    def _chain(self, name: str) -> str:
        """The verdict that ends a base chain, or "" to go on after the rule that led here."""
        self._chains.append(name)
        try:
            for rule in self.loaded.chains[name]:
                verdict = self._rule(name, rule)
                if verdict == "return":
                    return ""
                if verdict:
                    return verdict
            return ""
        finally:
            self._chains.pop()

    def _rule(self, chain: str, rule: trace_program.Rule) -> str:
        """A rule's verdict, or "" to go on with the next one."""
        drawn = self.flow.draw is not None
        outcome = trace_rule.read(rule, self.flow, self.sets)
        if self.flow.draw is not None and not drawn:
            self.before_draw = len(self.steps)
        self._tell(chain, rule, outcome)
        if not outcome.matched:
            return ""
        if outcome.aim:
            return self._chain(outcome.aim) or ("return" if outcome.verdict == "goto" else "")
        if outcome.verdict in ("drop", "reject"):
            self._reason = trace_words.reason(rule.comment, self._chains)
        return outcome.verdict

    def _tell(self, chain: str, rule: trace_program.Rule, outcome: trace_rule.Outcome) -> None:
        """Keep what a reader would ask about: look-ups, changes and ends, not every jump."""
        looks = outcome.looks
        if not outcome.matched:
            looks = [look for look in looks if trace_words.stem(look.name) in trace_words.TOLD]
            worth = bool(looks)
        else:
            worth = bool(looks or outcome.set or outcome.verdict not in ("", "jump", "return"))
        if worth:
            asked = trace_words.questions(looks, self.flow) or trace_words.brief(rule, outcome)
            answered = trace_words.answer(chain, outcome, self.flow, self.place.owners)
            where = trace_words.chain(chain, self.flow)
            self.steps.append(Step(asked, where, answered, rule.text))

    def _end(self) -> Ending:
        """Where the packet leaves, and as whose."""
        flow, network = self.flow, self.place.parameters.network
        devices = self.place.parameters.devices
        seen = address.unpacked(flow.source)
        path = {
            devices.bridge: Path.LOCAL,
            devices.overlay: Path.OVERLAY,
            devices.steering: Path.STEERED,
            "": Path.UNDERLAY,
        }.get(flow.oif, Path.NODE)
        if self.masqueraded:
            hairpin = path is Path.LOCAL and flow.source == flow.destination
            masters = {
                Path.LOCAL: network.gateway(flow.family),
                Path.OVERLAY: network.overlay_address(flow.family),
            }
            seen = masters.get(path, "")
            path = Path.HAIRPIN if hairpin else Path.MASQUERADED
        if flow.translated:
            return Ending(Verdict.FORWARDED, "", path, seen)
        reason = "nothing of the mesh has this address and port"
        if flow.ct_mark & self.place.parameters.layout.via:
            reason = "it came through another node, and replies go back that way"
        return Ending(Verdict.PASSED, reason, path, seen)

"""The static program of one node: program.nft with its words filled in.

Services never appear in it; they are elements of its sets and maps (mesh.rules.elements).
Pure: text from parameters; the only thing read is the package's own program.nft.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import takewhile
from string import Template
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model import address
from mesh.model.address import FAMILIES, Family
from mesh.model.publish import Protocol
from mesh.rules import connlimits, elements, marks, owner, slots
from mesh.rules.edition import EDITION, SLOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mesh.model.cluster import Cluster, NodeNetwork
    from mesh.rules.marks import Layout

_STATIC_SIZES: Final = 32
"""Pool sizes dispatched on from the start.  More of them do not fit the 208 KB that a transaction
may have in a user namespace (net.core.wmem_max); all 1023 would load in 108 ms (program.md 2)."""

CLOSED: Final = (("127.0.0.0/8",), ("::1",))
"""Where ports of any address do not answer: CVE-2020-8558 is what happens otherwise."""

GUARD: Final = "guard"
"""The chain that is loaded only while policies select some of the node's replicas."""

UNGUARD: Final = f"flush chain inet mesh {GUARD}\ndelete chain inet mesh {GUARD}\n"

LAYOUT_KEYS: Final = (3, 4)
"""Where `fingerprint` has packet_mark and ct_mark, if they are not the default."""

_SEED: Final = 0x6D657368  # the same on every node: a client has one backend, wherever it comes in
_IP: Final = {Family.V4: "ip", Family.V6: "ip6"}
_ICMP_ERRORS: Final = {
    Family.V4: "destination-unreachable, time-exceeded, parameter-problem",
    Family.V6: "destination-unreachable, packet-too-big, time-exceeded, parameter-problem",
}
_DEVICE: Final = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_BASE_CHAIN: Final = re.compile(r"^ chain (\w+) {\n  type .*\n(?:  .*\n)* }\n", re.MULTILINE)


class Devices(NamedTuple):
    """The node's own interfaces: WireGuard, the vxlan that steers replies, the bridge."""

    overlay: str
    steering: str
    bridge: str
    bridge_mac: str


@dataclass(frozen=True, slots=True)
class Parameters:
    """What the program says about one node; pairs hold v4, then v6.

    `prefixes` is everything the mesh owns, `vips` the part that no host has, `layout` what it keeps
    in marks, `closed` the local addresses on which only ports that name them answer.  In each of
    the `segments` hosts reach each other without this node, which has to be seen as the client
    where it leads one of them to another.  `owner` is whose rules these are (mesh.rules.owner).
    Raises ValueError for a name nft might misread.
    """

    devices: Devices
    network: NodeNetwork
    steering_port: int
    prefixes: tuple[tuple[str, ...], ...]
    vips: tuple[tuple[str, ...], ...]
    layout: Layout = marks.DEFAULT
    closed: tuple[tuple[str, ...], ...] = CLOSED
    segments: tuple[tuple[str, ...], ...] = ((), ())
    owner: int = owner.AGENT

    def __post_init__(self) -> None:
        for device in self.devices[:3]:
            if not _DEVICE.fullmatch(device):
                raise ValueError(f"interface name {device!r}: use letters, digits, '_', '.', '-'")
        if not _MAC.fullmatch(self.devices.bridge_mac):
            raise ValueError(f"{self.devices.bridge_mac!r} is not a MAC address in lower case")

    @staticmethod
    def of(
        cluster: Cluster, number: int, devices: Devices, layout: Layout = marks.DEFAULT
    ) -> Parameters:
        """The parameters of node `number`.  Raises ValueError if the cluster has no such node."""
        return Parameters(
            devices=devices,
            network=cluster.network(number),
            steering_port=cluster.steering_port,
            prefixes=tuple(cluster.prefixes(f) for f in FAMILIES),
            vips=tuple((cluster.vips(f),) for f in FAMILIES),
            layout=layout,
        )

    @property
    def free_ports(self) -> str:
        """Source ports for what is masqueraded over UDP: answers to the steering port are lost."""
        port = self.steering_port
        return f"{port + 1}-65535" if port < 1 << 15 else f"1024-{port - 1}"

    def words(self, family: Family) -> dict[str, str]:
        """What the words of program.nft mean; those in capitals are the same in both families."""
        index, ip = FAMILIES.index(family), _IP[family]
        network = self.network
        overlay, subnet = network.overlay_address(family), network.subnet(family)
        outside = [f"{ip} saddr != {p} {ip} daddr != {p}" for p in self.prefixes[index]]
        if family is Family.V4:
            # The kernel refuses ::1 from outside, but not 127.0.0.0/8 where route_localnet is on.
            outside.append("ip daddr != 127.0.0.0/8")
        return {
            "OVERLAY": f'"{self.devices.overlay}"',
            "STEER": f'"{self.devices.steering}"',
            "BRIDGE": f'"{self.devices.bridge}"',
            "MAC": self.devices.bridge_mac,
            "TUNNEL": str(self.steering_port),
            "FREE": self.free_ports,
            "SUBNET4": network.subnet(Family.V4),
            "SUBNET6": network.subnet(Family.V6),
            "ip": ip,
            "f": family.suffix,
            "addr": f"ipv{family.suffix}_addr",
            "icmp": "icmp" if family is Family.V4 else "icmpv6",
            "errors": _ICMP_ERRORS[family],
            "overlay": overlay,
            "subnet": subnet,
            "gateway": network.gateway(family),
            "own": f"{overlay}, {subnet}",
            "loopback": address.LOOPBACK[family],
            "outside": " ".join(outside),
            **_marks(self.layout),
        }


def _marks(layout: Layout) -> dict[str, str]:
    """What the words for bits of the marks mean."""
    bits = {
        "FIELD": layout.packet_mark,
        "REST": 0xFFFFFFFF & ~layout.packet_mark,
        "HOST": layout.foreign,
        "ID": layout.id,
        "SIZE": layout.size,
        "OURS": layout.ours,
        "VIA": layout.via,
        "STAY": layout.stay,
        "ARRIVAL": layout.ours | layout.via,
        "ENDED": layout.ended,
        "DECIDED": layout.via | layout.stay,
        "WAY": layout.ours | layout.via | layout.stay,
        "SETTLED": layout.ours | layout.stay,
    }
    kept = f"ct mark & 0x{layout.foreign:x} | " if layout.foreign else ""
    return {word: f"0x{mask:x}" for word, mask in bits.items()} | {
        "PLAIN": f"{kept}0x{layout.plain:x}"
    }


@dataclass(frozen=True, slots=True)
class Program:
    """The text for one node, and how a loaded copy of it is recognised.

    `guard` is what is added to `inet` while policies select some of the node's replicas, `counting`
    what the text for limits of connections is made from (mesh.rules.extras).
    `schema` changes when sets, hooks or the layout of marks do, which only a new table can have;
    `version` changes with any line.  Both are 32 bits of a SHA-256.
    """

    inet: str
    guard: str
    bridge: str
    schema: int
    version: int
    layout: Layout
    counting: connlimits.Words

    @property
    def text(self) -> str:
        """Everything, as one file for `nft -f`."""
        return self.inet + self.bridge

    @property
    def unhooked(self) -> str:
        """`inet` without its base chains: no packet meets anything of it."""
        return _BASE_CHAIN.sub("", self.inet)

    @property
    def hooks(self) -> str:
        """What `unhooked` lacks; one transaction, so that packets meet all of it at once."""
        blocks = "".join(found[0] for found in _BASE_CHAIN.finditer(self.inet))
        return f"table inet mesh {{\n{blocks}}}\n"

    @property
    def base_chains(self) -> frozenset[str]:
        """The chains that the kernel calls."""
        return frozenset(_BASE_CHAIN.findall(self.inet))

    @property
    def chains(self) -> frozenset[str]:
        """The chains of `table inet mesh`."""
        return frozenset(re.findall(r"^ chain (\w+) {$", self.inet, re.MULTILINE))


def render(parameters: Parameters) -> str:
    """The whole text of a node's program, as `mesh rules show` prints it."""
    return build(parameters).text


@lru_cache(maxsize=4)
def build(parameters: Parameters) -> Program:
    """The program of a node.  Loading it twice changes nothing; elements of services stay.

    Takes some 20 ms the first time.
    """
    layout = parameters.layout
    source = resources.files(__package__).joinpath("program.nft").read_text()
    lines = [line for line in source.splitlines() if line and line.lstrip()[0] != "#"]
    if layout.foreign:
        lines = [line.removeprefix("?") for line in lines]
    else:
        lines = [line for line in lines if line[0] != "?"]
    on_demand = [line[1:] for line in lines if line[0] == "!"]
    lines = [line for line in lines if line[0] != "!"]
    text, guard = (
        "".join(f"{line}\n" for line in _expanded(each, parameters)) for each in (lines, on_demand)
    )
    guard = f"table inet mesh {{\n{guard}}}\n"
    inet, mark, bridge = text.partition("table bridge mesh\n")
    inet += _size_elements(static_sizes(layout), layout)
    declarations = re.findall(r"^ +(?:set|map|type) .*", inet, re.MULTILINE)
    told = ""
    if layout != marks.DEFAULT:
        declarations.append(str(layout))  # elements with marks of another one mean nothing
        fields = zip(LAYOUT_KEYS, (layout.packet_mark, layout.ct_mark), strict=True)
        told = "".join(f", {key} : 0x{mask:x}" for key, mask in fields)
    counting = connlimits.Words(layout, parameters.prefixes[FAMILIES.index(Family.V6)])
    more = guard + connlimits.added(frozenset((1,)), frozenset(), counting)
    schema, version = _digest("\n".join(declarations)), _digest(f"{EDITION} {text}{more}")
    told = f"0 : 0x{schema:x}, 1 : 0x{version:x}{told}, {SLOT} : 0x{EDITION:x}"
    if parameters.owner != owner.AGENT:
        told += f", {owner.SLOT} : 0x{parameters.owner:x}"
    inet += f"add element inet mesh fingerprint {{ {told} }}\n"
    return Program(inet, guard, mark + bridge, schema, version, layout, counting)


@lru_cache(maxsize=8)
def static_sizes(layout: Layout) -> frozenset[int]:
    """Pool sizes dispatched on from the start, as `Layout.size` has them in marks."""
    counts = frozenset(size << layout.shift for size in range(_STATIC_SIZES + 1))
    return counts | {layout.hash | size << layout.shift for size in slots.HASH_SIZES}


def size_chains(sizes: Iterable[int], layout: Layout) -> str:
    """The text that adds pool sizes, as `Layout.size` has them in marks, to the program."""
    wanted = sorted(set(sizes) - {0})
    if not wanted:
        return ""
    fresh = "".join(
        f"add chain inet mesh {name}\nflush chain inet mesh {name}\n"
        for name in (chain(size, layout) for size in wanted)
    )
    chains = "".join(f"{line}\n" for size in wanted for line in _size_chain(size, layout))
    return f"{fresh}table inet mesh {{\n{chains}}}\n{_size_elements(wanted, layout)}"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def chain(size: int, layout: Layout) -> str:
    """The name of the chain that draws a slot among `size`."""
    return f"{'hash' if size & layout.hash else 'random'}_{layout.slots_of(size)}"


def _size_chain(size: int, layout: Layout) -> Iterator[str]:
    """The chain that draws a slot among `size`; each protocol has to be matched for itself."""
    slots_of = layout.slots_of(size)
    mark = f"ct mark & 0x{layout.ct_mark:x}" if layout.foreign else "ct mark"
    yield f" chain {chain(size, layout)} {{"
    for protocol in Protocol:
        for family in FAMILIES:
            ip, end = _IP[family], family.suffix
            draw = f"numgen random mod {slots_of}"
            if size & layout.hash:
                source = _within(family, slots.prefix_length(slots_of, family))
                draw = f"jhash {source} mod {slots_of} seed 0x{_SEED:x}"
            yield (
                f"  meta nfproto ipv{end} meta l4proto {protocol.value} "
                f"dnat {ip} to {mark} . {draw} map @targets{end}"
            )
    yield " }"


def _size_elements(sizes: Iterable[int], layout: Layout) -> str:
    verdicts = ", ".join(
        f"0x{size:x} : jump {chain(size, layout)}" if size else "0 : goto refuse"
        for size in sorted(sizes)
    )
    return f"add element inet mesh sizes {{ {verdicts} }}\n"


def _expanded(lines: Iterable[str], parameters: Parameters) -> Iterator[str]:
    rest = iter(lines)
    for line in rest:
        if line == " $SIZES":
            for size in sorted(static_sizes(parameters.layout) - {0}):
                yield from _size_chain(size, parameters.layout)
        elif line.startswith(" chain") and "$" in line:
            body = list(takewhile(lambda each: each != " }", rest))
            for family in FAMILIES:
                for each in (line, *body, " }"):
                    yield from _of_family(each, parameters, family)
        else:
            yield from dict.fromkeys(
                each for family in FAMILIES for each in _of_family(line, parameters, family)
            )


def _of_family(line: str, parameters: Parameters, family: Family) -> Iterator[str]:
    """The line in one family: once, or for each value of a word that it asks for."""
    words = _words(parameters, family)
    for more in _asked(line, parameters, family):
        yield Template(line).substitute(words, **more)


@lru_cache(maxsize=8)
def _words(parameters: Parameters, family: Family) -> dict[str, str]:
    """For every line the same."""
    return parameters.words(family)


def _asked(line: str, parameters: Parameters, family: Family) -> Iterable[dict[str, str]]:
    """What the words of a line mean that stands more than once in a family."""
    layout, index = parameters.layout, FAMILIES.index(family)
    several = {
        "prefix": parameters.prefixes,
        "vip": parameters.vips,
        "closed": parameters.closed,
        "segment": parameters.segments,
    }
    for word, values in several.items():
        if f"${word}" in line:
            return [{word: value} for value in values[index]]
    if "$within" in line:
        return _lengths(family, layout)
    if "$dport" in line:
        return _BLOCKS
    if "$host" in line:
        places = layout.waiting().items()
        return [{"host": f"0x{bit:x}", "place": f"0x{place:x}"} for bit, place in places]
    if "$bit" in line:
        return [{"bit": f"0x{layout.node(1 << at):x}"} for at in range(marks.NODE_BITS)]
    return [{}]


def _lengths(family: Family, layout: Layout) -> Iterator[dict[str, str]]:
    """Each length as it stands in a key, and the source masked to it."""
    for length in elements.PREFIX_LENGTHS[family]:
        source = _within(family, length)
        yield {
            "length": f"0x{length << layout.shift:x}",
            "cut": f"0x{length:x}",
            "within": f"({source})" if length < family.bits else source,
        }


def _within(family: Family, length: int) -> str:
    """The source, masked to a prefix of a length."""
    source = f"{_IP[family]} saddr"
    if length == family.bits:
        return source
    anywhere = "0.0.0.0" if family is Family.V4 else "::"
    return f"{source} & {ipaddress.ip_network(f'{anywhere}/{length}').netmask}"


_BLOCKS: Final = [
    {"block": f"0x{bits:x}", "dport": f"th dport & 0x{0xFFFF0000 >> bits & 0xFFFF:x}"}
    for bits in reversed(elements.PORT_BITS)
]
"""Each size of the blocks that ports are looked up in: how many bits they have in common."""

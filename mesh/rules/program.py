"""The static program of one node: program.nft with its words filled in.

Services never appear in it; they are elements of its sets and maps (mesh.rules.elements).
Pure: text from parameters; the only thing read is the package's own program.nft.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass
from importlib import resources
from itertools import takewhile
from string import Template
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model.address import FAMILIES, Family
from mesh.rules import elements, marks, slots

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mesh.model.cluster import Cluster, NodeNetwork

STATIC_SIZES: Final = frozenset(range(33)) | {marks.HASH | size for size in slots.HASH_SIZES}
"""Pool sizes dispatched on from the start.  More of them do not fit the 208 KB that a transaction
may have in a user namespace (net.core.wmem_max); all 1023 would load in 108 ms (program.md 2)."""

CLOSED: Final = (("127.0.0.0/8",), ("::1",))
"""Where published ports never answer by default: CVE-2020-8558 is what happens otherwise."""

_SEED: Final = 0x6D657368  # the same on every node: a client has one backend, wherever it comes in
_IP: Final = {Family.V4: "ip", Family.V6: "ip6"}
_ICMP_ERRORS: Final = {
    Family.V4: "destination-unreachable, time-exceeded, parameter-problem",
    Family.V6: "destination-unreachable, packet-too-big, time-exceeded, parameter-problem",
}
_DEVICE: Final = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class Devices(NamedTuple):
    """The node's own interfaces: WireGuard, the vxlan that steers replies, the bridge."""

    overlay: str
    steering: str
    bridge: str
    bridge_mac: str


@dataclass(frozen=True, slots=True)
class Parameters:
    """What the program says about one node; pairs hold v4, then v6.

    `prefixes` is everything the mesh owns, `vips` the part that no host has, `closed` the local
    addresses on which published ports do not answer.  Raises ValueError for a name nft might
    misread.
    """

    devices: Devices
    network: NodeNetwork
    steering_port: int
    prefixes: tuple[tuple[str, ...], ...]
    vips: tuple[tuple[str, ...], ...]
    closed: tuple[tuple[str, ...], ...] = CLOSED

    def __post_init__(self) -> None:
        for device in self.devices[:3]:
            if not _DEVICE.fullmatch(device):
                raise ValueError(f"interface name {device!r}: use letters, digits, '_', '.', '-'")
        if not _MAC.fullmatch(self.devices.bridge_mac):
            raise ValueError(f"{self.devices.bridge_mac!r} is not a MAC address in lower case")

    @staticmethod
    def of(cluster: Cluster, number: int, devices: Devices) -> Parameters:
        """The parameters of node `number`.  Raises ValueError if the cluster has no such node."""
        return Parameters(
            devices=devices,
            network=cluster.network(number),
            steering_port=cluster.steering_port,
            prefixes=tuple(cluster.prefixes(f) for f in FAMILIES),
            vips=tuple((cluster.vips(f),) for f in FAMILIES),
        )

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
            "closed": ", ".join(self.closed[index]),
            "outside": " ".join(outside),
        }


@dataclass(frozen=True, slots=True)
class Program:
    """The text for one node, and how a loaded copy of it is recognised.

    `schema` changes when sets or hooks do, which only a new table can have; `version` changes with
    any line.  Both are 32 bits of a SHA-256.
    """

    inet: str
    bridge: str
    schema: int
    version: int

    @property
    def text(self) -> str:
        """Everything, as one file for `nft -f`."""
        return self.inet + self.bridge

    @property
    def chains(self) -> frozenset[str]:
        """The chains of `table inet mesh`."""
        return frozenset(re.findall(r"^ chain (\w+) {$", self.inet, re.MULTILINE))


def render(parameters: Parameters) -> str:
    """The whole text of a node's program, as `mesh rules show` prints it."""
    return build(parameters).text


def build(parameters: Parameters) -> Program:
    """The program of a node.  Loading it twice changes nothing; elements of services stay."""
    source = resources.files(__package__).joinpath("program.nft").read_text()
    lines = [line for line in source.splitlines() if line and line.lstrip()[0] != "#"]
    # A set of closed addresses may be empty, and nft refuses to add nothing.
    expanded = (each for each in _expanded(lines, parameters) if not each.endswith("{  }"))
    text = "".join(f"{line}\n" for line in expanded)
    inet, mark, bridge = text.partition("table bridge mesh\n")
    inet += _size_elements(STATIC_SIZES)
    declarations = re.findall(r"^ +(?:set|map|type) .*", inet, re.MULTILINE)
    schema, version = _digest("\n".join(declarations)), _digest(text)
    inet += f"add element inet mesh fingerprint {{ 0 : 0x{schema:x}, 1 : 0x{version:x} }}\n"
    return Program(inet, mark + bridge, schema, version)


def size_chains(sizes: Iterable[int]) -> str:
    """The text that adds pool sizes (slot count, with marks.HASH or without) to the program."""
    wanted = sorted(set(sizes) - {0})
    if not wanted:
        return ""
    fresh = "".join(
        f"add chain inet mesh {chain(size)}\nflush chain inet mesh {chain(size)}\n"
        for size in wanted
    )
    chains = "".join(f"{line}\n" for size in wanted for line in _size_chain(size))
    return f"{fresh}table inet mesh {{\n{chains}}}\n{_size_elements(wanted)}"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def chain(size: int) -> str:
    """The name of the chain that draws a slot among `size`."""
    return f"{'hash' if size & marks.HASH else 'random'}_{size & marks.MAX_SLOTS}"


def _size_chain(size: int) -> Iterator[str]:
    """The chain that draws a slot among `size`; each protocol has to be matched for itself."""
    slots_of = size & marks.MAX_SLOTS
    yield f" chain {chain(size)} {{"
    for protocol in ("tcp", "udp"):
        for family in FAMILIES:
            ip, end = _IP[family], family.suffix
            draw = f"numgen random mod {slots_of}"
            if size & marks.HASH:
                draw = f"jhash {ip} saddr mod {slots_of} seed 0x{_SEED:x}"
            yield (
                f"  meta nfproto ipv{end} meta l4proto {protocol} "
                f"dnat {ip} to ct mark . {draw} map @targets{end}"
            )
    yield " }"


def _size_elements(sizes: Iterable[int]) -> str:
    verdicts = ", ".join(
        f"0x{size:x} : jump {chain(size)}" if size else "0 : goto refuse" for size in sorted(sizes)
    )
    return f"add element inet mesh sizes {{ {verdicts} }}\n"


def _expanded(lines: Iterable[str], parameters: Parameters) -> Iterator[str]:
    rest = iter(lines)
    for line in rest:
        if line == " $SIZES":
            for size in sorted(STATIC_SIZES - {0}):
                yield from _size_chain(size)
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
    """The line in one family: once, or for each prefix or length that it asks for."""
    words, index = parameters.words(family), FAMILIES.index(family)
    asked: list[dict[str, str]] = [{}]
    if "$prefix" in line:
        asked = [{"prefix": prefix} for prefix in parameters.prefixes[index]]
    elif "$vip" in line:
        asked = [{"vip": prefix} for prefix in parameters.vips[index]]
    elif "$length" in line:
        asked = list(_lengths(family))
    for more in asked:
        yield Template(line).substitute(words, **more)


def _lengths(family: Family) -> Iterator[dict[str, str]]:
    """Each length as it stands in a key, and the source masked to it."""
    anywhere = "0.0.0.0" if family is Family.V4 else "::"
    for length in elements.PREFIX_LENGTHS[family]:
        source = f"{_IP[family]} saddr"
        if length < family.bits:
            mask = ipaddress.ip_network(f"{anywhere}/{length}").netmask
            source = f"({source} & {mask})"
        yield {"length": f"0x{length:x}", "within": source}

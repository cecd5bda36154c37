"""Elements: the data of the static program, as plain keyed bytes.

An element is `(set name, key bytes) -> data bytes`, in the kernel's own wire layout, so that what
is read back from the kernel compares without parsing.  `describe` is for people.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mesh.model import address
from mesh.model.address import FAMILIES, Family
from mesh.model.publish import PROTOCOLS, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from mesh.rules.marks import Layout

ElementKey = tuple[str, bytes]
Elements = dict[ElementKey, bytes]


@dataclass(frozen=True, slots=True)
class Part:
    """One field of a key or of data: its padded width on the wire and how people read it."""

    name: str
    width: int
    show: Callable[[bytes], str]


def _protocol(data: bytes) -> str:
    known = PROTOCOLS.get(data[0])
    return known.value if known is not None else str(data[0])


ADDRESS: Final = {
    Family.V4: Part("ipv4_addr", 4, address.unpacked),
    Family.V6: Part("ipv6_addr", 16, address.unpacked),
}
PROTO: Final = Part("inet_proto", 4, _protocol)
PORT: Final = Part("inet_service", 4, lambda data: str(int.from_bytes(data[:2], "big")))
MARK: Final = Part("mark", 4, lambda data: f"0x{struct.unpack('=I', data)[0]:x}")
SLOT: Final = Part("slot", 4, lambda data: str(struct.unpack("=I", data)[0]))
GUARD: Final = Part("classid", 4, lambda data: _classid(*struct.unpack("=I", data)))
ETHER: Final = Part("ether_addr", 6, lambda data: data.hex(":"))
ZONE: Final = Part("ct zone", 2, lambda data: str(struct.unpack("=H", data[:2])[0]))


def _classid(value: int) -> str:
    return f"{value >> 16:x}:{value & 0xFFFF:x}"


@dataclass(frozen=True, slots=True)
class SetSpec:
    """A set or map of the program.  `shared` elements may belong to several owners at once."""

    name: str
    key: tuple[Part, ...]
    data: tuple[Part, ...] = ()
    shared: bool = False


def _specs() -> dict[str, SetSpec]:
    specs = [
        SetSpec("via", (ETHER,), (MARK,)),
        SetSpec("zones", (ETHER,), (ZONE,)),
        SetSpec("limited", (MARK,)),
        SetSpec("connlimits", (MARK, SLOT)),
        SetSpec("doors", (GUARD, PROTO, PORT), (GUARD,)),
    ]
    for family in FAMILIES:
        host, end = ADDRESS[family], family.suffix
        specs += [
            SetSpec(f"nodes{end}", (host,), shared=True),
            SetSpec(f"vips{end}", (host, PROTO, PORT), (MARK,)),
            SetSpec(f"hostips{end}", (host, PROTO, PORT), (MARK,)),
            SetSpec(f"meshports{end}", (PROTO, PORT), (MARK,)),
            SetSpec(f"ports{end}", (PROTO, PORT), (MARK,)),
            SetSpec(f"targets{end}", (MARK, SLOT), (host, PORT)),
            SetSpec(f"known{end}", (host,), shared=True),
            SetSpec(f"allow{end}", (MARK, host)),
            SetSpec(f"hairpin{end}", (host, host), shared=True),
            SetSpec(f"guarded{end}", (host,), (GUARD,)),
            SetSpec(f"grants{end}", (GUARD, host)),
        ]
    return {spec.name: spec for spec in specs}


SETS: Final[Mapping[str, SetSpec]] = _specs()
"""Every set the agent writes.  Sets with static contents (own, sizes) are program text."""

FRONTENDS: Final = frozenset(
    f"{name}{family.suffix}"
    for name in ("vips", "hostips", "meshports", "ports")
    for family in FAMILIES
)
"""The maps whose data is a frontend's mark."""

GUARDED: Final = frozenset(f"guarded{family.suffix}" for family in FAMILIES)
"""The maps from a replica that policies select to its guard."""

POLICIES: Final = GUARDED | {"doors"} | {f"grants{family.suffix}" for family in FAMILIES}
"""All that policies come to."""

TARGETS: Final = frozenset(f"targets{family.suffix}" for family in FAMILIES)
"""The maps from such a mark and a slot to a backend."""


SLOT_BYTES: Final = tuple(struct.pack("=I", slot) for slot in range(1024))
"""Every slot as a field, in host order."""

PROTO_BYTES: Final = {protocol: bytes((protocol.number, 0, 0, 0)) for protocol in Protocol}
"""Every protocol as a padded field."""


def proto_bytes(number: int) -> bytes:
    """A protocol number as a padded field."""
    return bytes((number, 0, 0, 0))


port_bytes: Final = struct.Struct(">H2x").pack
"""A port as a padded field."""


def mark_bytes(value: int) -> bytes:
    """A mark as a field, in host order."""
    return struct.pack("=I", value)


def mark_of(data: bytes) -> int:
    """The mark in a field."""
    return int(struct.unpack("=I", data)[0])


PREFIX_LENGTHS: Final = {family: range(0, family.bits + 1, 4) for family in FAMILIES}
"""The lengths of prefixes that the program looks up, one after the other; others are cut."""


def allow_key(bits: int, prefix: str, layout: Layout) -> ElementKey:
    """A range of an allow list: the frontend's id bits and, where pools have their size, the
    prefix's length, and the prefix.

    Hashed: the kernel's interval sets copy themselves at every change, 17 ms at 10 000 ranges.
    """
    host, _, length = prefix.partition("/")
    name = f"allow{address.family_of(prefix).suffix}"
    return name, mark_bytes(bits | int(length) << layout.shift) + address.packed(host)


def allow_range(key: ElementKey, layout: Layout) -> tuple[int, str]:
    """The id bits and the prefix of such an element."""
    mark = mark_of(key[1][:4])
    return mark & layout.id, f"{address.unpacked(key[1][4:])}/{layout.slots_of(mark)}"


def connlimit_key(bits: int, limit: int) -> ElementKey:
    """How many connections at a time one client may have to the frontends with these id bits."""
    return "connlimits", mark_bytes(bits) + mark_bytes(limit)


def connlimit_of(key: bytes) -> tuple[int, int]:
    """The id bits and the limit in such a key."""
    return mark_of(key[:4]), mark_of(key[4:])


def connlimits(found: Iterable[ElementKey]) -> frozenset[int]:
    """The limits that some elements ask for."""
    return frozenset(connlimit_of(key)[1] for name, key in found if name == "connlimits")


PORT_BITS: Final = range(0, 17, 4)
"""How many bits the ports of a block have in common: ranges are cut into such blocks."""

ID_SHIFT: Final = 8
"""Numbers of guards and grants are above the length of a prefix or the bits of a block."""


def door_key(guard: int, protocol: Protocol, port: int, bits: int) -> ElementKey:
    """The block of ports that begins with `port`, behind a guard."""
    head = mark_bytes(guard << ID_SHIFT | bits)
    return "doors", head + PROTO_BYTES[protocol] + port_bytes(port)


def grant_head(grant: int, length: int) -> bytes:
    """What the prefixes of one length that a grant lets in have in common."""
    return mark_bytes(grant << ID_SHIFT | length)


def grant_key(grant: int, host: str, length: int) -> ElementKey:
    """A prefix that a grant lets in."""
    family = Family.V6 if ":" in host else Family.V4
    return f"grants{family.suffix}", grant_head(grant, length) + address.packed(host)


def grant_range(key: ElementKey) -> tuple[int, str]:
    """The number of the grant and the prefix of such an element."""
    head = mark_of(key[1][:4])
    length = head & (1 << ID_SHIFT) - 1
    return head >> ID_SHIFT, f"{address.unpacked(key[1][4:])}/{length}"


def guarded(found: Iterable[ElementKey]) -> bool:
    """Whether some elements are replicas that policies select."""
    return any(name in GUARDED for name, _ in found)


def ether_bytes(mac: str) -> bytes:
    """A MAC address as a key: alone in its set, so not padded."""
    return bytes.fromhex(mac.replace(":", ""))


def zone_bytes(number: int) -> bytes:
    """A conntrack zone as data, in host order."""
    return struct.pack("=H", number)


def _show(parts: tuple[Part, ...], data: bytes) -> str:
    shown, offset = [], 0
    for part in parts:
        shown.append(part.show(data[offset : offset + part.width]))
        offset += part.width
    return " . ".join(shown)


def additions(found: Elements) -> str:
    """The lines that add elements to the table, as nft reads them."""
    listed: dict[str, list[str]] = {}
    for (name, key), data in found.items():
        listed.setdefault(name, []).append(_shown(SETS[name], key, data))
    return "".join(
        f"add element inet mesh {name} {{ {', '.join(each)} }}\n" for name, each in listed.items()
    )


def describe(key: ElementKey, data: bytes | None = None) -> str:
    """An element as nft would print it: "vips4 { 10.1.0.1 . tcp . 80 : 0x10c03 }"."""
    return f"{key[0]} {{ {_shown(SETS[key[0]], key[1], data)} }}"


def _shown(spec: SetSpec, key: bytes, data: bytes | None) -> str:
    shown = _show(spec.key, key)
    if spec.data and data is not None:
        shown += f" : {_show(spec.data, data)}"
    return shown

"""Lowers forwardings to elements of the nftables program.  Pure, and the hot path."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model import address
from mesh.model.address import FAMILIES, Family, family_of, packed
from mesh.model.service import Affinity, Source
from mesh.rules import elements, slots
from mesh.rules.elements import port_bytes
from mesh.rules.forwarding import Scope

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.model.cluster import NodeNetwork
    from mesh.rules.elements import ElementKey, Elements
    from mesh.rules.forwarding import Backend, Forwarding, Frontend
    from mesh.rules.ids import Ids
    from mesh.rules.marks import Layout

_MAPS = {
    Scope.VIP: "vips",
    Scope.HOST_IP: "hostips",
    Scope.INGRESS: "meshports",
    Scope.NODE: "ports",
}


class _Sets(NamedTuple):
    """The names of one family's sets, made once."""

    family: Family
    maps: dict[Scope, str]
    vips: str
    targets: str
    known: str
    hairpin: str


_SETS: Final = tuple(
    _Sets(
        family,
        {scope: name + family.suffix for scope, name in _MAPS.items()},
        *(name + family.suffix for name in ("vips", "targets", "known", "hairpin")),
    )
    for family in FAMILIES
)
"""`_SETS[":" in address]` are those of an address's family."""


def lower(forwarding: Forwarding, ids: Ids) -> Elements:
    """Everything the kernel must hold for one forwarding, in both families."""
    number, layout = ids.of(forwarding.key), ids.layout
    found: Elements = {}
    keys = frontend_keys(forwarding.frontends)
    for is_v6, sets in enumerate(_SETS):
        if keys[is_v6]:
            backends = [b for b in forwarding.backends if (":" in b.address) == is_v6]
            mark, pool = _pool(forwarding, number, backends, layout, sets.family)
            for key in keys[is_v6]:
                found[key] = mark
                if key[0] == sets.vips:
                    found[sets.known, key[1][: elements.ADDRESS[sets.family].width]] = b""
            targets = sets.targets
            for slot, backend in zip(elements.SLOT_BYTES, pool, strict=False):
                found[targets, mark + slot] = packed(backend.address) + port_bytes(backend.port)
    if forwarding.allow:
        _lower_allow(found, forwarding, number, layout)
    if forwarding.limit:
        found[elements.connlimit_key(layout.id_bits(number), forwarding.limit)] = b""
    return found


def frontend_keys(frontends: Iterable[Frontend]) -> tuple[list[ElementKey], list[ElementKey]]:
    """The elements whose data is the mark, of each family."""
    found: tuple[list[ElementKey], list[ElementKey]] = [], []
    for frontend in frontends:
        scope, host = frontend.scope, frontend.address
        key = elements.PROTO_BYTES[frontend.protocol] + port_bytes(frontend.port)
        if host is None:
            for sets, keys in zip(_SETS, found, strict=True):
                keys.append((sets.maps[scope], key))
        else:
            is_v6 = ":" in host
            found[is_v6].append((_SETS[is_v6].maps[scope], packed(host) + key))
    return found


def _pool(
    forwarding: Forwarding, number: int, backends: list[Backend], layout: Layout, family: Family
) -> tuple[bytes, list[Backend]]:
    """The mark of a pool's frontends in one family, and the backend in each of its slots."""
    affine = forwarding.affinity is Affinity.CLIENT_IP
    if affine:
        length = forwarding.prefix.length(family)
        pool = slots.hashed(backends, slots.steps(length, family))
    else:
        pool = slots.weighted(backends)
    stays = forwarding.source is Source.MASQUERADE
    hashed = affine and bool(pool)
    return elements.mark_bytes(layout.frontend(number, len(pool), hashed, stays)), pool


def _lower_allow(found: Elements, forwarding: Forwarding, number: int, layout: Layout) -> None:
    """The allow list, in prefixes of the lengths that the program looks up."""
    bits = layout.id_bits(number)
    found["limited", elements.mark_bytes(bits)] = b""
    for family in FAMILIES:
        for prefix in address.collapse(forwarding.allow, family):
            for part in address.cut(prefix, elements.PREFIX_LENGTHS[family]):
                found[elements.allow_key(bits, part, layout)] = b""


def lower_hairpins(addresses: Iterable[str]) -> Elements:
    """Local replicas, so that one which reaches itself through a frontend gets an answer."""
    return {(_SETS[":" in a].hairpin, packed(a) * 2): b"" for a in addresses}


def lower_nodes(addresses: Iterable[str]) -> Elements:
    """Addresses of nodes: underlay, secondary and overlay."""
    return {(f"nodes{family_of(a).suffix}", packed(a)): b"" for a in addresses}


def lower_peer(network: NodeNetwork, layout: Layout) -> Elements:
    """A peer that may send through the steering device, known by its MAC address."""
    ether = elements.ether_bytes(network.mac)
    return {
        ("via", ether): elements.mark_bytes(layout.arrival(network.number)),
        ("zones", ether): elements.zone_bytes(network.number),
    }


def sizes(delta: Elements, layout: Layout) -> frozenset[int]:
    """The slot counts, HASH bit included, that the frontends among `delta` dispatch on."""
    mask, frontends = layout.size, elements.FRONTENDS
    marks = {data for (name, _), data in delta.items() if name in frontends}
    return frozenset(elements.mark_of(data) & mask for data in marks)


def adopt(forwardings: Iterable[Forwarding], actual: Elements, ids: Ids) -> None:
    """Give each pool the id that one of its frontends has in the kernel already.

    What a restarted agent finds it keeps: same id, same mark, no element to write.
    """
    for forwarding in forwardings:
        for key in chain.from_iterable(frontend_keys(forwarding.frontends)):
            data = actual.get(key)
            if data is not None and ids.adopt(
                forwarding.key, ids.layout.id_of(elements.mark_of(data))
            ):
                break

"""Lowers forwardings to elements of the nftables program.  Pure, and the hot path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model import address
from mesh.model.address import FAMILIES, Family, family_of, packed
from mesh.model.service import Affinity, Source
from mesh.rules import elements, slots
from mesh.rules.elements import port_bytes
from mesh.rules.forwarding import Scope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mesh.model.cluster import NodeNetwork
    from mesh.rules.elements import Elements
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
    targets: str
    known: str
    hairpin: str


_SETS: Final = tuple(
    _Sets(
        family,
        {scope: name + family.suffix for scope, name in _MAPS.items()},
        *(name + family.suffix for name in ("targets", "known", "hairpin")),
    )
    for family in FAMILIES
)


_HAIRPINS: Final = {sets.family: sets.hairpin for sets in _SETS}


def lower(forwarding: Forwarding, ids: Ids) -> Elements:
    """Everything the kernel must hold for one forwarding, in both families."""
    number, layout = ids.of(forwarding.key), ids.layout
    found: Elements = {}
    for sets in _SETS:
        family = sets.family
        frontends = [
            f for f in forwarding.frontends if f.address is None or family_of(f.address) is family
        ]
        if frontends:
            backends = [b for b in forwarding.backends if family_of(b.address) is family]
            mark, pool = _pool(forwarding, number, backends, layout)
            _lower_frontends(found, sets, frontends, mark)
            targets = sets.targets
            for slot, (host, port, _) in zip(elements.SLOT_BYTES, pool, strict=False):
                found[targets, mark + slot] = packed(host) + port_bytes(port)
    if forwarding.allow:
        _lower_allow(found, forwarding, number, layout)
    return found


def _pool(
    forwarding: Forwarding, number: int, backends: list[Backend], layout: Layout
) -> tuple[bytes, list[Backend]]:
    """The mark of a pool's frontends in one family, and the backend in each of its slots."""
    affine = forwarding.affinity is Affinity.CLIENT_IP
    pool = slots.hashed(backends) if affine else slots.weighted(backends)
    stays = forwarding.source is Source.MASQUERADE
    hashed = affine and bool(pool)
    return elements.mark_bytes(layout.frontend(number, len(pool), hashed, stays)), pool


def _lower_frontends(found: Elements, sets: _Sets, frontends: list[Frontend], mark: bytes) -> None:
    for scope, host, protocol, port in frontends:
        key = elements.PROTO_BYTES[protocol] + port_bytes(port)
        if host is not None:
            at = packed(host)
            key = at + key
            if scope is Scope.VIP:
                found[sets.known, at] = b""
        found[sets.maps[scope], key] = mark


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
    return {(_HAIRPINS[family_of(a)], packed(a) * 2): b"" for a in addresses}


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
    mask = layout.size
    return frozenset(
        elements.mark_of(data) & mask
        for (name, _), data in delta.items()
        if name in elements.FRONTENDS
    )


def adopt(forwardings: Iterable[Forwarding], actual: Elements, ids: Ids) -> None:
    """Give each pool the id that one of its frontends has in the kernel already.

    What a restarted agent finds it keeps: same id, same mark, no element to write.
    """
    for forwarding in forwardings:
        for name, key in _frontend_keys(forwarding):
            data = actual.get((name, key))
            if data is not None and ids.adopt(
                forwarding.key, ids.layout.id_of(elements.mark_of(data))
            ):
                break


def _frontend_keys(forwarding: Forwarding) -> Iterator[tuple[str, bytes]]:
    for frontend in forwarding.frontends:
        for family in FAMILIES:
            if frontend.address is None or family_of(frontend.address) is family:
                yield _MAPS[frontend.scope] + family.suffix, _frontend_key(frontend)


def _frontend_key(frontend: Frontend) -> bytes:
    host = b"" if frontend.address is None else packed(frontend.address)
    return host + elements.PROTO_BYTES[frontend.protocol] + port_bytes(frontend.port)

"""Lowers forwardings to elements of the nftables program.  Pure, and the hot path."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from mesh.model import address
from mesh.model.address import FAMILIES, Family
from mesh.model.service import Affinity, Source
from mesh.rules import elements, marks, slots
from mesh.rules.forwarding import Scope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mesh.model.cluster import NodeNetwork
    from mesh.rules.elements import Elements
    from mesh.rules.forwarding import Backend, Forwarding, Frontend
    from mesh.rules.ids import Ids

_MAPS = {
    Scope.VIP: "vips",
    Scope.HOST_IP: "hostips",
    Scope.INGRESS: "meshports",
    Scope.NODE: "ports",
}


def lower(forwarding: Forwarding, ids: Ids) -> Elements:
    """Everything the kernel must hold for one forwarding, in both families."""
    number = ids.of(forwarding.key)
    found: Elements = {}
    for family in FAMILIES:
        frontends = [f for f in forwarding.frontends if _speaks(f, family)]
        if not frontends:
            continue
        backends = [b for b in forwarding.backends if address.family_of(b.address) is family]
        _lower_family(found, forwarding, number, family, frontends, backends)
    if forwarding.allow:
        _lower_allow(found, forwarding, number)
    return found


def _speaks(frontend: Frontend, family: Family) -> bool:
    return frontend.address is None or address.family_of(frontend.address) is family


def _lower_family(
    found: Elements,
    forwarding: Forwarding,
    number: int,
    family: Family,
    frontends: Iterable[Frontend],
    backends: list[Backend],
) -> None:
    affine = forwarding.affinity is Affinity.CLIENT_IP
    pool = slots.hashed(backends) if affine else slots.weighted(backends)
    mark = elements.mark_bytes(
        marks.Mark(
            id=number,
            slots=len(pool),
            hashed=affine and bool(pool),
            stays=forwarding.source is Source.MASQUERADE,
        ).value
    )
    end = family.suffix
    for frontend in frontends:
        key = elements.proto_bytes(frontend.protocol.number) + elements.port_bytes(frontend.port)
        if frontend.address is not None:
            host = address.packed(frontend.address)
            key = host + key
            if frontend.scope is Scope.VIP:
                found["known" + end, host] = b""
        found[_MAPS[frontend.scope] + end, key] = mark
    targets = "targets" + end
    for slot, backend in enumerate(pool):
        found[targets, mark + elements.mark_bytes(slot)] = address.packed(
            backend.address
        ) + elements.port_bytes(backend.port)


def _lower_allow(found: Elements, forwarding: Forwarding, number: int) -> None:
    """The allow list: collapsed, for the kernel refuses nested ranges (program.md section 5)."""
    bits = marks.id_bits(number)
    found["limited", elements.mark_bytes(bits)] = b""
    for family in FAMILIES:
        for prefix in address.collapse(forwarding.allow, family):
            network = ipaddress.ip_network(prefix)
            mark = bits.to_bytes(4, "big")
            key = mark + network[0].packed + mark + network[-1].packed
            found["allow" + family.suffix, key] = b""


def lower_hairpins(addresses: Iterable[str]) -> Elements:
    """Local replicas, so that one which reaches itself through a frontend gets an answer."""
    return {
        (f"hairpin{address.family_of(a).suffix}", address.packed(a) * 2): b"" for a in addresses
    }


def lower_nodes(addresses: Iterable[str]) -> Elements:
    """Addresses of nodes: underlay, secondary and overlay."""
    return {(f"nodes{address.family_of(a).suffix}", address.packed(a)): b"" for a in addresses}


def lower_peer(network: NodeNetwork) -> Elements:
    """A peer that may send through the steering device, known by its MAC address."""
    ether = elements.ether_bytes(network.mac)
    return {
        ("via", ether): elements.mark_bytes(marks.via(network.number)),
        ("zones", ether): elements.zone_bytes(network.number),
    }


def sizes(delta: Elements) -> frozenset[int]:
    """The slot counts, HASH bit included, that the frontends among `delta` dispatch on."""
    return frozenset(
        elements.mark_of(data) & marks.SIZE_MASK
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
                forwarding.key, marks.parse(elements.mark_of(data)).id
            ):
                break


def _frontend_keys(forwarding: Forwarding) -> Iterator[tuple[str, bytes]]:
    for frontend in forwarding.frontends:
        for family in FAMILIES:
            if _speaks(frontend, family):
                yield _MAPS[frontend.scope] + family.suffix, _frontend_key(frontend)


def _frontend_key(frontend: Frontend) -> bytes:
    host = b"" if frontend.address is None else address.packed(frontend.address)
    return (
        host + elements.proto_bytes(frontend.protocol.number) + elements.port_bytes(frontend.port)
    )

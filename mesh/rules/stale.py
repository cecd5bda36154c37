"""Which conntrack entries must be forgotten after a change, because they keep UDP clients where
nothing serves them any more.  Pure.

A UDP flow is as long as its client keeps sending, and is translated as its first packet was.  So it
stays with a backend that left the pool, with a port that is published no longer, or, where it
began before the port was published, with nobody.  TCP and SCTP connections are left alone, they
drain; but for those that were never answered, and never will be.

Only the node that translates a flow has to forget it.  Behind another node (VIA) the replica's node
sees client and replica as they are; nothing is pinned there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model.publish import Protocol
from mesh.rules import elements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mesh.delta import Delta
    from mesh.rules.elements import ElementKey, Elements
    from mesh.rules.marks import Layout

Endpoint = tuple[bytes, int]
"""An address in network byte order, empty for any, and a port."""

_LASTING: Final = frozenset((Protocol.TCP.number, Protocol.SCTP.number))
_UDP: Final = Protocol.UDP.number


class Flow(NamedTuple):
    """One conntrack entry.  `backend` is where replies come from."""

    mark: int
    protocol: int
    source: Endpoint
    destination: Endpoint
    backend: Endpoint
    bare: bool
    """Neither answered nor translated."""
    handle: bytes
    """What tells the kernel which entry this is.  Hardly ever does a later one have the same."""
    answered: bool = True
    """Whether anything ever came back."""
    live: bool = True
    """Whether a connection still carries anything: not refused, nor closed by both ends."""


class Stale(NamedTuple):
    """UDP flows to forget: all that carry `mark` under `mask`, and match the rest where given."""

    mark: int
    mask: int
    destination: Endpoint | None = None
    backend: Endpoint | None = None
    bare: bool = False


class _Served(NamedTuple):
    """What there is of one frontend id: where clients send to, and who answers."""

    frontends: frozenset[Endpoint]
    backends: frozenset[Endpoint]


def after(
    delta: Delta[ElementKey, bytes], held: Callable[[int], Elements], layout: Layout
) -> tuple[Stale, ...]:
    """What to forget once `delta` is in force.  `held(id)` has the elements that there are now of a
    frontend id, with others of the same service or not; none if the id is free again.
    """
    backends, frontends = _gone(delta, layout)
    found: list[Stale] = []
    for bits in backends.keys() | frontends.keys():
        now = _served(held(layout.id_of(bits)), bits, layout)
        closed = frontends.get(bits, set()) - now.frontends
        left = backends.get(bits, set()) - now.backends
        mark = bits | layout.ours
        if now.frontends and now.backends:
            found += (Stale(mark, layout.flows, destination=each) for each in sorted(closed))
            found += (Stale(mark, layout.flows, backend=each) for each in sorted(left))
        elif closed or (left and now.frontends):
            found.append(Stale(mark, layout.flows))
    bare = Stale(0, layout.untranslated, bare=True)
    found += (bare._replace(destination=each) for each in _opened(delta))
    return tuple(found)


def among(flows: Iterable[Flow], held: Callable[[int], Elements], layout: Layout) -> Iterator[Flow]:
    """Those of our UDP flows that nothing serves, whatever became of the change that left them."""
    translated = layout.ours | layout.via
    known: dict[int, _Served] = {}
    for flow in flows:
        bits = flow.mark & layout.id
        if flow.protocol != _UDP or flow.mark & translated != layout.ours or not bits:
            continue
        now = known.get(bits)
        if now is None:
            now = known[bits] = _served(held(layout.id_of(bits)), bits, layout)
        anywhere = (b"", flow.destination[1])
        published = flow.destination in now.frontends or anywhere in now.frontends
        if not published or flow.backend not in now.backends:
            yield flow


def stranded(
    flows: Iterable[Flow], held: Callable[[int], Elements], layout: Layout
) -> Iterator[Flow]:
    """TCP and SCTP connections that were never answered, by a backend that left: they cannot drain.

    Forgotten, the next SYN or INIT of the same client goes to a backend that is there.  Kept, it
    would wait for nobody as long as the entry does, a SYN two minutes
    (nf_conntrack_tcp_timeout_syn_sent).
    """
    known: dict[int, frozenset[Endpoint]] = {}
    for flow in flows:
        bits = flow.mark & layout.id
        if flow.answered or flow.protocol not in _LASTING or not bits:
            continue
        if bits not in known:
            known[bits] = _served(held(layout.id_of(bits)), bits, layout).backends
        if flow.backend not in known[bits]:
            yield flow


def chosen(flows: Iterable[Flow], stale: Iterable[Stale]) -> Iterator[Flow]:
    """Those of `flows` that are meant by any of `stale`."""
    wanted = frozenset(stale)
    kinds = {(each.mask, each.bare) for each in wanted}
    for flow in flows:
        if flow.protocol != _UDP:
            continue
        for mask, bare in kinds:
            if bare and not flow.bare:
                continue
            mark = flow.mark & mask
            for destination in (None, flow.destination, (b"", flow.destination[1])):
                for backend in (None, flow.backend):
                    if Stale(mark, mask, destination, backend, bare) in wanted:
                        yield flow


def _gone(
    delta: Delta[ElementKey, bytes], layout: Layout
) -> tuple[dict[int, set[Endpoint]], dict[int, set[Endpoint]]]:
    """By id bits: backends that lost a slot, and UDP frontends that changed."""
    slots: dict[bytes, set[bytes]] = {}
    backends: dict[int, set[Endpoint]] = {}
    frontends: dict[int, set[Endpoint]] = {}
    for (name, key), data in delta.remove.items():
        if name in elements.TARGETS:
            slots.setdefault(key[:4], set()).add(data)
        elif name in elements.FRONTENDS and key[-8] == _UDP:
            frontends.setdefault(_bits(data, layout), set()).add(_frontend(key))
    for mark, targets in slots.items():
        backends.setdefault(_bits(mark, layout), set()).update(map(_backend, targets))
    return backends, frontends


def _opened(delta: Delta[ElementKey, bytes]) -> Iterator[Endpoint]:
    """UDP frontends that were nobody's: a flow that began before has its destination unchanged."""
    for element in delta.add:
        name, key = element
        if name in elements.FRONTENDS and key[-8] == _UDP and element not in delta.remove:
            yield _frontend(key)


def by_id(held: Elements, layout: Layout) -> dict[int, Elements]:
    """Targets and frontends by their frontend id."""
    found: dict[int, Elements] = {}
    for (name, key), data in held.items():
        if name in elements.TARGETS or name in elements.FRONTENDS:
            mark = key[:4] if name in elements.TARGETS else data
            found.setdefault(layout.id_of(elements.mark_of(mark)), {})[name, key] = data
    return found


def _served(held: Elements, bits: int, layout: Layout) -> _Served:
    frontends: set[Endpoint] = set()
    backends: set[Endpoint] = set()
    for (name, key), data in held.items():
        if name in elements.TARGETS:
            if _bits(key[:4], layout) == bits:
                backends.add(_backend(data))
        elif name in elements.FRONTENDS and key[-8] == _UDP and _bits(data, layout) == bits:
            frontends.add(_frontend(key))
    return _Served(frozenset(frontends), frozenset(backends))


def _bits(mark: bytes, layout: Layout) -> int:
    return elements.mark_of(mark) & layout.id


def _frontend(key: bytes) -> Endpoint:
    """Address, if there is one, and port of a frontend's key: address, protocol, port."""
    return key[:-8], int.from_bytes(key[-4:-2], "big")


def _backend(data: bytes) -> Endpoint:
    return data[:-4], int.from_bytes(data[-4:-2], "big")

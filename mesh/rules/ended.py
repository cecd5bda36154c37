"""Which connections lead to replicas that drain, as one node's conntrack entries show them.  Pure.

Two nodes may know of a connection: the one that translates it (its mark has a frontend id) and,
behind that, the replica's own (VIA).  Each ends what it knows of; the client's side hears of it
from the first, the replica's side from the second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mesh.model.publish import Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from mesh.rules.marks import Layout
    from mesh.rules.stale import Endpoint, Flow

Name = tuple[str, str]
"""A service and its task."""

_LASTING = frozenset((Protocol.TCP.number, Protocol.SCTP.number))


class Leaving(NamedTuple):
    """A replica that drains: its addresses in network byte order, and how long it may (seconds).

    `arrivals` are the endpoints of this node at which what comes through other nodes is for it, and
    for nobody else.  `host_ports` says whether connections of host mode drain too.
    """

    addresses: frozenset[bytes]
    drain: float
    arrivals: frozenset[Endpoint]
    host_ports: bool


class Established(NamedTuple):
    """The connections of one replica: translated here, and arrived through other nodes."""

    translated: list[Flow]
    arrived: list[Flow]


def connections(
    flows: Iterable[Flow],
    leaving: Mapping[Name, Leaving],
    pool: Callable[[int], str | None],
    layout: Layout,
) -> dict[Name, Established]:
    """What each replica has left of connections that were not ended yet, by either side or here.

    `pool` gives the key of the pool that has a frontend id.  UDP is not among them: such flows move
    on as soon as the rules change (mesh.rules.stale).
    """
    found = {name: Established([], []) for name in leaving}
    for flow in flows:
        if flow.protocol not in _LASTING or not flow.live or layout.is_ended(flow.mark):
            continue
        if flow.mark & layout.via:
            for name in _arrived(flow, leaving):
                found[name].arrived.append(flow)
        elif flow.mark & layout.id:
            owner = _owner(flow, leaving, pool(layout.id_of(flow.mark)))
            if owner is not None:
                found[owner].translated.append(flow)
    return found


def _arrived(flow: Flow, leaving: Mapping[Name, Leaving]) -> Iterator[Name]:
    for name, one in leaving.items():
        if flow.backend in one.arrivals:
            yield name


def _owner(flow: Flow, leaving: Mapping[Name, Leaving], key: str | None) -> Name | None:
    if key is None:
        return None
    service, *rest = key.split("/")
    for name, one in leaving.items():
        if name[0] == service and flow.backend[0] in one.addresses:
            return name if one.host_ports or "host" not in rest[2:3] else None
    return None

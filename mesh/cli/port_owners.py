"""Who has the ingress ports that a service asks for.  Reads only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from mesh import errors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.cli.options import Session
    from mesh.model.selector import Selector
    from mesh.model.service import ServiceSpec
    from mesh.store.protocol import Compare, KeyValue

_ONE_BY_ONE: Final = 16
"""Ingress ports that are looked up one after the other; of more, all there are are read at once."""


class _Wanted(NamedTuple):
    """A port: what asks for it, and whether other services may have it on other nodes."""

    what: str
    shared: bool


async def free(session: Session, spec: ServiceSpec) -> list[Compare]:
    """Conditions that say nobody else owns the spec's ingress ports.  Raises Conflict."""
    from mesh.model.allocation import PortAllocation
    from mesh.store import schema
    from mesh.store.protocol import MAX_OPERATIONS, Compare

    wanted = _wanted(session, spec)
    held = await _held(session, wanted.keys())
    for key in wanted.keys() & held.keys():
        holder = schema.decode(key, held[key].value, PortAllocation).service
        if holder != spec.name:
            raise errors.Conflict(
                f"{wanted[key].what} belongs to service {holder!r}; choose another port, or remove "
                "it there"
            )
    await _check_shares(session, spec, wanted)
    fresh = [key for key in wanted.keys() - held.keys() if not wanted[key].shared]
    return [Compare(key, 0) for key in fresh][: MAX_OPERATIONS - 1]


def _wanted(session: Session, spec: ServiceSpec) -> dict[str, _Wanted]:
    """The ports by the key of who has them on all nodes."""
    from mesh.model.publish import Protocol, PublishMode

    keys, shared = session.keys, bool(spec.publish_on)
    wanted = {
        keys.port_allocation(port.protocol.value, port.published): _Wanted(
            f"--publish: ingress port {port.published}/{port.protocol.value}", shared
        )
        for port in spec.ports
        if port.mode is PublishMode.INGRESS and port.published is not None
    }
    if spec.local_health_port:
        key = keys.port_allocation(Protocol.TCP.value, spec.local_health_port)
        wanted[key] = _Wanted(f"--local-health-port: port {spec.local_health_port}/tcp", False)
    return wanted


async def _held(session: Session, wanted: Iterable[str]) -> dict[str, KeyValue]:
    keys = list(wanted)
    if len(keys) > _ONE_BY_ONE:
        return {item.key: item for item in (await session.store.list(session.keys.ports)).items}
    return {key: item for key in keys if (item := await session.store.get(key)) is not None}


async def _check_shares(session: Session, spec: ServiceSpec, wanted: dict[str, _Wanted]) -> None:
    """Raises Conflict for a port that another service has on a node that the spec selects."""
    from mesh.cli import world
    from mesh.model import selector

    shares = [item.key for item in (await session.store.list(session.keys.shares)).items]
    if not wanted or not shares:
        return
    prefix, whole = session.keys.shares, session.keys.ports
    rivals = [key.removeprefix(prefix).rpartition("/") for key in shares]
    rivals = [each for each in rivals if whole + each[0] in wanted and each[2] != spec.name]
    if not rivals:
        return
    seen = await world.read(session)
    for place, _, service in rivals:
        view = seen.state.service_view(service)
        theirs: Selector = view.spec.selector if view is not None else ()
        common = [
            node
            for node in sorted(seen.nodes, key=world.natural)
            if selector.matches(theirs, seen.state.nodes.traits(node))
            and selector.matches(spec.selector, seen.state.nodes.traits(node))
        ]
        if common:
            raise errors.Conflict(
                f"{wanted[whole + place].what} belongs to service {service!r} on "
                f"{', '.join(common)}; choose another port, or other nodes with --publish-on"
            )

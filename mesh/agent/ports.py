"""Published ports by the names that people know them under.  Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.model import address
from mesh.model.publish import Protocol, PublishMode
from mesh.rules.traffic import Port

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from mesh.rules.elements import ElementKey
    from mesh.rules.traffic import Entrance

    Ingress = Mapping[str, Collection[tuple[int, int]]]
    """Of services whose ingress ports answer on a replica's node only: protocols and ports."""

INGRESS, HOST, VIP = PublishMode.INGRESS.value, PublishMode.HOST.value, "vip"

_NAMES = {protocol.number: protocol.value for protocol in Protocol}


def named(vips: Iterable[str], pool: str, entrance: Entrance) -> Port:
    """The port by which flows of a pool came in ("service/target/protocol", mesh.rules); `vips`
    are the prefixes that hold every VIP.
    """
    service, _, rest = pool.partition("/")
    destination = address.unpacked(entrance.destination)
    if any(address.contains(prefix, destination) for prefix in vips):
        mode = VIP
    else:
        mode = HOST if "/host/" in rest else INGRESS
    return Port(service, mode, _NAMES[entrance.protocol], entrance.port)


def published(
    frontends: Callable[[], Iterable[tuple[ElementKey, str]]], local: Ingress
) -> set[Port]:
    """The ports of this node that lead somewhere, or are refused at once, but for VIPs."""
    found = set()
    for (name, key), service in frontends():
        if name[:4] == "vips":
            continue
        protocol, port = key[-8], int.from_bytes(key[-4:-2], "big")
        is_ingress = name[:4] == "mesh" or (protocol, port) in local.get(service, ())
        found.add(Port(service, INGRESS if is_ingress else HOST, _NAMES[protocol], port))
    return found

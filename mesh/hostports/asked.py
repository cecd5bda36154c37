"""The ports that somebody asks for, in the shapes that orchestrators have them in.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from mesh.errors import BadUsage
from mesh.model import publish_syntax
from mesh.model.mapping import PortMapping
from mesh.model.publish import Protocol, PublishedPort, PublishMode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Asked = str | PublishedPort | PortMapping | Mapping[str, object]
"""A text as `--publish` takes it, which may be a range ("8080:80", "53:53/udp", "80",
"192.0.2.1:8000-8003:80-83"); a port; one that was published before; or a record: Compose's long
syntax, or an entry of CNI's portMappings."""

_CNI: Final = {
    "hostPort": "published",
    "containerPort": "target",
    "protocol": "protocol",
    "hostIP": "hostIP",
}


def ports(asked: Iterable[Asked]) -> tuple[PublishedPort, ...]:
    """One port for each that is asked for, in order.  Raises BadUsage."""
    return tuple(port for each in asked for port in _of(each))


def _of(asked: Asked) -> Iterator[PublishedPort]:
    try:
        match asked:
            case PublishedPort():
                yield asked
            case str():
                yield from publish_syntax.parse(asked, PublishMode.HOST)
            case PortMapping():
                yield PublishedPort(
                    target=asked.container_port,
                    published=asked.host_port,
                    protocol=asked.protocol,
                    host_ip=asked.host_ip or None,
                )
            case Mapping():
                yield _of_record(asked)
            case _:
                raise ValueError(f"{asked!r} is no port: write {publish_syntax.SHORT}")
    except ValueError as error:  # msgspec's too
        raise BadUsage(
            f"port {asked!r}: {error}" if isinstance(asked, Mapping) else str(error)
        ) from None


def _of_record(record: Mapping[str, object]) -> PublishedPort:
    known: dict[str, Any] = dict(record)
    if "containerPort" in known:
        strange = known.keys() - _CNI.keys()
        if strange:
            raise ValueError(f"unknown key {min(strange)!r}: use {', '.join(_CNI)}")
        known = {_CNI[key]: value for key, value in known.items()}
    if isinstance(known.get("protocol"), str):
        known["protocol"] = Protocol(known["protocol"])
    if known.get("hostIP") == "":
        del known["hostIP"]
    return msgspec.convert(known, PublishedPort)

"""The texts that published ports are written in: the short syntax of Swarm and Warren, and the long
one of Swarm and Compose.  Ranges become single ports here; records know no ranges.  Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model.address import parse_address
from mesh.model.names import check_name
from mesh.model.publish import PORTS, Protocol, PublishedPort, PublishMode

if TYPE_CHECKING:
    from collections.abc import Iterable

SHORT: Final = "[hostIP:][published[-end]:]target[-end][/tcp|udp|sctp]"
LONG: Final = "target=,published=,protocol=,mode=,host_ip=,name="

_PROTOCOLS: Final = "tcp, udp or sctp"
_KEYS: Final = {key: key for key in ("target", "published", "protocol", "mode", "host_ip", "name")}
_ALIASES: Final = {**_KEYS, "hostip": "host_ip", "host-ip": "host_ip"}
"""Keys in lower case; `hostIP` is how records and CNI spell it."""

_RANGE: Final = re.compile(r"([0-9]+)(?:-([0-9]+))?", re.ASCII)
_HOST: Final = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]+)):([^:]*:[^:]*)")
_FIELD: Final = re.compile(r'(?:"((?:[^"]|"")*)"|([^",]*))(?:,|$)')


@dataclass(frozen=True, slots=True)
class _Parts:
    """What either syntax says, as text; None where it says nothing.  `spec` is the whole of it."""

    spec: str
    target: str
    published: str | None = None
    protocol: str | None = None
    mode: str | None = None
    host_ip: str | None = None
    name: str | None = None


def parse(spec: str, mode: PublishMode) -> tuple[PublishedPort, ...]:
    """The ports that one text asks for; `mode` is that of a text without.  Raises ValueError.

    A long text has a "=", a short one has not.
    """
    parts = _parse_long(spec) if "=" in spec else _parse_short(spec)
    targets, published = _pair(parts)
    try:
        return tuple(
            PublishedPort(
                target=target,
                published=number,
                protocol=_protocol(parts),
                mode=_mode(parts, mode),
                host_ip=_host_ip(parts),
                name=_name(parts),
                random=_is_random(parts),
            )
            for target, number in zip(targets, published, strict=False)
        )
    except _Refused:
        raise
    except ValueError as error:
        raise _refused(parts, str(error)) from None


class Chosen(NamedTuple):
    """Ports that are there, named by their target, and by the published port if that is given."""

    spec: str
    targets: range
    published: range | None
    protocol: Protocol

    def includes(self, port: PublishedPort) -> bool:
        """Whether a port is one of them."""
        if (port.target not in self.targets) or port.protocol is not self.protocol:
            return False
        return self.published is None or port.published in self.published


def parse_chosen(spec: str) -> Chosen:
    """What `--publish-rm` names: `80`, `80/udp`, or as it was published.  Raises ValueError."""
    parts = _parse_long(spec) if "=" in spec else _parse_short(spec)
    published = None
    if parts.published is not None and not _is_random(parts):
        published = _range(parts, parts.published, "published port")
    return Chosen(spec, _range(parts, parts.target, "target port"), published, _protocol(parts))


class _Refused(ValueError):
    """Says which text it is about."""


def _refused(parts: _Parts, reason: str) -> _Refused:
    return _Refused(f"{parts.spec!r}: {reason}")


# ---- the two syntaxes


def _parse_short(spec: str) -> _Parts:
    whole = _Parts(spec, "")
    rest, slash, protocol = spec.partition("/")
    if "/" in protocol:
        raise _refused(whole, f"more than one '/'; write {SHORT}")
    host, rest = _split_host(whole, rest)
    published, _, target = rest.rpartition(":")
    if not target:
        raise _refused(whole, f"no target port; write {SHORT}")
    return _Parts(
        spec,
        target,
        published=published or None,
        protocol=protocol if slash else None,
        host_ip=host,
    )


def _split_host(whole: _Parts, text: str) -> tuple[str | None, str]:
    """The host address, if there is one, and what follows it."""
    if match := _HOST.fullmatch(text):
        return match[1] or match[2], match[3]
    if text.count(":") > 2 and not text.startswith("["):
        raise _refused(whole, "an IPv6 host address stands in brackets, as in [::1]:8080:80")
    if text.startswith("[") or "." in text.partition(":")[0]:
        raise _refused(
            whole,
            "behind a host address come published and target port, as in 127.0.0.1:8080:80, or "
            "127.0.0.1::80 for a dynamic port",
        )
    return None, text


def _parse_long(spec: str) -> _Parts:
    whole = _Parts(spec, "")
    found: dict[str, str] = {}
    for field in _fields(whole):
        key, equals, value = field.partition("=")
        name = _ALIASES.get(key.strip().lower())
        if not equals:
            raise _refused(whole, f"field {field!r} has no value; write {LONG}")
        if name is None:
            raise _refused(whole, f"unknown field {key!r}; there are {', '.join(_KEYS)}")
        if name in found:
            raise _refused(whole, f"field {key!r} is given twice")
        found[name] = value.strip()
    parts = _Parts(spec, **{"target": "", **found})
    _protocol(parts)  # a field that is wrong is told before one that is missing
    _mode(parts, PublishMode.HOST)
    if parts.published is not None and not _is_random(parts):
        _range(parts, parts.published, "published port")
    if "target" not in found:
        raise _refused(whole, "no target port; target= is the one field that has to be there")
    return parts


def _fields(whole: _Parts) -> Iterable[str]:
    """The fields of one CSV record (RFC 4180), as Go and so Swarm reads it."""
    text, at = whole.spec, 0
    while at <= len(text):
        match = _FIELD.match(text, at)
        if match is None:
            column = text.index('"', at) + 1
            raise _refused(
                whole, f"a stray quote in column {column}; quotes go around a whole field"
            )
        yield match[2] if match[1] is None else match[1].replace('""', '"')
        if match.end() == len(text) and not match[0].endswith(","):
            return
        at = match.end()


# ---- the parts


def _pair(parts: _Parts) -> tuple[Iterable[int], Iterable[int | None]]:
    """Targets and published ports that belong together."""
    targets = _range(parts, parts.target, "target port")
    if parts.published is None or _is_random(parts):
        return targets, repeat(None)
    published = _range(parts, parts.published, "published port")
    if len(targets) == len(published):
        return targets, published
    if len(targets) == 1:
        return repeat(targets[0]), published
    raise _refused(
        parts,
        f"published {parts.published} and target {parts.target} are ranges of different lengths "
        f"({len(published)} and {len(targets)}); make them equal, or give one target",
    )


def _range(parts: _Parts, text: str, what: str) -> range:
    match = _RANGE.fullmatch(text)
    if match is not None:
        low, high = (int(number[:6]) for number in (match[1], match[2] or match[1]))
        if low in PORTS and high in PORTS and low <= high:
            return range(low, high + 1)
    allowed = "1-65535, or a range like 8000-8010"
    if what == "published port":
        allowed += "; leave it out for a dynamic port"
    raise _refused(parts, f"invalid {what} {text!r}: write {allowed}")


def _is_random(parts: _Parts) -> bool:
    return parts.published is not None and parts.published.lower() == "random"


def _protocol(parts: _Parts) -> Protocol:
    text = "tcp" if parts.protocol is None else parts.protocol
    try:
        return Protocol(text)
    except ValueError:
        raise _refused(parts, f"invalid protocol {text!r}: choose {_PROTOCOLS}") from None


def _mode(parts: _Parts, default: PublishMode) -> PublishMode:
    if parts.mode is None:
        return default
    try:
        return PublishMode(parts.mode.lower())
    except ValueError:
        raise _refused(parts, f"invalid mode {parts.mode!r}: choose host or ingress") from None


def _host_ip(parts: _Parts) -> str | None:
    if parts.host_ip is None:
        return None
    text = parts.host_ip
    try:
        return parse_address(text[1:-1] if text[:1] + text[-1:] == "[]" else text)
    except ValueError as error:
        raise _refused(
            parts, f"invalid host address: {error}; IPv6 is written in brackets"
        ) from None


def _name(parts: _Parts) -> str | None:
    return check_name(parts.name, "port name") if parts.name is not None else None

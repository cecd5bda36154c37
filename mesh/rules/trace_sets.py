"""Look-ups in the sets and maps of a node, as the kernel would make them.  Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mesh.model import address
from mesh.rules import elements

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mesh.rules.elements import Elements, Part, SetSpec
    from mesh.rules.trace_program import Loaded

Value = int | bytes | str
"""A mark, port, slot or protocol; an address; a word."""


class Target(NamedTuple):
    """What `targets` leads to."""

    address: str
    port: int

    def __str__(self) -> str:
        shown = f"[{self.address}]" if ":" in self.address else self.address
        return f"{shown}:{self.port}"


class Sets:
    """The elements of services and nodes, and those that stand in the program's text."""

    def __init__(self, known: Elements, loaded: Loaded) -> None:
        self._elements = known
        self._static = loaded.static

    def find(self, name: str, key: tuple[Value, ...]) -> int | str | Target | None:
        """What an element maps to ("" for a member of a set), or None if there is none.

        A set that is declared but that nobody fills is empty.
        """
        if name in self._static:
            return _in_text(self._static[name], key[0])
        spec = elements.SETS.get(name)
        if spec is None:
            return None
        packed = encoded(spec, key)
        data = self._elements.get((name, packed))
        return _decoded(spec, data) if data is not None else None


_ENCODE: Final[Mapping[Part, Callable[[Any], bytes]]] = {
    **dict.fromkeys((*elements.ADDRESS.values(), elements.ETHER), bytes),
    elements.PROTO: elements.proto_bytes,
    elements.PORT: elements.port_bytes,
    elements.MARK: elements.mark_bytes,
    elements.GUARD: elements.mark_bytes,
    elements.SLOT: elements.mark_bytes,
}


_NUMBERS: Final = (elements.MARK, elements.GUARD)


def encoded(spec: SetSpec, key: tuple[Value, ...]) -> bytes:
    """The key of an element."""
    return b"".join(_ENCODE[part](value) for part, value in zip(spec.key, key, strict=True))


def shown(name: str, key: tuple[Value, ...]) -> str:
    """A key in the words that nft uses for it."""
    spec = elements.SETS.get(name)
    if spec is None:
        return " . ".join(map(_plain, key))
    pairs = zip(spec.key, key, strict=True)
    return " . ".join(part.show(_ENCODE[part](value)) for part, value in pairs)


def _plain(value: Value) -> str:
    if isinstance(value, bytes):
        return address.unpacked(value)
    return f"0x{value:x}" if isinstance(value, int) else value


def _decoded(spec: SetSpec, data: bytes) -> int | str | Target:
    match spec.data:
        case ():
            return ""
        case (part,):
            return elements.mark_of(data) if part in _NUMBERS else part.show(data)
        case (host, port):
            return Target(host.show(data[: host.width]), int(port.show(data[host.width :])))
    raise ValueError(f"{spec.name}: data of {len(spec.data)} fields")


def _in_text(listed: Mapping[str, str], value: Value) -> str | None:
    """A look-up in elements of the text: prefixes of addresses, or numbers and what they lead to"""
    if isinstance(value, bytes):
        host = address.unpacked(value)
        return "" if any(address.contains(prefix, host) for prefix in listed) else None
    return next((data for number, data in listed.items() if int(number, 0) == value), None)

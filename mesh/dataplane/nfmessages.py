"""The nf_tables messages the mesh needs, packed and parsed by hand (linux/netfilter/nf_tables.h).

By hand because it is 20 times faster than a general library, and a change of one replica should
cost microseconds.  Never sends anything itself except to read.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from mesh.dataplane.nfnetlink import (
    BRIDGE,
    CREATE,
    HEADER_SIZE,
    INET,
    Message,
    attribute,
    attributes,
    generic,
    nested,
    text,
)
from mesh.rules.elements import MARK, SETS, SetSpec, mark_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mesh.dataplane.nfnetlink import Socket
    from mesh.rules.elements import ElementKey, Elements

K = TypeVar("K")

TABLE: Final = "mesh"

_SUBSYSTEM: Final = 10 << 8
_NEWTABLE, _GETTABLE, _DELTABLE = _SUBSYSTEM | 0, _SUBSYSTEM | 1, _SUBSYSTEM | 2
_GETGEN = _SUBSYSTEM | 16
_GETCHAIN, _GETRULE = _SUBSYSTEM | 4, _SUBSYSTEM | 7
_NEWSETELEM, _GETSETELEM, _DELSETELEM = _SUBSYSTEM | 12, _SUBSYSTEM | 13, _SUBSYSTEM | 14
_KEY, _DATA = 1, 2
_NESTED: Final = 0x8000
_ELEMENTS: Final = 3
_EXPRESSION: Final = 7
_PACKETS: Final = 2
_DUMP_ATTEMPTS: Final = 20
_LIST_BYTES: Final = 60_000  # an attribute's length has 16 bits

_LENGTH: Final = struct.Struct("=H")
_ONE: Final = struct.Struct("=HHHHHH")
_HALF: Final = struct.Struct("=HHHH")


class Layout:
    """How the elements of one set look on the wire: constant bytes around key and data."""

    def __init__(self, spec: SetSpec) -> None:
        self.key = sum(part.width for part in spec.key)
        self.data = sum(part.width for part in spec.data)
        self._key_pad, data_pad = b"\0" * (-self.key & 3), b"\0" * (-self.data & 3)
        keys = 8 + self.key + len(self._key_pad)
        whole = 4 + keys + (8 + self.data + len(data_pad) if self.data else 0)
        start = (keys, _KEY | _NESTED, self.key + 4, 1)
        self._head_add = _ONE.pack(whole, 1 | _NESTED, *start)
        self._head_remove = _ONE.pack(4 + keys, 1 | _NESTED, *start)
        self._middle = self._key_pad
        if self.data:
            size = 8 + self.data + len(data_pad)
            self._middle += _HALF.pack(size, _DATA | _NESTED, self.data + 4, 1)
        self._data_pad = data_pad
        self._value = 12 + self.key + len(self._key_pad) + 8
        row = f"=H10x{self.key}s{len(self._middle)}x{self.data}s{len(data_pad)}x"
        self._row = struct.Struct(row)
        self._name = spec.name
        self.head = generic(INET) + text(1, TABLE) + text(2, spec.name)

    def add(self, key: bytes, data: bytes) -> bytes:
        """An element to add."""
        return self._head_add + key + self._middle + data + self._data_pad

    def remove(self, key: bytes) -> bytes:
        """An element to delete: the kernel wants its key alone."""
        return self._head_remove + key + self._key_pad

    def parse(self, listed: bytes) -> Iterable[tuple[ElementKey, bytes]]:
        """A list of elements, as the kernel dumps it.

        Those of ours all have one length, and are taken apart in one go.
        """
        name, row = self._name, self._row
        if len(listed) % row.size == 0:
            rows = list(row.iter_unpack(listed))
            if {length for length, _, _ in rows} <= {row.size}:
                return [((name, key), data) for _, key, data in rows]
        return self._parse_each(listed)

    def _parse_each(self, listed: bytes) -> Iterator[tuple[ElementKey, bytes]]:
        start, end = 0, len(listed)
        while start < end:
            key, value = start + 12, start + self._value
            yield (self._name, listed[key : key + self.key]), listed[value : value + self.data]
            start += _length(listed, start) + 3 & ~3


def _length(data: bytes, start: int) -> int:
    length: int = _LENGTH.unpack_from(data, start)[0]
    return length


_FINGERPRINT: Final = SetSpec("fingerprint", (MARK,), (MARK,))
LAYOUTS: Final = {spec.name: Layout(spec) for spec in (_FINGERPRINT, *SETS.values())}


class Chunk(msgspec.Struct, frozen=True):
    """A message with the elements of one set that it adds or removes."""

    message: Message
    name: str
    keys: Sequence[bytes]

    def culprit(self, offset: int | None) -> ElementKey | None:
        """The element at `offset` in the message, or the only one there is."""
        if len(self.keys) == 1:
            return self.name, self.keys[0]
        if offset is None:
            return None
        position = HEADER_SIZE + len(LAYOUTS[self.name].head) + 4
        for (_, element), key in zip(
            attributes(self.message.body, position - 16), self.keys, strict=True
        ):
            if position <= offset < position + len(element) + 4:
                return self.name, key
            position += len(element) + 4 + 3 & ~3
        return None


def additions(name: str, items: Sequence[tuple[bytes, bytes]]) -> list[Chunk]:
    """The messages that add elements, (key, data) each, to a set."""
    add = LAYOUTS[name].add
    keys = [key for key, _ in items]
    return _chunks(_NEWSETELEM, CREATE, name, keys, [add(key, data) for key, data in items])


def removals(name: str, keys: Sequence[bytes]) -> list[Chunk]:
    """The messages that delete elements from a set."""
    remove = LAYOUTS[name].remove
    return _chunks(_DELSETELEM, 0, name, keys, [remove(key) for key in keys])


def _chunks(
    kind: int, flags: int, name: str, keys: Sequence[bytes], parts: list[bytes]
) -> list[Chunk]:
    """One message, or as many as it takes: the elements of a set are all of one size."""
    head = LAYOUTS[name].head
    most = _LIST_BYTES // len(parts[0]) if parts else 1
    return [
        Chunk(
            Message(kind, flags, head + nested(_ELEMENTS, b"".join(parts[start : start + most]))),
            name,
            keys[start : start + most],
        )
        for start in range(0, len(parts), most)
    ]


def delete_table(family: int, name: str = TABLE) -> Message:
    """The message that deletes a table of ours in one family."""
    return Message(_DELTABLE, 0, generic(family) + text(1, name))


def sleep_table(family: int, name: str = TABLE) -> Message:
    """The message that makes a table dormant: whole, but no packet goes there."""
    dormant = attribute(2, struct.pack(">I", 1))
    return Message(_NEWTABLE, 0, generic(family) + text(1, name) + dormant)


def read_elements(socket: Socket, names: Iterable[str]) -> Elements:
    """What the sets `names` hold.  Raises OSError (ENOENT: no such set)."""
    found: Elements = {}
    for name in names:
        found.update(_read_set(socket, name, LAYOUTS[name].parse))
    return found


def read_some(socket: Socket, keys: Iterable[ElementKey]) -> Elements:
    """Those of some elements that are there, 10 microseconds each.  Raises OSError."""
    found: Elements = {}
    for name, key in keys:
        layout = LAYOUTS[name]
        body = layout.head + nested(_ELEMENTS, layout.remove(key))
        with contextlib.suppress(FileNotFoundError):
            answer = socket.ask(Message(_GETSETELEM, 0, body))
            found.update(layout.parse(dict(attributes(answer, 4))[_ELEMENTS]))
    return found


def raw_elements(socket: Socket, name: str) -> list[bytes]:
    """The elements of any set of ours as the kernel tells them.  Raises OSError."""
    return sorted(_read_set(socket, name, _raw))


def counted(socket: Socket, name: str) -> dict[int, int]:
    """Packets by mark, of a set whose elements count them.  Raises OSError."""
    found: dict[int, int] = {}
    for element in raw_elements(socket, name):
        parts = dict(attributes(element))
        mark = dict(attributes(parts[_KEY]))[1]
        counter = dict(attributes(dict(attributes(parts[_EXPRESSION]))[2]))
        found[mark_of(mark)] = int.from_bytes(counter[_PACKETS], "big")
    return found


def _raw(listed: bytes) -> Iterator[tuple[bytes, bytes]]:
    return ((element, b"") for _, element in attributes(listed))


def _read_set(
    socket: Socket, name: str, parse: Callable[[bytes], Iterable[tuple[K, bytes]]]
) -> dict[K, bytes]:
    """The elements of a set, each as `parse` has it.

    While the kernel grows a hash table, a dump may tell some elements twice and miss as many (seen
    after 10 000 additions, 6.18); it is taken again until each is told once.
    """
    request = Message(_GETSETELEM, 0, generic(INET) + text(1, TABLE) + text(2, name))
    found: dict[K, bytes] = {}
    for _ in range(_DUMP_ATTEMPTS):
        told = 0
        found = {}
        for answer in socket.dump(request):
            elements = list(parse(dict(attributes(answer, 4)).get(_ELEMENTS, b"")))
            found.update(elements)
            told += len(elements)
        if told == len(found):
            break
    return found


def tables(socket: Socket) -> list[tuple[int, str]]:
    """Family and name of every table on this machine.  Raises OSError."""
    found = []
    for answer in socket.dump(Message(_GETTABLE, 0, generic(0))):
        named = dict(attributes(answer, 4))
        found.append((answer[0], named[1].rstrip(b"\0").decode()))
    return found


def chains(socket: Socket, family: int) -> dict[str, bytes]:
    """The chains of our table: what identifies each and says where it is hooked."""
    found = {}
    for answer in socket.dump(Message(_GETCHAIN, 0, generic(family))):
        parts = dict(attributes(answer, 4))
        if parts[1] == TABLE.encode() + b"\0":
            # 2 handle, 3 name, 4 hook, 5 policy
            name = parts[3].rstrip(b"\0").decode(errors="replace")
            found[name] = b"".join(parts.get(kind, b"") for kind in (2, 3, 4, 5))
    return found


def rule_counts(socket: Socket, family: int) -> dict[str, int]:
    """How many rules each chain of our table has.  Raises OSError."""
    counts = dict.fromkeys(chains(socket, family), 0)
    for answer in socket.dump(Message(_GETRULE, 0, generic(family) + text(1, TABLE))):
        name = dict(attributes(answer, 4))[2].rstrip(b"\0").decode(errors="replace")
        counts[name] = counts.get(name, 0) + 1
    return counts


def generation(socket: Socket) -> int:
    """How many transactions this network namespace has seen, whoever made them (modulo 2^32)."""
    parts = dict(attributes(socket.ask(Message(_GETGEN, 0, generic(0))), 4))
    return int.from_bytes(parts[1], "big")


def witness(socket: Socket, sets: Sequence[str]) -> int:
    """32 bits that change when anybody touches our chains, our rules or the contents of `sets`.

    Rules are immutable and their handles are never used again, so handles stand for contents.
    """
    digest = hashlib.sha256()
    for family in (INET, BRIDGE):
        for answer in socket.dump(Message(_GETTABLE, 0, generic(family))):
            parts = dict(attributes(answer, 4))
            if parts[1] == TABLE.encode() + b"\0":
                digest.update(parts[2])  # flags: a dormant table forwards nothing
        for _, identity in sorted(chains(socket, family).items()):
            digest.update(identity)
        rules = Message(_GETRULE, 0, generic(family) + text(1, TABLE))
        for answer in socket.dump(rules):
            parts = dict(attributes(answer, 4))
            digest.update(parts[2] + parts[3])  # chain and handle, in order
    for name in sets:
        for element in raw_elements(socket, name):
            digest.update(element)
    return int.from_bytes(digest.digest()[:4], "big")

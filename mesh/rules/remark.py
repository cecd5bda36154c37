"""Marks of one layout in those of another: what a node's flows and elements come to.  Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.rules import elements

if TYPE_CHECKING:
    from mesh.rules.elements import ElementKey, Elements
    from mesh.rules.marks import Layout


class Remark:
    """From the layout `old` to `new`, where `held` are the elements with marks of the old one."""

    def __init__(self, held: Elements, old: Layout, new: Layout) -> None:
        self.old = old
        self.new = new
        used = {
            old.id_of(elements.mark_of(data))
            for (name, _), data in held.items()
            if name in elements.FRONTENDS
        }
        homeless = sorted(number for number in used if number not in new.ids)
        free = (number for number in new.ids if number not in used)
        self._numbers = dict(zip(homeless, free, strict=False))

    @property
    def mask(self) -> int:
        """What may change in a mark."""
        return self.old.ct_mark | self.new.ct_mark

    def number(self, number: int) -> int:
        """What a frontend id becomes: itself if there is room, and 0 if there is none at all."""
        return self._numbers.get(number, number if number in self.new.ids else 0)

    def mark(self, mark: int) -> int:
        """What the mark of a flow or of a frontend becomes; the host's own bits are not in it."""
        old, new = self.old, self.new
        if mark & old.via:
            via = new.arrival((mark & old.packet_mark) >> old.node_shift)
            return new.end(via) if old.is_ended(mark) else via
        parts = old.parse(mark)
        return new.frontend(self.number(parts.id), parts.slots, parts.hashed, parts.stays)

    def elements(self, held: Elements) -> Elements:
        """What elements become; those of ids for which there is no room are left out."""
        found: Elements = {}
        for (name, key), data in held.items():
            mark = _mark_in(name, key, data)
            if mark is None:
                found[name, key] = data
            elif name == "via" or self.number(self.old.id_of(mark)):
                self._put(found, (name, key), data, mark)
        return found

    def _put(self, found: Elements, element: ElementKey, data: bytes, mark: int) -> None:
        name, key = element
        if name in elements.FRONTENDS or name == "via":
            found[element] = elements.mark_bytes(self.mark(mark))
        elif name in elements.TARGETS:
            found[name, elements.mark_bytes(self.mark(mark)) + key[4:]] = data
        else:
            bits = self.new.id_bits(self.number(self.old.id_of(mark)))
            if name == "limited":
                found[name, elements.mark_bytes(bits)] = data
            else:
                _, prefix = elements.allow_range(element, self.old)
                found[elements.allow_key(bits, prefix, self.new)] = data


def _mark_in(name: str, key: bytes, data: bytes) -> int | None:
    """The mark in an element; None if there is none."""
    if name in elements.FRONTENDS or name == "via":
        return elements.mark_of(data)
    has_one = name in elements.TARGETS or name == "limited" or name.startswith("allow")
    return elements.mark_of(key[:4]) if has_one else None

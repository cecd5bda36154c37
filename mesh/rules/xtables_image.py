"""What the host's chains and sets hold, as elements, and the steps that change it.

Owns the order of the steps: no packet finds a frontend whose pool is not there yet.  Pure, mutable.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.delta import Delta
from mesh.errors import ApplyFailed
from mesh.model.address import FAMILIES, Family
from mesh.rules import elements, ipsets, xtables, xtables_guards, xtables_limits, xtables_peers
from mesh.rules.xtables_limits import Limits
from mesh.rules.xtables_pools import Pools

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mesh.rules.elements import ElementKey, Elements
    from mesh.rules.marks import Layout
    from mesh.rules.xtables import Chains, Rules

    ElementDelta = Delta[ElementKey, bytes]

_PEERS: Final = frozenset(xtables_peers.CHAINS)
_DOORS: Final = elements.GUARDED | {"doors"}
_HAIRPINS: Final = ("hairpin4", "hairpin6")
_LISTED: Final = ("limited", "allow4", "allow6")
_GRANTED: Final = ("doors", "grants4", "grants6")


class Step(NamedTuple):
    """Input for one program, and what takes it back; `family` None is ipset."""

    family: Family | None
    text: str
    undo: str


Stage = list[Step]
"""Steps that may run at once."""


class Plan(NamedTuple):
    """The stages of a change in order, and the sets that nothing uses afterwards."""

    stages: list[Stage]
    unused: list[str]


class Image:
    """Every element the host holds, as last read or written."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sets: dict[str, dict[bytes, bytes]] = {
            name: {} for name in elements.SETS if name not in elements.TARGETS
        }
        self._pools = {f"targets{family.suffix}": Pools(family, layout) for family in FAMILIES}
        self._limits = Limits(layout)

    @staticmethod
    def parse(
        saved: Mapping[Family, Mapping[str, xtables.Saved]], entries: Elements, layout: Layout
    ) -> Image:
        """What saved tables and sets hold.  What is not as we write it is left out."""
        found = Image(layout)
        for key, data in entries.items():
            found._put(key, data)
        for family in FAMILIES:
            nat, raw = (saved[family].get(t, xtables.Saved({})).chains for t in ("nat", "raw"))
            pools = found._pools[f"targets{family.suffix}"]
            pools.parse(nat)
            filtered = saved[family].get("filter", xtables.Saved({})).chains
            more = xtables_peers.parse(raw) | xtables_guards.parse(family, filtered)
            for key, data in more.items():
                found._put(key, data)
            mangled = saved[family].get("mangle", xtables.Saved({})).chains
            for key in xtables_limits.parse(family, mangled, layout):
                found._put(key, b"")
            for mark in pools.limits():
                found._put(("limited", elements.mark_bytes(mark)), b"")
        return found

    def elements(self) -> Elements:
        """Everything."""
        found: Elements = {
            (name, key): data for name, held in self._sets.items() for key, data in held.items()
        }
        for name, pools in self._pools.items():
            for mark, slot, target in pools.items():
                found[name, elements.mark_bytes(mark) + elements.mark_bytes(slot)] = target
        return found

    def chains(self, family: Family) -> dict[str, Chains]:
        """All chains that elements come to, by table."""
        pools = self._pools[f"targets{family.suffix}"]
        return {
            "raw": self._peers(),
            "nat": pools.chains(pools.ids()),
            "filter": self._guards(family),
            "mangle": self._limits.chains(family, self._limits.ids()),
        }

    def _guards(self, family: Family) -> Chains:
        guarded = self._sets[f"guarded{family.suffix}"]
        return xtables_guards.chains(family, guarded, self._sets["doors"])

    def _peers(self) -> Chains:
        return xtables_peers.chains(self._sets["zones"], self._sets["via"], self._layout)

    def get(self, key: ElementKey) -> bytes | None:
        """The data of an element; None if there is no such element."""
        name, text = key
        pools = self._pools.get(name)
        if pools is None:
            return self._sets[name].get(text)
        return pools.get(elements.mark_of(text[:4]), elements.mark_of(text[4:]))

    def _put(self, key: ElementKey, data: bytes) -> None:
        name, text = key
        if name in self._pools:
            self._pools[name].put(elements.mark_of(text[:4]), elements.mark_of(text[4:]), data)
            return
        self._sets[name][text] = data
        if name == "connlimits":
            self._limits.put(text)
        if name == "limited":
            for pools in self._pools.values():
                pools.limit(elements.mark_of(text))

    def _drop(self, key: ElementKey) -> None:
        name, text = key
        if name in self._pools:
            self._pools[name].drop(elements.mark_of(text[:4]), elements.mark_of(text[4:]))
            return
        del self._sets[name][text]
        if name == "connlimits":
            self._limits.drop(text)
        if name == "limited":
            for pools in self._pools.values():
                pools.unlimit(elements.mark_of(text))

    def update(self, delta: ElementDelta) -> None:
        """Hold what the change says.  Elements that are there already may be added again."""
        for key in delta.remove.keys() - delta.add.keys():
            self._drop(key)
        for key, data in delta.add.items():
            self._put(key, data)

    def check(self, delta: ElementDelta) -> None:
        """Raise ApplyFailed with the culprit if the change does not fit, as nftables would."""
        for key in delta.remove:
            if self.get(key) is None:
                raise _refused(key, "does not exist")
        for key, data in delta.add.items():
            there = self.get(key)
            if there not in (None, data) and key not in delta.remove:
                raise _refused(key, "exists already with other data")
            _check_form(key, self._layout)

    def effective(self, delta: ElementDelta) -> ElementDelta:
        """The change without what is so already; its inverse then is its undoing."""
        return Delta(
            {k: v for k, v in delta.remove.items() if delta.add.get(k) != self.get(k)},
            {k: v for k, v in delta.add.items() if self.get(k) != v},
        )

    @property
    def has_limits(self) -> bool:
        """Whether any frontend has a limit of connections."""
        return bool(self._limits.ids())

    def lists(self) -> set[str]:
        """The sets of allow lists and grants that are in use."""
        names = (*_LISTED, *_GRANTED)
        held = {(name, key): data for name in names for key, data in self._sets[name].items()}
        return set(ipsets.sets_of(held, self._layout))

    def plan(self, delta: ElementDelta) -> Plan:
        """The steps of an effective change; afterwards this image holds the change."""
        late, layout = self._late(delta), self._layout
        early = Delta({k: v for k, v in delta.remove.items() if k not in late}, delta.add)
        before = set(ipsets.sets_of(self._wanted_sets(delta, after=False), layout))
        after = set(ipsets.sets_of(self._wanted_sets(delta, after=True), layout))
        created, destroyed = sorted(after - before), sorted(before - after)
        stages = [
            _first_entries(delta, created, layout),
            self._write(early),
            _last_entries(delta, destroyed, layout),
            self._write(Delta(late, {})),
            _leftovers(delta, destroyed, layout),
        ]
        return Plan([stage for stage in stages if any(step.text for step in stage)], destroyed)

    def _late(self, delta: ElementDelta) -> Elements:
        """What goes after the frontends that lead there: limits, and pools with nothing left."""
        gone: Counter[tuple[str, int]] = Counter()
        for key in delta.remove:
            if key[0] in self._pools and key not in delta.add:
                gone[self._pool_of(key)] += 1
        refilled = {self._pool_of(key) for key in delta.add if key[0] in self._pools}
        emptied = {
            pool
            for pool, count in gone.items()
            if pool not in refilled and self._pools[pool[0]].size(pool[1]) == count
        }
        return {
            key: data
            for key, data in delta.remove.items()
            if key not in delta.add
            and (key[0] == "limited" or (key[0] in self._pools and self._pool_of(key) in emptied))
        }

    def _wanted_sets(self, delta: ElementDelta, *, after: bool) -> Elements:
        """Limits and ranges of the marks that the change touches: before it, or after."""
        parts = (delta.remove, delta.add)
        touched = {self._list_of(key) for part in parts for key in part if key[0] in _LISTED}
        found: Elements = {}
        if touched:
            found |= {
                (name, text): b""
                for name in _LISTED
                for text in self._sets[name]
                if self._list_of((name, text)) in touched
            }
        if any(key[0] in _GRANTED for part in parts for key in part):
            found |= {
                (name, key): data for name in _GRANTED for key, data in self._sets[name].items()
            }
        if after and found | delta.add:
            listed = (*_LISTED, *_GRANTED)
            found = {key: data for key, data in found.items() if key not in delta.remove}
            found |= {key: data for key, data in delta.add.items() if key[0] in listed}
        return found

    def _write(self, delta: ElementDelta) -> Stage:
        """The chains that differ after a change, in both families.  Makes the change here."""
        ids = {
            name: {
                *(self._pool_of(key)[1] for part in (delta.remove, delta.add) for key in part
                  if key[0] == name),
                *(self._layout.id_of(elements.mark_of(key[1])) for part in (delta.remove, delta.add)
                  for key in part if key[0] == "limited"),
            }
            for name in self._pools
        }  # fmt: skip
        names = {key[0] for part in (delta.remove, delta.add) for key in part}
        ids["mangle"] = {
            self._layout.id_of(elements.connlimit_of(text)[0])
            for part in (delta.remove, delta.add) for name, text in part if name == "connlimits"
        }  # fmt: skip
        before = self._touched(ids, names)
        self.update(delta)
        after = self._touched(ids, names)
        return [
            Step(family, _restore(old, after[family]), _restore(after[family], old))
            for family, old in before.items()
        ]

    def _list_of(self, key: ElementKey) -> int:
        """The mark that a limit or a range belongs to."""
        if key[0] == "limited":
            return elements.mark_of(key[1])
        return elements.allow_range(key, self._layout)[0]

    def _pool_of(self, key: ElementKey) -> tuple[str, int]:
        return key[0], self._layout.id_of(elements.mark_of(key[1][:4]))

    def _touched(
        self, ids: Mapping[str, set[int]], names: set[str]
    ) -> dict[Family, dict[str, Chains]]:
        """The chains of some pools, and all that elements of these sets come to."""
        return {
            family: {
                "raw": {} if names.isdisjoint(_PEERS) else self._peers(),
                "filter": {} if names.isdisjoint(_DOORS) else self._guards(family),
                "nat": self._pools[name].chains(ids[name]) if ids[name] else {},
                "mangle": self._limits.chains(family, ids["mangle"]) if ids["mangle"] else {},
            }
            for family, name in zip(FAMILIES, self._pools, strict=True)
        }


def _restore(before: Mapping[str, Chains], after: Mapping[str, Chains]) -> str:
    changes: Iterable[tuple[str, Delta[str, Rules]]] = (
        (table, Delta.between(before[table], after[table])) for table in before
    )
    return "".join(xtables.restore(table, change) for table, change in changes)


def _first_entries(delta: ElementDelta, created: list[str], layout: Layout) -> Stage:
    """What is new in the sets that rules for a pool's flows look into: before the pool is there.

    A replica that reaches itself before it is in `hairpin` would never get an answer.
    """
    new = {k: v for k, v in delta.add.items() if ipsets.holds(k) and k[0] not in elements.FRONTENDS}
    text = [ipsets.create_list(name) for name in created]
    text += [line for key, data in new.items() for line in ipsets.additions(key, data, layout)]
    undo = [
        line
        for key in new
        if ipsets.list_of(key, layout) not in created
        for line in ipsets.removals(key, layout)
    ]
    undo += [f"destroy {name}" for name in created]
    return [Step(None, _joined(text), _joined(undo))]


def _last_entries(delta: ElementDelta, destroyed: list[str], layout: Layout) -> Stage:
    """Frontends, once their pools are there; and what goes, but for `_leftovers`."""
    text = [
        line
        for key, data in delta.add.items()
        if key[0] in elements.FRONTENDS
        for line in ipsets.additions(key, data, layout)
    ]
    undo = [
        line
        for key in delta.add.keys() - delta.remove.keys()
        if key[0] in elements.FRONTENDS
        for line in ipsets.removals(key, layout)
    ]
    for key, data in delta.remove.items():
        if not ipsets.holds(key) or key[0] in _HAIRPINS:
            continue
        if ipsets.list_of(key, layout) in destroyed:
            continue
        undo += ipsets.additions(key, data, layout)
        if key not in delta.add:
            text += ipsets.removals(key, layout)
    return [Step(None, _joined(text), _joined(undo))]


def _leftovers(delta: ElementDelta, destroyed: list[str], layout: Layout) -> Stage:
    """What flows of pools that are gone were looked up in.

    A replica that may still be drawn for its own request would never get an answer without.
    """
    gone = [key for key in delta.remove.keys() - delta.add.keys() if key[0] in _HAIRPINS]
    text = [line for key in gone for line in ipsets.removals(key, layout)]
    undo = [line for key in gone for line in ipsets.additions(key, b"", layout)]
    text += [f"flush {name}" for name in destroyed]
    return [Step(None, _joined(text), _joined(undo))]


def _joined(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _check_form(key: ElementKey, layout: Layout) -> None:
    name, text = key
    if ipsets.list_of(key, layout) is not None and not ipsets.is_prefix(key, layout):
        raise _refused(key, "is not a prefix")
    if name in elements.TARGETS:
        mark, slot = elements.mark_of(text[:4]), elements.mark_of(text[4:])
        if mark & layout.hash and slot >= layout.slots_of(mark):
            raise _refused(key, "is beyond the pool's last slot")


def _refused(key: ElementKey, reason: str) -> ApplyFailed:
    return ApplyFailed(f"iptables: {elements.describe(key)} {reason}")

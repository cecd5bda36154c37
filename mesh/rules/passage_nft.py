"""Chains of nftables as `nft -j` lists them, read for mesh.rules.passage.  Pure.

What is not understood is a condition that cannot be told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mesh.model.address import Family
from mesh.rules import passage
from mesh.rules.passage import Call, Chain, Rule, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mesh.rules.passage import Chains, Condition

_VERDICTS: Final = {
    "accept": Verdict.ACCEPT,
    "drop": Verdict.DROP,
    "reject": Verdict.DROP,
    "return": Verdict.RETURN,
    "continue": Verdict.CONTINUE,
    "queue": Verdict.ACCEPT,  # a program decides
}
_NEUTRAL: Final = frozenset({"counter", "log", "mangle", "notrack", "set", "map", "flow"})
"""Statements that every packet passes."""

_FAMILIES: Final = {"ip": Family.V4, "ip6": Family.V6, "icmp": Family.V4, "icmpv6": Family.V6}
_NFPROTO: Final = {"ipv4": Family.V4, "ipv6": Family.V6}
_TRANSPORTS: Final = ("tcp", "udp", "udplite", "sctp", "dccp", "icmp", "icmpv6")


def parse(listed: dict[str, Any]) -> Chains:
    """The chains of one table, from what `nft -j list table` printed."""
    objects = listed.get("nftables", ())
    rules: dict[str, list[Rule]] = {}
    policies: dict[str, Verdict] = {}
    for each in objects:
        if (chain := each.get("chain")) is not None:
            rules[chain["name"]] = []
            policies[chain["name"]] = _policy(chain)
    for each in objects:
        if (rule := each.get("rule")) is not None:
            rules[rule["chain"]] += _rules(rule.get("expr", ()))
    return {name: Chain(tuple(rules[name]), policies[name]) for name in rules}


def _policy(chain: dict[str, Any]) -> Verdict:
    if "hook" not in chain:
        return Verdict.CONTINUE
    return Verdict.DROP if chain.get("policy") == "drop" else Verdict.ACCEPT


def _rules(statements: list[Any]) -> Iterator[Rule]:
    """A rule; one that looks its verdict up in a list of them is several."""
    conditions: list[Condition] = []
    body: Any
    for statement in statements:
        kind, body = next(iter(statement.items())) if isinstance(statement, dict) else ("?", {})
        if kind == "match":
            conditions += _match(body)
        elif kind in _VERDICTS or kind in ("jump", "goto"):
            yield Rule(tuple(conditions), _verdict(kind, body))
            return
        elif kind == "vmap":
            for more, verdict in _looked_up(body):
                yield Rule((*conditions, *more), verdict)
        elif kind not in _NEUTRAL:
            conditions.append(passage.unknown)


def _verdict(kind: str, body: Any) -> Verdict | Call:
    if kind in ("jump", "goto"):
        return Call(str(body.get("target")), final=kind == "goto")
    return _VERDICTS[kind]


def _looked_up(body: dict[str, Any]) -> Iterator[tuple[list[Condition], Verdict | Call]]:
    entries = body["data"].get("set") if isinstance(body["data"], dict) else None
    if entries is None:  # a map with a name may hold anything
        yield [passage.unknown], Verdict.ACCEPT
        return
    for key, found in entries:
        kind, target = next(iter(found.items()))
        if kind in _VERDICTS or kind in ("jump", "goto"):
            yield _match({"op": "==", "left": body["key"], "right": key}), _verdict(kind, target)


def _match(body: dict[str, Any]) -> list[Condition]:
    """Conditions that all have to be met."""
    left, values = body["left"], _values(body["right"])
    given, condition = _condition(left, values)
    if condition is None or values is None:
        condition = passage.unknown
    elif body["op"] == "!=":
        condition = passage.negated(condition)
    elif body["op"] not in ("==", "in"):
        condition = passage.unknown
    return [*given, condition]


def _values(right: Any) -> list[Any] | None:
    """What the left side is compared with; None if that is not told here."""
    if isinstance(right, str) and right.startswith("@"):
        return None
    if isinstance(right, dict) and "set" in right:
        right = right["set"]
    listed = right if isinstance(right, list) else [right]
    return [one["elem"].get("val") if isinstance(one, dict) and "elem" in one else one
            for one in listed]  # fmt: skip


def _condition(left: Any, values: list[Any] | None) -> tuple[list[Condition], Condition | None]:
    """What a field implies by being there at all, and the comparison; None: not understood."""
    if not isinstance(left, dict):
        return [], None
    if "payload" in left:
        return _payload(left["payload"], values or [])
    if "&" in left and left["&"][0] == {"ct": {"key": "mark"}}:
        return [], _mark(values or [], left["&"][1])
    if left.get("fib", {}).get("result") == "type" and "daddr" in left["fib"].get("flags", ()):
        return [], passage.local if values == ["local"] else None
    for kind in ("meta", "ct"):
        build = _FIELDS.get((kind, left.get(kind, {}).get("key")))
        if build is not None:
            return [], build(values or [])
    return [], None


def _payload(field: dict[str, Any], values: list[Any]) -> tuple[list[Condition], Condition | None]:
    protocol, name = field.get("protocol"), field.get("field")
    given: list[Condition] = []
    if protocol in _FAMILIES:
        given.append(passage.family(_FAMILIES[protocol]))
    if protocol in _TRANSPORTS:
        given.append(passage.protocol([protocol]))
    if name == "dport":
        return given, _ports(values)
    if (protocol, name) in (("ip", "protocol"), ("ip6", "nexthdr")):
        return given, _FIELDS["meta", "l4proto"](values)
    return given, None


def _ports(values: list[Any]) -> Condition | None:
    ranges = [v["range"] if isinstance(v, dict) and "range" in v else [v, v] for v in values]
    if all(isinstance(bound, int) for each in ranges for bound in each):
        return passage.port((low, high) for low, high in ranges)
    return None


def _mark(values: list[Any], mask: Any) -> Condition | None:
    if len(values) == 1 and isinstance(values[0], int) and isinstance(mask, int):
        return passage.mark(values[0], mask)
    return None


def _translated(values: list[Any]) -> Condition | None:
    return passage.translated if values == ["dnat"] else None


def _family(values: list[Any]) -> Condition | None:
    wanted = _NFPROTO.get(values[0]) if len(values) == 1 else None
    return passage.family(wanted) if wanted is not None else None


_FIELDS: Final[dict[tuple[str, str | None], Callable[[list[Any]], Condition | None]]] = {
    ("meta", "iifname"): lambda values: passage.incoming(map(str, values)),
    ("meta", "iif"): lambda values: passage.incoming(map(str, values)),
    ("meta", "oifname"): lambda values: passage.outgoing(map(str, values)),
    ("meta", "oif"): lambda values: passage.outgoing(map(str, values)),
    ("meta", "l4proto"): lambda values: passage.protocol(map(str, values)),
    ("meta", "nfproto"): _family,
    ("ct", "state"): lambda values: passage.state(map(str, values)),
    ("ct", "status"): _translated,
    ("ct", "mark"): lambda values: _mark(values, 0xFFFFFFFF),
}

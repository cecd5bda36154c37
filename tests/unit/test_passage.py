"""Whether a foreign chain is accused: of what it drops for certain, and of nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import pytest

from mesh.model.address import Family
from mesh.rules import needs, passage, passage_nft, passage_xtables
from mesh.rules.needs import Place, Wanted
from mesh.rules.passage import ELSEWHERE, Packet

OURS: Final = frozenset({"warren0", "warren-x0", "warren-br0"})
WIREGUARD: Final = Packet(
    Family.V4, ELSEWHERE, protocol="udp", port=51820, local=True, mask=0x10000, ours=OURS
)
STEERED: Final = replace(WIREGUARD, iif="warren0", port=4790, state="untracked")
FORWARDED: Final = Packet(
    Family.V4, "warren-x0", "warren-br0", mark=0x10000, mask=0x10000, ours=OURS
)


def xtables(policy: str, *rules: str) -> passage.Chains:
    """A filter table whose INPUT has these rules; "CHAIN: rule" is one of another chain."""
    named = [rule.partition(": ") if ": " in rule else ("INPUT", "", rule) for rule in rules]
    chains = dict.fromkeys(chain for chain, _, _ in named if chain != "INPUT")
    lines = ["*filter", f":INPUT {policy} [0:0]", *(f":{chain} - [0:0]" for chain in chains)]
    lines += [f"-A {chain} {rule}" for chain, _, rule in named]
    return passage_xtables.parse("\n".join([*lines, "COMMIT"]))


@pytest.mark.parametrize(
    ("packet", "dropped", "chains"),
    [
        (WIREGUARD, False, xtables("ACCEPT")),
        (WIREGUARD, True, xtables("DROP")),
        (WIREGUARD, False, xtables("DROP", "-p udp -m udp --dport 51820 -j ACCEPT")),
        (WIREGUARD, True, xtables("DROP", "-p tcp -m tcp --dport 51820 -j ACCEPT")),
        (WIREGUARD, False, xtables("DROP", "-p 17 -m multiport --dports 1,51000:52000 -j ACCEPT")),
        (WIREGUARD, True, xtables("DROP", "-p udp -m multiport --dports 53,67:68 -j ACCEPT")),
        (WIREGUARD, False, xtables("DROP", "-p udp -m udp ! --dport 53 -j ACCEPT")),
        (WIREGUARD, True, xtables("DROP", "-i lo -j ACCEPT", "-i warren0 -j ACCEPT")),
        (STEERED, False, xtables("DROP", "-i lo -j ACCEPT", "-i warren+ -j ACCEPT")),
        (WIREGUARD, False, xtables("DROP", "! -i warren0 -j ACCEPT")),
        (STEERED, True, xtables("DROP", "! -i warren0 -j ACCEPT")),
        (WIREGUARD, False, xtables("DROP", "-i eth0 -p udp -j ACCEPT")),
        (WIREGUARD, False, xtables("DROP", "-s 192.0.2.0/24 -j ACCEPT")),
        (WIREGUARD, True, xtables("DROP", "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT")),
        (WIREGUARD, False, xtables("DROP", "-m conntrack --ctstate NEW -j ACCEPT")),
        (STEERED, True, xtables("DROP", "-m conntrack --ctstate NEW -j ACCEPT")),
        (WIREGUARD, True, xtables("DROP", "-m conntrack --ctstate ESTABLISHED,DNAT -j ACCEPT")),
        (FORWARDED, False, xtables("DROP", "-m connmark --mark 0x10000/0x10000 -j ACCEPT")),
        (WIREGUARD, True, xtables("DROP", "-m connmark --mark 0x10000/0x10000 -j ACCEPT")),
        (FORWARDED, True, xtables("DROP", "-m connmark ! --mark 0x10000/0x10000 -j ACCEPT")),
        (FORWARDED, False, xtables("DROP", "-m connmark --mark 0x10001 -j ACCEPT")),
        (FORWARDED, True, xtables("DROP", "-m connmark --mark 0x1 -j ACCEPT")),
        (FORWARDED, False, xtables("DROP", "-m mark --mark 0x1 -j ACCEPT")),
        (WIREGUARD, False, xtables("ACCEPT", "-m limit --limit 1/sec -j DROP")),
        (WIREGUARD, True, xtables("ACCEPT", "-j LOG", "-j REJECT --reject-with tcp-reset")),
        (WIREGUARD, True, xtables("ACCEPT", '-m comment --comment "-j ACCEPT" -j DROP')),
        (WIREGUARD, True, xtables("ACCEPT", "-j sub", "sub: -p udp -j DROP")),
        (WIREGUARD, False, xtables("ACCEPT", "-j sub", "sub: -p tcp -j DROP")),
        (WIREGUARD, False, xtables("DROP", "-j sub", "sub: -p udp -j ACCEPT")),
        (WIREGUARD, False, xtables("ACCEPT", "-g sub", "-j DROP", "sub: -p tcp -j DROP")),
        (WIREGUARD, True, xtables("ACCEPT", "-j sub", "-j DROP", "sub: -p tcp -j DROP")),
        (WIREGUARD, False, xtables("ACCEPT", "-j sub", "sub: -p udp -j RETURN", "sub: -j DROP")),
        (WIREGUARD, True, xtables("ACCEPT", "-j sub", "sub: -p tcp -j RETURN", "sub: -j DROP")),
        (WIREGUARD, False, xtables("ACCEPT", "-j sub", "sub: -s ::1 -j RETURN", "sub: -j DROP")),
        (WIREGUARD, False, xtables("ACCEPT", "-s 192.0.2.9 -j sub", "sub: -j DROP")),
        (WIREGUARD, False, xtables("DROP", "-m addrtype --dst-type LOCAL -j ACCEPT")),
        (WIREGUARD, True, xtables("DROP", "-m addrtype ! --dst-type LOCAL -j ACCEPT")),
        (WIREGUARD, False, xtables("DROP", "-m set --match-set good src -j ACCEPT")),
        (WIREGUARD, False, xtables("DROP", "-j NFQUEUE --queue-num 0")),
    ],
)  # fmt: skip
def test_iptables(packet: Packet, dropped: bool, chains: passage.Chains) -> None:
    assert passage.drops(chains, "INPUT", packet) is dropped


ACCEPT: Final[dict[str, None]] = {"accept": None}
DROP: Final[dict[str, None]] = {"drop": None}


def match(left: dict[str, Any], right: object, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def meta(key: str) -> dict[str, Any]:
    return {"meta": {"key": key}}


def ct(key: str) -> dict[str, Any]:
    return {"ct": {"key": key}}


def dport(protocol: str) -> dict[str, Any]:
    return {"payload": {"protocol": protocol, "field": "dport"}}


SOME: Final = {"set": [53, {"range": [1, 9]}]}
SOURCE: Final = {"payload": {"protocol": "ip", "field": "saddr"}}
SOURCE6: Final = {"payload": {"protocol": "ip6", "field": "saddr"}}
KIND: Final = {"fib": {"result": "type", "flags": ["daddr"]}}
ESTABLISHED: Final = match(ct("state"), ["established", "related"], "in")
TRANSLATED: Final = match(ct("status"), "dnat", "in")
OTHERS: Final = [match(dport("tcp"), 1), DROP]
JUMP: Final = {"jump": {"target": "sub"}}
GOTO: Final = {"goto": {"target": "sub"}}
MARKED: Final = {"&": [ct("mark"), 0x10000]}


def nft(policy: str, *rules: list[dict[str, Any]], sub: object = ()) -> passage.Chains:
    """A table whose chain INPUT has these rules, and another chain `sub`."""
    base = {"name": "INPUT", "hook": "input", "policy": policy}
    objects: list[dict[str, Any]] = [{"chain": base}, {"chain": {"name": "sub"}}]
    objects += [{"rule": {"chain": "INPUT", "expr": rule}} for rule in rules]
    objects += [{"rule": {"chain": "sub", "expr": sub}}] if sub else []
    return passage_nft.parse({"nftables": objects})


STATES: Final = {
    "vmap": {
        "key": ct("state"),
        "data": {"set": [["established", ACCEPT], ["new", {"jump": {"target": "sub"}}]]},
    }
}


@pytest.mark.parametrize(
    ("packet", "dropped", "chains"),
    [
        (WIREGUARD, False, nft("accept")),
        (WIREGUARD, True, nft("drop")),
        (WIREGUARD, False, nft("drop", [match(dport("udp"), 51820), {"counter": {}}, ACCEPT])),
        (WIREGUARD, False, nft("drop", [match(dport("th"), {"range": [51000, 52000]}), ACCEPT])),
        (WIREGUARD, True, nft("drop", [match(dport("tcp"), 51820), ACCEPT])),
        (WIREGUARD, True, nft("drop", [match(dport("udp"), SOME), ACCEPT])),
        (WIREGUARD, False, nft("drop", [match(dport("udp"), "@open"), ACCEPT])),
        (WIREGUARD, True, nft("accept", [match(dport("udp"), 53, "!="), DROP])),
        (WIREGUARD, False, nft("accept", [match(dport("tcp"), 53, "!="), DROP])),
        (WIREGUARD, False, nft("accept", [match(dport("udp"), 60000, "<"), DROP])),
        (WIREGUARD, True, nft("drop", [match(meta("iifname"), "lo"), ACCEPT])),
        (STEERED, False, nft("drop", [match(meta("iifname"), "warren*"), ACCEPT])),
        (WIREGUARD, False, nft("drop", [match(meta("iif"), {"set": ["lo", "eth0"]}), ACCEPT])),
        (STEERED, True, nft("drop", [match(meta("iif"), {"set": ["lo", "eth0"]}), ACCEPT])),
        (WIREGUARD, True, nft("drop", [ESTABLISHED, ACCEPT])),
        (STEERED, False, nft("drop", [match(ct("state"), ["new", "untracked"], "in"), ACCEPT])),
        (WIREGUARD, True, nft("drop", [TRANSLATED, ACCEPT])),
        (replace(FORWARDED, translated=True), False, nft("drop", [TRANSLATED, ACCEPT])),
        (FORWARDED, False, nft("drop", [match(MARKED, 0x10000), ACCEPT])),
        (FORWARDED, False, nft("drop", [match(MARKED, 0, "!="), ACCEPT])),
        (WIREGUARD, True, nft("drop", [match(MARKED, 0x10000), ACCEPT])),
        (FORWARDED, False, nft("drop", [match(ct("mark"), 0x10001), ACCEPT])),
        (FORWARDED, True, nft("drop", [match(ct("mark"), 1), ACCEPT])),
        (WIREGUARD, False, nft("drop", [match(SOURCE, "1.2.3.4"), ACCEPT])),
        (WIREGUARD, True, nft("drop", [match(SOURCE6, "::1"), ACCEPT])),
        (WIREGUARD, True, nft("drop", [match(meta("nfproto"), "ipv6"), ACCEPT])),
        (WIREGUARD, False, nft("drop", [match(meta("l4proto"), {"set": ["tcp", "udp"]}), ACCEPT])),
        (WIREGUARD, False, nft("drop", [match(KIND, "local"), ACCEPT])),
        (WIREGUARD, False, nft("accept", [{"limit": {"rate": 1}}, DROP])),
        (WIREGUARD, False, nft("drop", [{"xt": {"type": "match", "name": "recent"}}, ACCEPT])),
        (WIREGUARD, True, nft("accept", [{"log": None}, {"reject": {"type": "icmpx"}}])),
        (WIREGUARD, True, nft("accept", [STATES], sub=[DROP])),
        (STEERED, False, nft("accept", [STATES], sub=[DROP])),
        (WIREGUARD, False, nft("drop", [STATES], sub=[ACCEPT])),
        (WIREGUARD, False, nft("drop", [{"vmap": {"key": meta("iifname"), "data": "@zones"}}])),
        (WIREGUARD, False, nft("accept", [GOTO], [DROP], sub=OTHERS)),
        (WIREGUARD, True, nft("accept", [JUMP], [DROP], sub=OTHERS)),
        (WIREGUARD, True, nft("accept", [GOTO], sub=[DROP])),
        (WIREGUARD, False, nft("accept", [{"jump": {"target": "nowhere"}}])),
        (WIREGUARD, False, nft("drop", [{"queue": None}])),
    ],
)  # fmt: skip
def test_nftables(packet: Packet, dropped: bool, chains: passage.Chains) -> None:
    assert passage.drops(chains, "INPUT", packet) is dropped


WANTED: Final = Wanted(
    overlay="warren0",
    steering="warren-x0",
    bridge="warren-br0",
    wireguard_port=51820,
    steering_port=4790,
    ours=0x10000,
    endpoints=frozenset({Family.V4}),
)


def test_a_firewall_of_a_family_that_no_peer_uses_is_not_asked_for_wireguard() -> None:
    place = Place("ip6tables-nft", "ip6", "filter", "INPUT")

    blocked = needs.blocked(place, xtables("DROP"), needs.INPUT, needs.of(WANTED))
    found = [each.need.what for each in blocked]

    assert not any("WireGuard" in what for what in found)
    assert any("ICMPv6" in what for what in found)


def test_one_command_that_solves_several_problems_is_told_once() -> None:
    chains = nft("drop")
    found = [
        blocked
        for chain, hook in (("filter_INPUT", needs.INPUT), ("filter_FORWARD", needs.FORWARD))
        for blocked in needs.blocked(
            Place("nft", "inet", "firewalld", chain),
            {chain: chains["INPUT"]},
            hook,
            needs.of(WANTED),
        )
    ]

    told = needs.problems(found)

    assert len(found) > len(told) == 2
    trusted = next(p for p in told if "--zone=trusted" in p.message)
    assert "filter_INPUT" in trusted.about
    assert "filter_FORWARD" in trusted.about

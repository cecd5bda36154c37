"""Published ports on a host whose own firewall drops what it forwards, or what comes in."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest

from mesh.dataplane.firewall import Firewall, Mode
from mesh.model.address import FAMILIES, Family
from tests.support.echo import SILENCE
from tests.support.guarded import (
    WANTED,
    answered,
    answers,
    ask_port,
    looked_after,
    obey,
    published,
    sync,
)
from tests.support.layouts import LOW

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.onenode import OneNode

pytestmark = pytest.mark.netns

PROGRAMS: Final = {Family.V4: "iptables", Family.V6: "ip6tables"}
FLAVOURS: Final = ("nft", "legacy")
IN: Final = ("-m", "comment", "--comment", "theirs", "-j", "RETURN")
INPUT_PORTS: Final = ("51820", "4790")


@pytest.fixture
def world() -> Iterator[OneNode]:
    with published("nftables") as made:
        yield made


@pytest.fixture
def firewall(world: OneNode) -> Iterator[Firewall]:
    with looked_after(world) as made:
        yield made


# ---- iptables


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"v{f.suffix}")
def test_a_drop_policy_is_passed_and_passed_again_after_a_reload(
    world: OneNode, firewall: Firewall, flavour: str, family: Family
) -> None:
    program = f"{PROGRAMS[family]}-{flavour}"
    world.node.sh(program, "-P", "FORWARD", "DROP")
    world.node.sh(program, "-A", "FORWARD", *IN)
    dropped = ask_port(family, patience=0.7)

    first = sync(world, firewall)
    passed = ask_port(family)
    world.node.sh(program, "-F", "FORWARD")
    world.node.sh(program, "-A", "FORWARD", "-j", "DROP")
    again = sync(world, firewall)

    assert dropped == {SILENCE}
    assert (first, again) == ((), ())
    assert passed == answered(family)
    assert ask_port(family) == answered(family)
    assert [where for where, _ in firewall.replaced()] == [f"{program} FORWARD"]


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("closing", ["-P FORWARD DROP", "-A FORWARD -p udp -j DROP"])
def test_a_policy_and_a_rule_may_drop(
    world: OneNode, firewall: Firewall, flavour: str, closing: str
) -> None:
    world.node.sh(f"iptables-{flavour}", *closing.split())

    told = sync(world, firewall)

    assert told == ()
    assert ask_port(Family.V4) == answered(Family.V4)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_only_our_line_comes_and_goes(world: OneNode, firewall: Firewall, flavour: str) -> None:
    program = f"iptables-{flavour}"
    world.node.sh(program, "-P", "FORWARD", "DROP")
    world.node.sh(program, "-A", "FORWARD", *IN)
    theirs = world.node.sh(program, "-S")

    sync(world, firewall)
    with_ours = world.node.sh(program, "-S", "FORWARD")
    world.node.run(firewall.remove())

    assert with_ours.count("warren-mesh") == 1
    assert world.node.sh(program, "-S") == theirs


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_line_of_before_other_bits_were_chosen_goes(
    world: OneNode, firewall: Firewall, flavour: str
) -> None:
    program = f"iptables-{flavour}"
    world.node.sh(program, "-P", "FORWARD", "DROP")
    with looked_after(world) as former:
        sync(world, former, replace(WANTED, ours=LOW.ours))

    sync(world, firewall)

    lines = world.node.sh(program, "-S", "FORWARD").splitlines()[1:]
    assert len(lines) == 1
    assert f"--mark {WANTED.ours:#x}/{WANTED.ours:#x}" in lines[0]


@pytest.mark.parametrize("mode", Mode, ids=lambda m: m.value)
def test_a_host_without_a_firewall_is_left_without(world: OneNode, mode: Mode) -> None:
    before = world.node.sh("nft", "list", "tables")
    with looked_after(world, mode) as firewall:
        told = sync(world, firewall)

    assert told == ()
    assert world.node.sh("nft", "list", "tables") == before
    assert world.node.sh("cat", "/proc/net/ip_tables_names") == ""
    assert world.node.sh("cat", "/proc/net/ip6_tables_names") == ""


def test_a_firewall_that_accepts_is_not_touched(world: OneNode, firewall: Firewall) -> None:
    world.node.sh("iptables-nft", "-A", "INPUT", *IN)
    before = world.node.sh("iptables-nft", "-S")

    told = sync(world, firewall)

    assert told == ()
    assert world.node.sh("iptables-nft", "-S") == before


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_only_reported_is_what_the_operator_wants_only_reported(
    world: OneNode, flavour: str
) -> None:
    program = f"iptables-{flavour}"
    world.node.sh(program, "-P", "FORWARD", "DROP")
    before = world.node.sh(program, "-S")
    with looked_after(world, Mode.REPORT) as firewall:
        (told,) = sync(world, firewall)
        untouched = world.node.sh(program, "-S")
        obey(world, told)
        after = sync(world, firewall)

    assert untouched == before
    assert program in told.about
    assert "FORWARD" in told.about
    assert after == ()
    assert ask_port(Family.V4) == answered(Family.V4)


# ---- tables of nft, written by hand

HAND_WRITTEN: Final = {
    "policy": """
        table inet filter {
          chain input { type filter hook input priority 0; policy drop;
            ct state vmap { established : accept, related : accept, invalid : drop }
            iifname "lo" accept
            tcp dport 22 accept
            meta l4proto { icmp, ipv6-icmp } accept
          }
          chain forward { type filter hook forward priority 0; policy drop; }
        }""",
    "last rule": """
        table inet guard {
          chain allowed { ct state established,related accept; }
          chain input { type filter hook input priority 10;
            jump allowed
            iif lo accept
            icmpv6 type != { echo-request } accept
            counter log prefix "no " reject with icmpx type admin-prohibited
          }
          chain forward { type filter hook forward priority 10; jump allowed; counter drop; }
        }""",
    "one family": """
        table ip filter {
          chain input { type filter hook input priority -1; policy drop; }
          chain forward { type filter hook forward priority -1; goto rest; }
          chain rest { ct state established accept; drop; }
        }""",
}


def _load(world: OneNode, shape: str) -> None:
    world.node.sh("sh", "-c", f"nft -f - <<'END'\n{HAND_WRITTEN[shape]}\nEND")


def _table(shape: str) -> list[str]:
    """What nft calls the table: "table", family, name."""
    return HAND_WRITTEN[shape].split("{")[0].split()


@pytest.mark.parametrize("shape", HAND_WRITTEN)
def test_a_table_of_nft_that_drops_is_named_with_the_line_that_helps(
    world: OneNode, firewall: Firewall, shape: str
) -> None:
    _load(world, shape)
    before = world.node.sh("nft", "-s", "list", *_table(shape))
    dropped = ask_port(Family.V4, patience=0.7)

    told = sync(world, firewall)
    untouched = world.node.sh("nft", "-s", "list", *_table(shape))
    for problem in told:
        obey(world, problem)
    after = sync(world, firewall)

    assert dropped == {SILENCE} or shape == "last rule"
    assert untouched == before
    assert {tuple(p.about.split()[2:]) for p in told} == {
        (*_table(shape), "chain", chain) for chain in ("input", "forward")
    }
    assert after == ()
    assert answers()


@pytest.mark.parametrize("shape", HAND_WRITTEN)
def test_a_table_of_nft_is_opened_if_the_operator_wants_it(world: OneNode, shape: str) -> None:
    _load(world, shape)
    with looked_after(world, Mode.OPEN) as firewall:
        before = world.node.sh("nft", "-s", "list", "ruleset")
        first = sync(world, firewall)
        first_answers = answers()
        world.node.sh("nft", "delete", *_table(shape))
        _load(world, shape)
        again = sync(world, firewall)
        then_answers = answers()
        world.node.run(firewall.remove())

    assert (first, again) == ((), ())
    assert first_answers
    assert then_answers
    assert world.node.sh("nft", "-s", "list", "ruleset").count("warren-mesh") == 0
    assert len(world.node.sh("nft", "-s", "list", "ruleset")) == len(before)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_comes_in_is_let_in_by_iptables_if_the_operator_wants_it(
    world: OneNode, flavour: str
) -> None:
    for name in PROGRAMS.values():
        world.node.sh(f"{name}-{flavour}", "-P", "INPUT", "DROP")
    before = world.node.sh(f"iptables-{flavour}", "-S")
    with looked_after(world, Mode.OPEN) as firewall:
        told = sync(world, firewall)
        lines = world.node.sh(f"iptables-{flavour}", "-S", "INPUT")
        sync(world, firewall)
        same = world.node.sh(f"iptables-{flavour}", "-S", "INPUT")
        world.node.run(firewall.remove())

    assert told == ()
    assert all(f"--dport {port}" in lines for port in INPUT_PORTS)
    assert same == lines
    assert world.node.sh(f"iptables-{flavour}", "-S") == before


def test_a_line_of_ours_that_somebody_removes_is_back_and_told_with_who_did_it(
    world: OneNode,
) -> None:
    world.node.sh("iptables-nft", "-P", "FORWARD", "DROP")
    with looked_after(world) as firewall:
        sync(world, firewall)

        world.node.sh("iptables-nft", "-F", "FORWARD")
        sync(world, firewall)

    ((where, by),) = firewall.replaced()
    assert where == "iptables-nft FORWARD"
    assert by.startswith("iptables-nft(")


def test_rules_of_nft_among_those_of_iptables_do_not_hide_a_drop(
    world: OneNode, firewall: Firewall
) -> None:
    world.node.sh("iptables-nft", "-P", "FORWARD", "DROP")
    world.node.sh("nft", "add rule ip filter FORWARD ct state established accept")

    told = sync(world, firewall)
    for problem in told:
        obey(world, problem)

    assert [p.about for p in told] == ["firewall nft table ip filter chain FORWARD"]
    assert sync(world, firewall) == ()
    assert ask_port(Family.V4) == answered(Family.V4)

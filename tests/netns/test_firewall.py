"""Published ports on a host whose own firewall drops what it forwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from mesh.dataplane import netns
from mesh.dataplane.firewall import Firewall
from mesh.model.address import FAMILIES, Family
from mesh.model.publish import Protocol
from mesh.rules import marks
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from tests.support.echo import SILENCE, ask
from tests.support.layouts import LOW
from tests.support.onenode import ADDRESSES, SERVER_PORT, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.netns

PORT: Final = 30080
PROGRAMS: Final = {Family.V4: "iptables", Family.V6: "ip6tables"}
FLAVOURS: Final = ("nft", "legacy")
IN: Final = ("-m", "comment", "--comment", "theirs", "-j", "RETURN")


@pytest.fixture
def world() -> Iterator[OneNode]:
    with one_node() as made:
        made.publish(
            Forwarding(
                f"web/{protocol.value}",
                (Frontend(Scope.INGRESS, None, protocol, PORT),),
                tuple(Backend(a, SERVER_PORT) for a in ADDRESSES["c1"]),
            )
            for protocol in Protocol
        )
        yield made


@pytest.fixture
def firewall(world: OneNode) -> Iterator[Firewall]:
    with netns.entered("/run/netns/node"):
        made = Firewall(marks.DEFAULT, ignored=0)
    yield made
    made.close()


def _ask(family: Family, patience: float = 10.0) -> set[str]:
    node = ADDRESSES["node"][FAMILIES.index(family)]
    return {ask("client", protocol, node, PORT, patience=patience) for protocol in Protocol}


def _answered(family: Family) -> set[str]:
    return {f"c1 {ADDRESSES['client'][FAMILIES.index(family)]}"}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"v{f.suffix}")
def test_a_drop_policy_is_passed_and_passed_again_after_a_reload(
    world: OneNode, firewall: Firewall, flavour: str, family: Family
) -> None:
    program = f"{PROGRAMS[family]}-{flavour}"
    world.node.sh(program, "-P", "FORWARD", "DROP")
    world.node.sh(program, "-A", "FORWARD", *IN)
    dropped = _ask(family, patience=0.7)

    first = world.node.run(firewall.sync())
    passed = _ask(family)
    world.node.sh(program, "-F", "FORWARD")
    world.node.sh(program, "-A", "FORWARD", "-j", "DROP")
    again = world.node.run(firewall.sync())

    assert dropped == {SILENCE}
    assert (first, again) == ((), ())
    assert passed == _answered(family)
    assert _ask(family) == _answered(family)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_only_our_line_comes_and_goes(world: OneNode, firewall: Firewall, flavour: str) -> None:
    program = f"iptables-{flavour}"
    world.node.sh(program, "-P", "FORWARD", "DROP")
    world.node.sh(program, "-A", "FORWARD", *IN)
    theirs = world.node.sh(program, "-S")

    for _ in range(3):
        world.node.run(firewall.sync())
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
    with netns.entered("/run/netns/node"):
        former = Firewall(LOW, ignored=0)
    world.node.run(former.sync())
    former.close()

    world.node.run(firewall.sync())

    lines = world.node.sh(program, "-S", "FORWARD").splitlines()[1:]
    assert len(lines) == 1
    assert f"--mark {marks.DEFAULT.ours:#x}/{marks.DEFAULT.ours:#x}" in lines[0]


def test_a_host_without_iptables_rules_is_left_without(world: OneNode, firewall: Firewall) -> None:
    world.node.run(firewall.sync())

    assert "filter" not in world.node.sh("nft", "list", "tables")
    assert world.node.sh("cat", "/proc/net/ip_tables_names") == ""


def test_a_firewall_that_accepts_is_not_touched(world: OneNode, firewall: Firewall) -> None:
    world.node.sh("iptables-nft", "-A", "INPUT", *IN)
    before = world.node.sh("iptables-nft", "-S")

    world.node.run(firewall.sync())

    assert world.node.sh("iptables-nft", "-S") == before

"""iptables beside other people's rules: adopted, healed, undone, removed."""

from __future__ import annotations

import asyncio
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

from mesh.dataplane.iptables import IptablesDriver
from mesh.dataplane.xtwatch import XtablesWatch
from mesh.delta import Delta
from mesh.errors import ApplyFailed
from mesh.model import address
from mesh.model.address import FAMILIES, Family
from mesh.model.publish import Protocol
from mesh.model.service import Affinity
from mesh.rules import elements, marks, nft, xtables, xtables_pools
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.ids import Ids
from tests.support import rules
from tests.support.containers import until
from tests.support.echo import ask
from tests.support.onenode import ADDRESSES, CONTAINERS, CROWD, SERVER_PORT, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from mesh.dataplane.xtprograms import Flavour
    from mesh.rules.elements import Elements
    from mesh.rules.xtables import Chains

pytestmark = pytest.mark.netns

FLAVOURS: Final[tuple[Flavour, ...]] = ("legacy", "nft")
PROGRAMS: Final = ("iptables", "ip6tables")
PUBLISHED: Final = 30080
AFFINE: Final = 30081


def sh(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def chains(flavour: str) -> dict[str, dict[str, Chains]]:
    """All chains but built-in ones without a rule: looking at a table creates those."""
    builtin = {"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}
    return {
        program: {
            table: {n: r for n, r in sorted(saved.chains.items()) if r or n not in builtin}
            for table, saved in xtables.parse(sh(f"{program}-{flavour}-save")).items()
        }
        for program in PROGRAMS
    }


def lowered() -> Elements:
    """A service of every kind, a node, a peer."""
    ids, found = Ids(), nft.lower_nodes(["192.0.2.1", "2001:db8::1"])
    pool = (Backend("10.0.1.2", 80, 2), Backend("10.0.1.3", 80), Backend("fd11::2", 80))
    for number, (affinity, allow) in enumerate(
        [(Affinity.NONE, ()), (Affinity.CLIENT_IP, ()), (Affinity.NONE, ("198.51.100.0/24",))]
    ):
        port = Frontend(Scope.INGRESS, None, Protocol.TCP, PUBLISHED + number)
        vip = Frontend(Scope.VIP, f"10.1.0.{number + 1}", Protocol.UDP, 80)
        found |= nft.lower(Forwarding(f"s{number}", (port, vip), pool, affinity, allow=allow), ids)
    return (
        found
        | nft.lower_peer(rules.CLUSTER.network(2), marks.DEFAULT)
        | nft.lower_hairpins(["10.0.1.2"])
    )


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> Iterator[Flavour]:
    with rules.namespace():
        yield request.param


@pytest.fixture
async def driver(flavour: Flavour) -> AsyncIterator[IptablesDriver]:
    made = IptablesDriver(rules.PARAMETERS, flavour)
    await made.prepare()
    await made.attach()
    await made.apply(Delta(add=lowered()))
    yield made
    made.close()


async def heal(driver: IptablesDriver) -> int:
    """What an agent does once it is told."""
    await driver.prepare()
    delta = Delta.between(await driver.read(), lowered())
    await driver.apply(delta)
    await driver.attach()
    return len(delta)


async def test_a_new_driver_adopts_what_is_there_without_writing(
    driver: IptablesDriver, flavour: Flavour
) -> None:
    watch = XtablesWatch(flavour)
    fresh = IptablesDriver(rules.PARAMETERS, flavour)

    await fresh.prepare()

    assert await fresh.read() == lowered()
    found = watch.look()
    # Only iptables lacks this table, so it cannot tell whose it is.
    assert found is None or found.what.startswith("del table mesh")
    watch.close()
    fresh.close()


@pytest.mark.parametrize(
    "damage",
    [
        "iptables-{} -F",
        "iptables-{} -t nat -F",
        "ip6tables-{} -t mangle -F",
        "iptables-{} -t raw -D PREROUTING -j MESH-RAW",
        "iptables-{} -t mangle -F MESH-FIRST",
        "iptables-{} -I MESH-FORWARD -j DROP",
        "iptables-{} -t nat -F MESH-POOLS",
        "iptables-{} -t nat -D MESH-P-00001 1",
        "ip6tables-{} -t nat -F MESH-P-00001",
        "iptables-{} -t nat -I MESH-P-00003 -j RETURN",
        "iptables-{} -t raw -F MESH-PEERS",
        "ipset flush",
        "ipset flush mesh-vips4",
        "ipset del mesh-nodes6 2001:db8::1",
        "ipset add mesh-known4 10.1.0.77",
    ],
)
async def test_damage_is_noticed_and_healed(
    driver: IptablesDriver, flavour: Flavour, damage: str
) -> None:
    before = chains(flavour)
    told = asyncio.create_task(driver.tampered(0))
    await asyncio.sleep(0)

    sh(*damage.format(flavour).split())
    async with asyncio.timeout(20):
        await told
    await heal(driver)

    assert chains(flavour) == before
    assert await driver.read() == lowered()


@pytest.mark.parametrize(
    "damage",
    [
        "iptables-{} -t mangle -R MESH-STAY 1 -j CONNMARK --set-xmark 0x80000/0x80001",
        "ip6tables-{} -t nat -R MESH-FRONTEND 1 -m connmark --mark 0x90001 -j RETURN",
        "ipset add mesh-vips4 10.1.0.1,udp:80 skbmark 0x1/0xffffffff -exist",
    ],
)
async def test_an_edit_that_leaves_every_size_alone_is_noticed_each_time(
    driver: IptablesDriver, flavour: Flavour, damage: str
) -> None:
    before = chains(flavour)
    for _ in range(3):
        told = asyncio.create_task(driver.tampered(0))
        await until(driver.knows_contents)

        sh(*damage.format(flavour).split())
        async with asyncio.timeout(20):
            await told
        await heal(driver)

        assert chains(flavour) == before
        assert await driver.read() == lowered()


async def test_the_kernel_tells_who_changed_chains_of_iptables_nft(flavour: Flavour) -> None:
    driver = IptablesDriver(rules.PARAMETERS, flavour)
    await driver.prepare()

    sh(f"iptables-{flavour}", "-t", "mangle", "-F", "MESH-FIRST")
    async with asyncio.timeout(20):
        told = await driver.tampered(0)

    assert told.what
    assert told.by.startswith("iptables-nft(") or flavour == "legacy"
    driver.close()


async def test_foreign_chains_and_sets_may_change_without_a_check(
    driver: IptablesDriver, flavour: Flavour
) -> None:
    sh("ipset", "create", "theirs", "hash:ip")
    sh(f"iptables-{flavour}", "-t", "nat", "-N", "THEIRS")
    await driver.prepare()
    watched = asyncio.create_task(driver.tampered(0))
    await asyncio.sleep(0)

    sh("ipset", "add", "theirs", "192.0.2.1")
    if flavour == "nft":
        sh(f"iptables-{flavour}", "-t", "nat", "-A", "THEIRS", "-j", "RETURN")
    done, _ = await asyncio.wait([watched], timeout=1)

    assert not done
    watched.cancel()


async def test_own_changes_are_not_noticed(driver: IptablesDriver, flavour: Flavour) -> None:
    watched = asyncio.create_task(driver.tampered(0))
    await asyncio.sleep(0)

    await driver.apply(Delta(remove=lowered()))
    await driver.apply(Delta(add=lowered()))
    done, _ = await asyncio.wait([watched], timeout=1)

    assert not done
    watched.cancel()


async def test_foreign_rules_chains_and_sets_outlive_ours(flavour: Flavour) -> None:
    for program in PROGRAMS:
        sh(f"{program}-{flavour}", "-N", "MESH-OTHER")
        sh(f"{program}-{flavour}", "-A", "FORWARD", "-j", "MESH-OTHER")
        sh(f"{program}-{flavour}", "-t", "nat", "-A", "POSTROUTING", "-o", "eth9", "-j", "ACCEPT")
    sh("ipset", "create", "mesh-other", "hash:ip")
    before = chains(flavour)
    driver = IptablesDriver(rules.PARAMETERS, flavour)
    await driver.prepare()
    await driver.apply(Delta(add=lowered()))

    await driver.remove()

    after = {p: {t: c for t, c in tables.items() if c} for p, tables in chains(flavour).items()}
    assert after == {p: {t: c for t, c in tables.items() if c} for p, tables in before.items()}
    assert sh("ipset", "list", "-n").split() == ["mesh-other"]
    driver.close()


async def test_a_change_that_fails_half_way_is_undone_and_names_the_culprit(
    driver: IptablesDriver, flavour: Flavour
) -> None:
    port = Frontend(Scope.INGRESS, None, Protocol.TCP, 31000)
    more = nft.lower(Forwarding("more", (port,), (Backend("10.0.1.9", 80),)), Ids())
    more = {(n, k): v for (n, k), v in more.items() if n not in ("meshports6", "targets4")}
    mark = elements.mark_bytes(0x7010001)
    more["targets4", mark + elements.mark_bytes(0)] = bytes((10, 0, 1, 9, 0, 80, 0, 0))
    more["nodes4", bytes(4)] = b""  # ipset cannot hold it
    before = chains(flavour)

    with pytest.raises(ApplyFailed, match=r"mesh-nodes4 0\.0\.0\.0"):
        await driver.apply(Delta(add=more))

    assert chains(flavour) == before
    assert await driver.read() == lowered()


async def test_one_flavour_goes_and_the_other_stays_whole(flavour: Flavour) -> None:
    other: Flavour = "nft" if flavour == "legacy" else "legacy"
    old, new = (IptablesDriver(rules.PARAMETERS, each) for each in (other, flavour))
    await old.prepare()
    await old.apply(Delta(add=lowered()))
    await new.prepare()
    await new.apply(Delta.between(await new.read(), lowered()))
    await new.attach()

    await old.remove()
    await new.prepare()

    assert await new.read() == lowered()
    assert "table bridge mesh" in sh("nft", "list", "tables")
    assert not any("MESH" in f"{tables}" for tables in chains(other).values())
    old.close()
    new.close()


# ---- with packets


@pytest.fixture(scope="module", params=FLAVOURS)
def world(request: pytest.FixtureRequest) -> Iterator[OneNode]:
    frontends = tuple(Frontend(Scope.INGRESS, None, p, PUBLISHED) for p in Protocol)
    pool = tuple(Backend(a, SERVER_PORT) for a in ADDRESSES["c1"])
    here = (Frontend(Scope.INGRESS, None, Protocol.UDP, AFFINE),)
    both = tuple(Backend(a, SERVER_PORT) for name in CONTAINERS for a in ADDRESSES[name])
    with one_node(f"iptables-{request.param}") as made:
        affine = Forwarding("affine", here, both, Affinity.CLIENT_IP)
        made.publish([Forwarding("web", frontends, pool), affine])
        yield made


BOTH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"v{family.suffix}")


def answers(family: Family, protocol: Protocol) -> bool:
    index = FAMILIES.index(family)
    answer = ask("client", protocol, ADDRESSES["node"][index], PUBLISHED)
    return answer == f"c1 {ADDRESSES['client'][index]}"


@BOTH
@pytest.mark.parametrize("protocol", Protocol, ids=lambda protocol: protocol.value)
def test_a_policy_of_drop_does_not_stop_published_ports(
    world: OneNode, family: Family, protocol: Protocol
) -> None:
    program = f"{PROGRAMS[FAMILIES.index(family)]}-{world.driver.name.partition('-')[2]}"
    world.node.sh(program, "-P", "FORWARD", "DROP")
    try:
        assert answers(family, protocol)
    finally:
        world.node.sh(program, "-P", "FORWARD", "ACCEPT")


@BOTH
def test_other_peoples_packet_marks_are_kept(world: OneNode, family: Family) -> None:
    program = f"{PROGRAMS[FAMILIES.index(family)]}-{world.driver.name.partition('-')[2]}"
    mark = "-t mangle -I PREROUTING 1 -i under0 -j MARK --set-mark 0x12345"
    check = "-t mangle -A FORWARD -i under0 -m mark ! --mark 0x12345/0xfffff -j DROP"
    for rule in (mark, check):
        world.node.sh(program, *rule.split())
    try:
        assert all(answers(family, protocol) for protocol in Protocol)
    finally:
        for rule in (mark.replace("-I PREROUTING 1", "-D PREROUTING"), check.replace("-A", "-D")):
            world.node.sh(program, *rule.split())


@BOTH
def test_a_client_has_the_same_replica_on_every_node(world: OneNode, family: Family) -> None:
    index, end = FAMILIES.index(family), family.suffix
    held = world.node.run(world.driver.read())
    key = elements.proto_bytes(Protocol.UDP.number) + elements.port_bytes(AFFINE)
    mark = held[f"meshports{end}", key]
    names = {address.packed(ADDRESSES[name][index]): name for name in CONTAINERS}
    told, real = {}, {}

    for source in (pair[index] for pair in CROWD):
        slot = xtables_pools.slot_of(source, elements.mark_of(mark), marks.DEFAULT)
        target = held[f"targets{end}", mark + elements.mark_bytes(slot)]
        told[source] = f"{names[target[:-4]]} {source}"
        there = ADDRESSES["node"][index]
        real[source] = ask("client", Protocol.UDP, there, AFFINE, source=source)

    assert told == real

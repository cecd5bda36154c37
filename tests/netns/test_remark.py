"""Marks that are rewritten for another layout, and what is held back meanwhile."""

from __future__ import annotations

import socket
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest

from mesh.agent import remark as agent_remark
from mesh.dataplane import command
from mesh.dataplane.conntrack import Conntrack
from mesh.dataplane.firewall import Firewall
from mesh.dataplane.hold import TABLE, Held, Hold
from mesh.delta import Delta
from mesh.engine import backend
from mesh.errors import HostNotReady, MeshError
from mesh.model.publish import Protocol
from mesh.rules import nft
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.ids import Ids
from mesh.rules.marks import Layout
from mesh.rules.needs import Wanted
from mesh.rules.remark import Remark
from tests.support import drivers, rules
from tests.support.layouts import ALL, LOW
from tests.support.namespaces import run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mesh.engine.backend import Chosen
    from mesh.rules.elements import Elements

pytestmark = pytest.mark.netns

OTHER: Final = Layout.of(0xFFF00000, 0xFFFFFFF0)
"""As LOW, it leaves the four lowest bits to the host."""

HOSTS: Final = 0x5


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with rules.namespace(), ExitStack() as stack:
        run("ip", "link", "set", "lo", "up")
        yield stack


def endpoint(sockets: ExitStack, port: int = 0) -> socket.socket:
    made = sockets.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    made.settimeout(0.2)
    if port:
        made.bind(("127.0.0.1", port))
    return made


def mark_flows(wanted: Mapping[int, int], more: str = "") -> None:
    """Let flows to these UDP ports be marked, and pings as the first of them."""
    marks = ", ".join(f"{port} : {mark:#x}" for port, mark in wanted.items())
    first = next(iter(wanted.values()))
    rules.nft(
        "table inet x {\n"
        f"chain early {{\ntype filter hook output priority -300\n{more}\n}}\n"
        "chain late {\ntype filter hook output priority 0\n"
        f"ct mark set udp dport map {{ {marks} }}\n"
        f"icmp type echo-request ct mark set {first:#x}\n"
        "}\n}"
    )


def flow_marks() -> dict[str, int]:
    """The mark of each flow in the table, by its UDP port or "icmp"."""
    found = {}
    for line in run("conntrack", "-L", "-o", "extended").splitlines():
        # The original direction comes first.
        words = dict(word.split("=") for word in reversed(line.split()) if "=" in word)
        found["icmp" if "icmp" in line else words["dport"]] = int(words["mark"])
    return found


@pytest.mark.parametrize("zone", ["", "ct zone set 7", "ct original zone set 7"])
async def test_flows_of_ours_are_rewritten_and_nobody_elses(sockets: ExitStack, zone: str) -> None:
    old, new = LOW, OTHER
    held = {1000: old.plain, 1001: old.frontend(5, 3, hashed=True), 1002: old.arrival(7)}
    wanted = {1000: new.plain, 1001: new.frontend(5, 3, hashed=True), 1002: new.arrival(7)}
    foreign = 0xFFFFFFFF & ~old.ours
    mark_flows({port: mark | HOSTS for port, mark in held.items()} | {1003: foreign}, zone)
    sender = endpoint(sockets)
    for port in (*held, 1003):
        sender.sendto(b"?", ("127.0.0.255", port))
    run("ping", "-c1", "127.0.0.1")
    change = Remark({}, old, new)

    with closing(Conntrack(new)) as conntrack:
        count = await conntrack.remark(old.ours, change.mask, change.mark)

    assert count == len(held) + 1
    assert flow_marks() == {
        "icmp": wanted[1000] | HOSTS,
        "1003": foreign,
        **{str(port): mark | HOSTS for port, mark in wanted.items()},
    }


async def test_hundreds_of_flows_are_rewritten_once(sockets: ExitStack) -> None:
    """Also where what a flow becomes looks as if it were of the old layout."""
    mark_flows({port: LOW.frontend(1, 1) for port in range(1000, 1300)})
    sender = endpoint(sockets)
    for port in range(1000, 1300):
        sender.sendto(b"?", ("127.0.0.255", port))

    with closing(Conntrack(LOW)) as conntrack:
        count = await conntrack.remark(LOW.ours, LOW.ct_mark, lambda mark: mark + (1 << LOW.shift))

    assert count == 300
    assert set(flow_marks().values()) == {LOW.frontend(1, 2)}


async def test_a_cleanup_leaves_the_bits_to_the_host(sockets: ExitStack) -> None:
    mark_flows({1000: LOW.frontend(1, 1) | HOSTS, 1001: HOSTS})
    for port in (1000, 1001):
        endpoint(sockets).sendto(b"?", ("127.0.0.255", port))

    await agent_remark.give_back(LOW)

    assert flow_marks() == {"1000": HOSTS, "1001": HOSTS}


def frontends(port: int) -> Elements:
    frontend = Frontend(Scope.INGRESS, None, Protocol.UDP, port)
    return nft.lower(Forwarding("web", (frontend,), ()), Ids())


def arrives(client: socket.socket, server: socket.socket) -> bool:
    """Whether a datagram does."""
    try:
        client.sendto(b"?", server.getsockname())
        server.recv(10)
    except (PermissionError, TimeoutError):
        return False
    return True


async def test_flows_of_ours_and_new_ones_to_our_ports_are_held_and_no_others(
    sockets: ExitStack,
) -> None:
    mark_flows({2000: LOW.plain, 2001: OTHER.plain, 2002: HOSTS})
    servers = {port: endpoint(sockets, port) for port in (2000, 2001, 2002, 2003, 2004)}
    flows = {port: endpoint(sockets) for port in servers}
    before = {port: arrives(flows[port], server) for port, server in servers.items()}
    bits = frozenset((LOW.ours, OTHER.ours))
    what = Held(bits, ("10.1.0.0/16", "fd00::/64"), frontends(2003))

    with closing(Hold()) as hold:
        nothing = await hold.doubtful()
        await hold.begin(what)
        doubtful = await hold.doubtful()
        during = {port: arrives(flows[port], server) for port, server in servers.items()}
        await hold.settle(what)
        settled = await hold.doubtful()
        still = arrives(flows[2000], servers[2000])
        hold.end()
        hold.end()

    assert all(before.values())
    assert (nothing, doubtful, settled) == (frozenset(), bits, frozenset())
    assert during == {2000: False, 2001: False, 2002: True, 2003: False, 2004: True}
    assert not still
    assert arrives(flows[2000], servers[2000])
    assert arrives(flows[2003], servers[2003])
    assert TABLE not in await command.run("nft", "list", "tables")


# ---- as an agent begins


class Start:
    """What an agent does about its network, which may fail."""

    def __init__(self, *failures: MeshError) -> None:
        self.failures = list(failures)
        self.called = 0

    async def __call__(self) -> None:
        self.called += 1
        if self.failures:
            raise self.failures.pop()


async def loaded(name: str, layout: Layout) -> Elements:
    """Load a program and elements of some services; which these are."""
    driver = drivers.make(name, replace(rules.PARAMETERS, layout=layout))
    with closing(driver):
        await driver.prepare()
        wanted = nft.lower_peer(rules.CLUSTER.network(2), layout)
        frontend = Frontend(Scope.INGRESS, None, Protocol.UDP, 2000)
        pool = tuple(Backend(f"10.0.1.{n}", 80) for n in range(2, 5))
        wanted |= nft.lower(Forwarding("web", (frontend,), pool), Ids(layout))
        await driver.apply(Delta(add=wanted))
        await driver.attach()
        return wanted


async def held(name: str, layout: Layout) -> Elements:
    with closing(drivers.make(name, replace(rules.PARAMETERS, layout=layout))) as driver:
        return await driver.read()


async def is_held() -> bool:
    return TABLE in await command.run("nft", "list", "tables")


@pytest.mark.usefixtures("sockets")
@pytest.mark.parametrize("layout", ALL.values(), ids=ALL)
@pytest.mark.parametrize("name", drivers.KERNEL)
async def test_rules_tell_their_layout(name: str, layout: Layout) -> None:
    nothing = await backend.layout(rules.PARAMETERS)
    await loaded(name, layout)

    assert nothing is None
    assert await backend.layout(rules.PARAMETERS) == layout


@pytest.mark.usefixtures("sockets")
@pytest.mark.parametrize("name", drivers.KERNEL)
async def test_where_nothing_changes_only_the_network_is_started(name: str) -> None:
    await loaded(name, LOW)
    before = await command.run("nft", "list", "ruleset")
    start = Start()

    await agent_remark.settle(name, replace(rules.PARAMETERS, layout=LOW), start)

    assert start.called == 1
    assert await command.run("nft", "list", "ruleset") == before


@pytest.mark.usefixtures("sockets")
@pytest.mark.parametrize("new", drivers.KERNEL)
@pytest.mark.parametrize("old", drivers.KERNEL)
async def test_elements_are_taken_along_also_to_another_backend(old: str, new: str) -> None:
    before = await loaded(old, LOW)
    start = Start()

    await agent_remark.settle(new, replace(rules.PARAMETERS, layout=OTHER), start)

    assert start.called == 1
    assert await held(new, OTHER) == Remark(before, LOW, OTHER).elements(before)
    assert await backend.layout(rules.PARAMETERS) == OTHER
    assert not await is_held()


@pytest.mark.usefixtures("sockets")
@pytest.mark.parametrize("flavour", ["nft", "legacy"])
async def test_a_firewall_that_drops_knows_flows_by_their_new_mark(flavour: str) -> None:
    program = f"iptables-{flavour}"
    await loaded("nftables", LOW)
    run(program, "-P", "FORWARD", "DROP")
    before = replace(rules.PARAMETERS, layout=LOW)
    with closing(Firewall(ignored=0)) as firewall:
        await firewall.sync(Wanted.of(before, 51820, frozenset()))

    await agent_remark.settle("nftables", replace(rules.PARAMETERS, layout=OTHER), Start())

    (line,) = run(program, "-S", "FORWARD").splitlines()[1:]
    assert f"--mark {OTHER.ours:#x}/{OTHER.ours:#x}" in line


async def test_rules_that_cannot_be_loaded_leave_the_old_ones_in_force(
    sockets: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await loaded("nftables", LOW)
    mark_flows({1000: LOW.plain})
    endpoint(sockets).sendto(b"?", ("127.0.0.255", 1000))
    start = Start()

    async def choose(*_: object) -> Chosen:
        raise HostNotReady("no room")

    monkeypatch.setattr(backend, "choose", choose)
    with pytest.raises(HostNotReady, match="no room"):
        await agent_remark.settle("nftables", replace(rules.PARAMETERS, layout=OTHER), start)

    assert start.called == 0
    assert await held("nftables", LOW) == before
    assert flow_marks() == {"1000": LOW.plain}
    assert not await is_held()


async def test_flows_wait_until_the_network_is_there_and_are_not_forgotten(
    sockets: ExitStack,
) -> None:
    await loaded("nftables", LOW)
    mark_flows({1000: LOW.plain})
    endpoint(sockets).sendto(b"?", ("127.0.0.255", 1000))
    start = Start(HostNotReady("no tun device"))
    parameters = replace(rules.PARAMETERS, layout=OTHER)

    with pytest.raises(HostNotReady, match="no tun device"):
        await agent_remark.settle("nftables", parameters, start)
    meanwhile = await is_held()
    await agent_remark.settle("nftables", parameters, start)

    assert meanwhile
    assert start.called == 2
    assert flow_marks() == {"1000": OTHER.plain}
    assert not await is_held()

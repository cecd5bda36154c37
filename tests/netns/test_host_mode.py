"""Host mode on one node, with real packets: each failure of Warren's three literal rules per port,
and of those who wrote the like, is a test that must pass here on every backend.

Those that are tests elsewhere already:

| failure | test |
|---|---|
| the container sees the node, not the client | netns/test_dispatch, cluster/test_mesh_matrix |
| a node that does not run the task answers, or hangs | cluster/test_mesh_matrix (host mode) |
| two services, replicas or a later one get one port | unit/test_host_ports, unit/test_node_ports |
| FORWARD policy DROP (Docker) | netns/test_firewall, netns/test_real_firewalls |
| half of a change stays where the kernel refuses the rest | contract/test_rule_drivers |
| rules of before an agent's restart, or of another backend, stay | cluster/test_mesh_backends |
| `hostPort: 0`; numbers that are forgotten by a restart | cluster/test_mesh_publish |
| UDP clients stay with a task that is gone | netns/test_conntrack, cluster/test_mesh_udp |
| a flush or reload of the firewall loses the ports | cluster/test_mesh_healing |
"""

from __future__ import annotations

import socket
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from mesh.dataplane import netns, sysctl
from mesh.dataplane.link import LinkDriver
from mesh.delta import Delta
from mesh.model import link
from mesh.model.address import FAMILIES, Family
from mesh.model.publish import Protocol
from mesh.rules import marks
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.wg import links
from tests.support import drivers, rules
from tests.support.echo import REFUSED, ask
from tests.support.frames import Datagram
from tests.support.namespaces import Namespace, run, wire
from tests.support.onenode import ADDRESSES, SERVER_PORT, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.netns

NAMES: Final = link.DeviceNames(*rules.DEVICES[:3])
FAR: Final = {"far": ("198.51.100.2", "fd51::2"), "edge": ("198.51.100.1", "fd51::1")}
"""A host behind the node, and the node's address there."""

WILD, ONLY, LOCAL, SINK = 31000, 31001, 31002, 31003
"""Published: on every address, and on the far host's; on one of the node's; on loopback addresses;
and on these over UDP, to a port of c2 that only listens.  One more is that port for everybody."""

SILENT: Final = 9998


def _ports(to: str = "c2") -> list[Forwarding]:
    return [each for protocol in Protocol for each in _ports_of(protocol, to)]


def _ports_of(protocol: Protocol, to: str) -> Iterator[Forwarding]:
    backends = tuple(Backend(a, SERVER_PORT) for a in ADDRESSES[to])
    bound = {"node": ONLY, "far": WILD, "loopback": LOCAL}
    yield Forwarding(
        f"wild/{protocol.value}", (Frontend(Scope.NODE, None, protocol, WILD),), backends
    )
    for place, port in bound.items():
        frontends = tuple(
            Frontend(Scope.HOST_IP, address, protocol, port) for address in _addresses(place)
        )
        yield Forwarding(f"{place}/{protocol.value}", frontends, backends)


def _sinks() -> Forwarding:
    frontends = (
        *(Frontend(Scope.HOST_IP, a, Protocol.UDP, SINK) for a in ADDRESSES["loopback"]),
        Frontend(Scope.NODE, None, Protocol.UDP, SINK + 1),
    )
    backends = tuple(Backend(a, SILENT) for a in ADDRESSES["c2"])
    return Forwarding("sinks/udp", frontends, backends)


def _addresses(name: str) -> tuple[str, str]:
    return {**ADDRESSES, **FAR}[name]


def address_of(name: str, family: Family) -> str:
    return _addresses(name)[FAMILIES.index(family)]


@pytest.fixture(scope="module", params=drivers.KERNEL)
def world(request: pytest.FixtureRequest) -> Iterator[OneNode]:
    with ExitStack() as stack:
        made = stack.enter_context(one_node(request.param))
        far = Namespace("far")
        stack.callback(far.close)
        edge = [f"{a}/{n}" for a, n in zip(FAR["edge"], (24, 64), strict=True)]
        wire(made.node, "far0", far, "eth0", *edge)
        for address, length, gateway in zip(FAR["far"], (24, 64), FAR["edge"], strict=True):
            dad = ["nodad"] if ":" in address else []
            far.sh("ip", "addr", "add", f"{address}/{length}", "dev", "eth0", *dad)
            far.sh("ip", "route", "add", "default", "via", gateway)
        made.servers.start("far", "far", WILD)
        _allow_loopback(made, stack)
        made.publish([*_ports(), _sinks()])
        yield made


def _allow_loopback(world: OneNode, stack: ExitStack) -> None:
    """What an agent does beyond rules where `loopback_ports` is set."""
    cluster, network = rules.CLUSTER, rules.PARAMETERS.network
    local = links.Local(NAMES, 1500, marks.DEFAULT, loopback=True)
    planned = links.plan(local, cluster, network, ())
    wanted: dict[link.LinkKey, link.LinkValue] = {
        key: value for key, value in planned.items() if isinstance(value, link.Local)
    }
    driver = LinkDriver(NAMES)
    stack.callback(lambda: world.node.run(driver.close()))
    world.node.run(driver.apply(Delta({}, wanted)))
    settings = sysctl.desired(NAMES, loopback=True)
    key = f"net/ipv4/conf/{NAMES.bridge}/route_localnet"
    problems = world.node.run(
        sysctl.SysctlDriver(Path("/proc/sys")).apply(Delta({}, {key: settings[key]}))
    )
    assert (list(wanted.values()), problems) == ([link.Local(NAMES.bridge)], ())


BOTH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"v{family.suffix}")
EACH = pytest.mark.parametrize("protocol", Protocol, ids=lambda protocol: protocol.value)


@BOTH
@EACH
@pytest.mark.parametrize(
    ("who", "target", "port", "server", "seen"),
    [
        # From outside, from the node by each of its addresses, from a container beside it.
        ("client", "node", WILD, "c2", "client"),
        ("far", "node", WILD, "c2", "far"),
        ("far", "edge", WILD, "c2", "far"),
        ("node", "node", WILD, "c2", "node"),
        ("node", "edge", WILD, "c2", "edge"),
        ("c1", "edge", WILD, "c2", "c1"),
        # The task calls its own published port, by any address of the node.
        ("c2", "node", WILD, "c2", "gateway"),
        ("c2", "gateway", WILD, "c2", "gateway"),
        ("c2", "edge", WILD, "c2", "gateway"),
        ("c2", "node", ONLY, "c2", "gateway"),
        # One address of the node.
        ("client", "node", ONLY, "c2", "client"),
        ("node", "node", ONLY, "c2", "node"),
        # What goes through the node to somebody else's port of the same number stays his: neither
        # transit, nor what containers and the node call outside, is hijacked; not by a port of all
        # addresses, nor by one that names an address which is not the node's (CVE-2025-67499).
        ("client", "far", WILD, "far", "client"),
        ("c1", "far", WILD, "far", "edge"),
        ("c2", "far", WILD, "far", "edge"),
        ("node", "far", WILD, "far", "edge"),
        # On its loopback addresses, for the node itself.
        ("node", "loopback", LOCAL, "c2", "gateway"),
    ],
)
def test_who_answers_at_a_host_port_and_whom_he_sees(
    world: OneNode, family: Family, protocol: Protocol, who: str, target: str, port: int,
    server: str, seen: str,
) -> None:  # fmt: skip
    answer = ask(who, protocol, address_of(target, family), port)

    assert answer == f"{server} {address_of(seen, family)}"


@BOTH
@EACH
@pytest.mark.parametrize(
    ("who", "target", "port"),
    [
        # Bound to one address, on the others.
        ("client", "edge", ONLY),
        ("c1", "gateway", ONLY),
        ("node", "edge", ONLY),
        ("node", "loopback", ONLY),
        # On loopback addresses only what names them.
        ("node", "loopback", WILD),
        ("client", "node", LOCAL),
        ("c1", "gateway", LOCAL),
        ("node", "node", LOCAL),
    ],
)
def test_a_host_port_is_refused_where_it_is_not_published(
    world: OneNode, family: Family, protocol: Protocol, who: str, target: str, port: int
) -> None:
    assert ask(who, protocol, address_of(target, family), port) == REFUSED


@BOTH
@EACH
def test_after_a_task_was_replaced_no_rule_of_before_wins(
    world: OneNode, family: Family, protocol: Protocol
) -> None:
    there = address_of("node", family)
    try:
        world.publish([*_ports("c1"), _sinks()])
        replaced = ask("client", protocol, there, WILD)
        own = ask("node", protocol, address_of("loopback", family), LOCAL)
    finally:
        world.publish([*_ports(), _sinks()])

    assert replaced == f"c1 {address_of('client', family)}"
    assert own == f"c1 {address_of('gateway', family)}"
    assert ask("client", protocol, there, WILD) == f"c2 {address_of('client', family)}"


def test_nothing_is_left_of_ports_that_went(world: OneNode) -> None:
    """Warren leaves three rules per port at each stop."""
    world.publish([])
    before = _everything(world)

    for _ in range(3):
        world.publish([*_ports(), _sinks()])
        world.publish(_ports("c1"))
        world.publish([])
    after = _everything(world)
    refused = {ask("client", Protocol.TCP, a, WILD) for a in ADDRESSES["node"]}
    world.publish([*_ports(), _sinks()])

    assert after == before
    assert refused == {REFUSED}


def _everything(world: OneNode) -> str:
    """Every rule and element of a node, without counters."""
    if world.driver.name == "nftables":
        return world.node.sh("nft", "-s", "list", "ruleset")
    flavour = world.driver.name.removeprefix("iptables-")
    saves = [world.node.sh(f"ip{six}tables-{flavour}-save") for six in ("", "6")]
    rules_only = [line for text in saves for line in text.splitlines() if line[:1] == "-"]
    return "\n".join([*rules_only, *sorted(world.node.sh("ipset", "save").splitlines())])


@BOTH
def test_loopback_addresses_are_nobodys_but_the_nodes(world: OneNode, family: Family) -> None:
    """CVE-2020-8558: neighbours and containers send to 127.0.0.1 and from it, by force."""
    loopback, index = address_of("loopback", family), FAMILIES.index(family)
    node, c2 = ADDRESSES["node"][index], ADDRESSES["c2"][index]
    with ExitStack() as stack:
        sinks = {
            "published": _sink(stack, "c2", family, "", SILENT),
            "node": _sink(stack, "node", family, loopback, SILENT),
        }
        for who, device in (("client", "under0"), ("c1", rules.DEVICES.bridge)):
            own = ADDRESSES[who][index]
            hostile = [
                *(Datagram(own, loopback, port, b"to") for port in (SILENT, SINK)),
                *(Datagram("0.0.0.0", loopback, p, b"0") for p in (SILENT, SINK) if not index),
                *(Datagram(loopback, to, port, b"from") for to, port in product(
                    (loopback, node, c2), (SILENT, SINK, SINK + 1))),
            ]  # fmt: skip
            last = Datagram(own, node, SINK + 1, b"last")
            _send(stack, who, device, [*hostile, last])
            assert _until_last(sinks["published"]) == set(), who
        with netns.entered("/run/netns/node"):
            near = stack.enter_context(socket.socket(sinks["node"].family, socket.SOCK_DGRAM))
        near.sendto(b"last", (loopback, SILENT))
        assert _until_last(sinks["node"]) == set()
        near.sendto(b"last", (loopback, SINK))
        assert _until_last(sinks["published"]) == set()


def _sink(stack: ExitStack, name: str, family: Family, address: str, port: int) -> socket.socket:
    domain = socket.AF_INET if family is Family.V4 else socket.AF_INET6
    with netns.entered(f"/run/netns/{name}"):
        sink = stack.enter_context(socket.socket(domain, socket.SOCK_DGRAM))
    sink.bind((address, port))
    sink.settimeout(30)
    return sink


def _until_last(sink: socket.socket) -> set[bytes]:
    found = set()
    while (said := sink.recv(100)) != b"last":
        found.add(said)
    return found


def _send(stack: ExitStack, who: str, device: str, datagrams: list[Datagram]) -> None:
    """Put datagrams on somebody's link to the node, whatever their addresses."""
    source, target = _mac(who, "eth0"), _mac("node", device)
    with netns.entered(f"/run/netns/{who}"):
        wired = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
    wired.bind(("eth0", 0))
    for datagram in datagrams:
        wired.send(datagram.frame(source, target))


def _mac(name: str, device: str) -> str:
    return run("ip", "netns", "exec", name, "cat", f"/sys/class/net/{device}/address").strip()

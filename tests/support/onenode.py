"""One node with its program, two containers on its bridge, and a client on its network."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from mesh.dataplane import netns
from mesh.delta import Delta
from mesh.model.address import FAMILIES, Family
from mesh.rules import guards, marks, nft
from mesh.rules.guards import Guards, Numbers
from mesh.rules.ids import Ids
from tests.support import drivers, rules
from tests.support.echo import EchoServers
from tests.support.namespaces import Namespace, nodad, wire, write_sysctls

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mesh.dataplane.protocol import Driver
    from mesh.rules.elements import Elements
    from mesh.rules.forwarding import Forwarding
    from mesh.rules.marks import Layout

NETWORK: Final = rules.PARAMETERS.network
CONTAINERS: Final = ("c1", "c2")
SERVER_PORT: Final = 8080

_PREFIX: Final = "fd11:2233:4455"
ADDRESSES: Final[dict[str, tuple[str, str]]] = {
    "client": ("192.0.2.10", "2001:db8::10"),
    "node": ("192.0.2.1", "2001:db8::1"),
    "peer": ("192.0.2.20", "2001:db8::20"),
    "overlay": (NETWORK.overlay[0], NETWORK.overlay[1]),
    "gateway": (NETWORK.gateway(Family.V4), NETWORK.gateway(Family.V6)),
    "loopback": ("127.0.0.1", "::1"),
    "c1": ("10.0.1.2", f"{_PREFIX}:1::2"),
    "c2": ("10.0.1.3", f"{_PREFIX}:1::3"),
}
"""IPv4 and IPv6 address of everything with a name; `peer` is a node that is not there."""

CROWD: Final = tuple((f"192.0.2.{n}", f"2001:db8::{n:x}") for n in range(100, 116))
"""More addresses of the client."""

_SYSCTLS: Final = {
    "ipv4/ip_forward": "1",
    "ipv6/conf/all/forwarding": "1",
    "ipv4/conf/all/rp_filter": "1",
    "ipv4/conf/default/rp_filter": "1",
    "ipv4/conf/all/send_redirects": "0",
    "ipv4/conf/default/send_redirects": "0",
    # Refusals are what is tested; the kernel would answer one a second.
    "ipv4/icmp_ratelimit": "0",
    "ipv6/icmp/ratelimit": "0",
    "bridge/bridge-nf-call-iptables": "0",
    "bridge/bridge-nf-call-ip6tables": "0",
}

_NO_GUARDS: Final = Guards()


@dataclass(frozen=True, slots=True)
class OneNode:
    """The world, and the driver that loaded its program."""

    node: Namespace
    client: Namespace
    driver: Driver
    servers: EchoServers
    ids: Ids
    numbers: Numbers

    def publish(self, forwardings: Iterable[Forwarding], guarded: Guards = _NO_GUARDS) -> None:
        """Install forwardings, this node's addresses and its containers, who may connect to them,
        and nothing else.
        """
        wanted = self.lowered(forwardings) | guards.lower(guarded, self.numbers)

        async def install() -> None:
            await self.driver.apply(Delta.between(await self.driver.read(), wanted))

        self.node.run(install())

    def starts_again(self) -> bool:
        """What a fresh agent's driver does; whether it had to load anything."""
        with netns.entered("/run/netns/node"):
            fresh = drivers.make(self.driver.name, rules.PARAMETERS)

        async def start() -> bool:
            loaded = await fresh.prepare()
            await fresh.attach()
            await fresh.read()
            return loaded

        try:
            return self.node.run(start())
        finally:
            fresh.close()

    def lowered(self, forwardings: Iterable[Forwarding]) -> Elements:
        """The elements of forwardings, of the nodes' addresses and of this one's containers."""
        nodes = (a for name in ("node", "overlay", "gateway", "peer") for a in ADDRESSES[name])
        wanted = nft.lower_nodes(nodes)
        wanted |= nft.lower_hairpins(a for name in CONTAINERS for a in ADDRESSES[name])
        for forwarding in forwardings:
            wanted |= nft.lower(forwarding, self.ids)
        return wanted


@contextmanager
def one_node(backend: str = "nftables", layout: Layout = marks.DEFAULT) -> Iterator[OneNode]:
    """Build it all, with a driver of tests.support.drivers; take it down again."""
    with ExitStack() as stack:

        def namespace(name: str) -> Namespace:
            made = Namespace(name)
            stack.callback(made.close)
            write_sysctls(name, {"ipv6/conf/default/accept_dad": "0"})
            return made

        node, client = namespace("node"), namespace("client")
        _configure(node)
        wire(node, "under0", client, "eth0", *_with_lengths("node", 24, 64))
        _settle(client, "client", "node", 24, 64)
        for address in (f"{a}/{n}" for pair in CROWD for a, n in zip(pair, (24, 64), strict=True)):
            # Never chosen as a source by the kernel, only by who binds to it.
            words = ("dev", "eth0", *nodad(address), "preferred_lft", "0")
            client.sh("ip", "addr", "add", address, *words)
        servers = EchoServers()
        stack.callback(servers.close)
        for name in CONTAINERS:
            container = namespace(name)
            wire(node, name, container, "eth0")
            node.sh("ip", "link", "set", name, "master", rules.DEVICES.bridge)
            _settle(container, name, "gateway", 24, 64)
            servers.start(name, name, SERVER_PORT)
        with netns.entered("/run/netns/node"):
            driver = drivers.make(backend, replace(rules.PARAMETERS, layout=layout))
        stack.callback(driver.close)
        node.run(driver.prepare())
        node.run(driver.attach())
        yield OneNode(node, client, driver, servers, Ids(layout), Numbers())


def _with_lengths(name: str, *lengths: int) -> list[str]:
    return [f"{a}/{n}" for a, n in zip(ADDRESSES[name], lengths, strict=True)]


def _configure(node: Namespace) -> None:
    """The node's devices, as its agent makes them; a link to nowhere stands for WireGuard."""
    write_sysctls(node.name, _SYSCTLS)
    devices = rules.DEVICES
    bridge = ("name", devices.bridge, "address", devices.bridge_mac, "type", "bridge")
    node.sh("ip", "link", "add", *bridge)
    node.sh("ip", "link", "add", devices.overlay, "type", "veth", "peer", "name", "nowhere")
    node.sh("ip", "link", "set", "nowhere", "up")
    for device, addresses in (
        (devices.bridge, _with_lengths("gateway", 24, 64)),
        (devices.overlay, _with_lengths("overlay", 32, 128)),
    ):
        for address in addresses:
            node.sh("ip", "addr", "add", address, "dev", device, *nodad(address))
        node.sh("ip", "link", "set", device, "up")
    for family in FAMILIES:
        source = NETWORK.overlay_address(family)
        vips = rules.CLUSTER.vips(family)
        node.sh("ip", "route", "add", vips, "dev", devices.overlay, "src", source)


def _settle(namespace: Namespace, name: str, gateway: str, *lengths: int) -> None:
    """Give eth0 its addresses and default routes."""
    for address in _with_lengths(name, *lengths):
        namespace.sh("ip", "addr", "add", address, "dev", "eth0", *nodad(address))
    for address in ADDRESSES[gateway]:
        namespace.sh("ip", "route", "add", "default", "via", address)

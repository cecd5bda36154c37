"""A host in no cluster: two containers on a bridge as container engines make it, one on another,
and a client on its network.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from mesh.dataplane import netns
from mesh.hostports import HostPortPublisher
from mesh.model.publish import Protocol
from tests.support.echo import EchoServers, ask
from tests.support.namespaces import Namespace, nodad, wire, write_sysctls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOST: Final = "/run/netns/host"
SERVER_PORT: Final = 8080

ADDRESSES: Final[dict[str, tuple[str, str]]] = {
    "client": ("192.0.2.10", "2001:db8::10"),
    "host": ("192.0.2.1", "2001:db8::1"),
    "docker0": ("172.17.0.1", "fd17::1"),
    "c1": ("172.17.0.2", "fd17::2"),
    "c2": ("172.17.0.3", "fd17::3"),
    # A mesh has these by default; this host is not of one.
    "other0": ("10.0.1.1", "fd10::1"),
    "c3": ("10.0.1.2", "fd10::2"),
}
_BRIDGES: Final = {"docker0": (("c1", "c2"), (16, 64)), "other0": (("c3",), (24, 64))}
_SYSCTLS: Final = {
    "ipv4/ip_forward": "1",
    "ipv6/conf/all/forwarding": "1",
    "ipv4/icmp_ratelimit": "0",
    "ipv6/icmp/ratelimit": "0",
    "bridge/bridge-nf-call-iptables": "0",
    "bridge/bridge-nf-call-ip6tables": "0",
}


@contextmanager
def lone_host() -> Iterator[Namespace]:
    """Build it all, with servers in the containers; take it down again."""
    with ExitStack() as stack:

        def namespace(name: str) -> Namespace:
            made = Namespace(name)
            stack.callback(made.close)
            write_sysctls(name, {"ipv6/conf/default/accept_dad": "0"})
            return made

        host, client = namespace("host"), namespace("client")
        write_sysctls("host", _SYSCTLS)
        wire(host, "eth0", client, "eth0", *_with_lengths("host", (24, 64)))
        _settle(client, "client", "host", (24, 64))
        servers = EchoServers()
        stack.callback(servers.close)
        for bridge, (containers, lengths) in _BRIDGES.items():
            host.sh("ip", "link", "add", bridge, "type", "bridge")
            for each in _with_lengths(bridge, lengths):
                host.sh("ip", "addr", "add", each, "dev", bridge, *nodad(each))
            host.sh("ip", "link", "set", bridge, "up")
            for name in containers:
                container = namespace(name)
                wire(host, f"veth-{name}", container, "eth0")
                host.sh("ip", "link", "set", f"veth-{name}", "master", bridge)
                _settle(container, name, bridge, lengths)
                servers.start(name, name, SERVER_PORT)
        yield host


def publisher(state_dir: Path, backend: str) -> HostPortPublisher:
    """One that works on this host, whatever thread it is used from."""
    with netns.entered(HOST):
        return HostPortPublisher(state_dir, backend=backend)


def _with_lengths(name: str, lengths: tuple[int, int]) -> list[str]:
    return [f"{a}/{n}" for a, n in zip(ADDRESSES[name], lengths, strict=True)]


def _settle(namespace: Namespace, name: str, gateway: str, lengths: tuple[int, int]) -> None:
    for each in _with_lengths(name, lengths):
        namespace.sh("ip", "addr", "add", each, "dev", "eth0", *nodad(each))
    for each in ADDRESSES[gateway]:
        namespace.sh("ip", "route", "add", "default", "via", each)


@contextmanager
def publishing(state_dir: Path, backend: str) -> Iterator[HostPortPublisher]:
    """One of which nothing is left in the end, whatever became of it."""
    with publisher(state_dir, backend) as made:
        yield made
    with publisher(state_dir, backend) as last:
        last.cleanup(force=True)


def answers(port: int) -> set[str]:
    """Who answers to the client at a port of the host over TCP, in both families."""
    asked = (ask("client", Protocol.TCP, address, port) for address in ADDRESSES["host"])
    return {each.partition(" ")[0] for each in asked}

"""A client, a node and a server in network namespaces, joined by veth; one set per rule set.

    outside  192.0.2.10  ── under0      node 1 ── warren-br0 ── server: every address of the
    inside   10.0.2.2    ── warren0                             node's containers, port 80

The client has both ends: what comes by `under0` is from outside, what comes by `warren0` from a
container of node 2.  Every neighbour is known, so nobody asks for one while time is taken.
"""

from __future__ import annotations

import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.bench import backends, records
from mesh.dataplane import netns
from mesh.dataplane.nfnetlink import Message, Socket, generic
from mesh.errors import CommandFailed
from mesh.model import address
from mesh.model.address import FAMILIES, Family

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


OUTSIDE: Final = {Family.V4: "192.0.2.10", Family.V6: "2001:db8::10"}
NODE: Final = {Family.V4: "192.0.2.1", Family.V6: "2001:db8::1"}
"""The node's address outside, where published ports answer."""

_NETWORK: Final = records.CLUSTER.network(1)
_CLIENT, _SERVER = 2, 254
"""The last part of addresses; replicas have 2 to 251."""

_MAC: Final = "02:00:00:00:00:0"
_UNDER, _OVERLAY, _BRIDGE = 1, 3, 5
"""The node's devices; the far end's MAC address is the next number."""

_DELETE_FLOWS: Final = Message(1 << 8 | 2, 0, generic(0))
"""Without a filter: all of them (linux/netfilter/nfnetlink_conntrack.h)."""

SYSCTLS: Final = {
    "node": {
        "ipv4/ip_forward": "1",
        "ipv6/conf/all/forwarding": "1",
    },
    # A port may be used again at once: 64 000 last for a few thousand connections to each target.
    "client": {
        "ipv4/ip_local_port_range": "1024 65535",
        "ipv4/tcp_tw_reuse": "1",
        "ipv4/tcp_max_tw_buckets": "1048576",
    },
    # Its addresses are a route, not a list: IPv6 sends from such a one only when told that it may.
    "server": {"core/somaxconn": "4096", "ipv6/ip_nonlocal_bind": "1"},
}


@dataclass(frozen=True, slots=True)
class Topology:
    """Three namespaces.  `server` answers connections; `client` and `node` are paths to enter."""

    name: str

    @property
    def client(self) -> str:
        """Where connections come from."""
        return self._path("client")

    @property
    def node(self) -> str:
        """Where rules are."""
        return self._path("node")

    @property
    def server(self) -> str:
        """Where every replica is."""
        return self._path("server")

    def _path(self, role: str) -> str:
        return f"/run/netns/{self.name}-{role}"

    def build(self) -> None:
        """Make it.  Raises CommandFailed."""
        for role in ("client", "node", "server"):
            run("ip", "netns", "add", f"{self.name}-{role}")
            with netns.entered(self._path(role)):
                write_sysctls(SYSCTLS[role])
        for role, lines in (
            ("node", _node(self)),
            ("client", _client()),
            ("server", _server()),
        ):
            with netns.entered(self._path(role)):
                run("ip", "-batch", "-", input="".join(f"{line}\n" for line in lines))

    def forget_flows(self) -> None:
        """Empty the node's connection table: else every round would find it fuller."""
        forget_flows(self.node)


def forget_flows(path: str) -> None:
    """Empty the connection table of a namespace."""
    with netns.entered(path):
        netlink = Socket()
    try:
        netlink.each([_DELETE_FLOWS])
    finally:
        netlink.close()


def inside(family: Family) -> str:
    """The client's address as a container of node 2."""
    return address.nth(records.CLUSTER.node_subnet(2, family), _CLIENT)


def run(*argv: str, input: str = "") -> None:
    """Run a program in the thread's namespace, for as long as it takes.  Raises CommandFailed."""
    try:
        done = subprocess.run(argv, input=input, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        raise CommandFailed(f"{argv[0]} is not installed (--backend says what is needed)") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[:300]
        raise CommandFailed(f"{' '.join(argv)}: {said}")


def write_sysctls(wanted: Mapping[str, str]) -> None:
    """Set what is below /proc/sys/net in the thread's namespace, where the kernel has it."""
    for name, value in wanted.items():
        with suppress(FileNotFoundError):
            (Path("/proc/sys/net") / name).write_text(value)


def _mac(number: int) -> str:
    return f"{_MAC}{number}"


def _node(topology: Topology) -> Iterator[str]:
    devices = backends.DEVICES
    links = (
        (_UNDER, "under0", topology.client, "eth0"),
        (_OVERLAY, devices.overlay, topology.client, "eth1"),
        (_BRIDGE, devices.bridge, topology.server, "eth0"),
    )
    yield "link set lo up"
    for number, device, far, name in links:
        peer = f"peer name {name} address {_mac(number + 1)} netns {far}"
        yield f"link add {device} address {_mac(number)} type veth {peer}"
        yield f"link set {device} up"
    for family in FAMILIES:
        length = family.bits
        client, server = inside(family), address.nth(_NETWORK.subnet(family), _SERVER)
        yield own_address(NODE[family], "under0")
        yield own_address(_NETWORK.overlay_address(family), devices.overlay)
        yield own_address(_NETWORK.gateway(family), devices.bridge)
        for number, device, neighbour in (
            (_UNDER, "under0", OUTSIDE[family]),
            (_OVERLAY, devices.overlay, client),
            (_BRIDGE, devices.bridge, server),
        ):
            yield f"route add {neighbour}/{length} dev {device}"
            yield f"neigh add {neighbour} lladdr {_mac(number + 1)} dev {device}"
        yield f"route add {_NETWORK.subnet(family)} via {server} dev {devices.bridge}"


def own_address(own: str, device: str) -> str:
    """An address that may be used at once."""
    family = address.family_of(own)
    return f"addr add {own}/{family.bits} dev {device}{' nodad' if family is Family.V6 else ''}"


def _client() -> Iterator[str]:
    yield "link set lo up"
    yield "link set eth0 up"
    yield "link set eth1 up"
    for family in FAMILIES:
        length, overlay = family.bits, _NETWORK.overlay_address(family)
        yield own_address(OUTSIDE[family], "eth0")
        yield own_address(inside(family), "eth1")
        yield f"route add {NODE[family]}/{length} dev eth0"
        yield f"route add {overlay}/{length} dev eth1"
        yield f"neigh add {NODE[family]} lladdr {_mac(_UNDER)} dev eth0"
        yield f"neigh add {overlay} lladdr {_mac(_OVERLAY)} dev eth1"
        yield f"route add default via {NODE[family]} dev eth0 src {OUTSIDE[family]}"
        vips = records.CLUSTER.vips(family)
        yield f"route add {vips} via {overlay} dev eth1 src {inside(family)}"


def _server() -> Iterator[str]:
    yield "link set lo up"
    yield "link set eth0 up"
    for family in FAMILIES:
        gateway, own = _NETWORK.gateway(family), address.nth(_NETWORK.subnet(family), _SERVER)
        yield own_address(own, "eth0")
        # All but the gateway: in the table of local addresses it would count as one.
        yield f"route add local {_NETWORK.subnet(family)} dev lo table main"
        yield f"route add {gateway}/{family.bits} dev eth0"
        yield f"neigh add {gateway} lladdr {_mac(_BRIDGE)} dev eth0"
        yield f"route add default via {gateway} dev eth0 src {own}"

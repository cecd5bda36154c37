"""A client, two nodes and a server in network namespaces, joined by veth.

    outside 192.0.2.10 ── under0   node 1   warren0 ── warren0   node 2   warren-br0 ── server:
                                                       every address of node 2's containers

The veth between the nodes stands in for WireGuard, without its encryption.  Like WireGuard's device
it takes large packets, carries small ones and joins them again where they arrive.  On it is what
the mesh plans for the two nodes: addresses, routes, rules, and the device that steers.

Both ends of a link have one MAC address and ask for no neighbours: whatever is sent is for them.
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mesh.bench import backends, records, topology
from mesh.bench.topology import NODE, OUTSIDE
from mesh.dataplane import netns, sysctl
from mesh.model import address, link
from mesh.model.address import FAMILIES
from mesh.rules import marks
from mesh.wg import links

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.model.link import LinkKey, LinkValue

INGRESS, REPLICA = 1, 2
"""The numbers of the nodes."""

UNDERLAY_MTU: Final = 1500
_MTU: Final = f"mtu {links.overlay_mtu(UNDERLAY_MTU)}"
"""On every link, so that nobody has to find out what fits."""

_OVERLAY: Final = f"{_MTU} gso_max_segs 1"
_ROLES: Final = ("client", "ingress", "replica", "server")
_SERVER: Final = 254
"""The last part of its own address; replicas have 2 to 251."""

_SIOCETHTOOL, _GRO_ON = 0x8946, struct.pack("=II", 0x2C, 1)
"""ETHTOOL_SGRO (linux/ethtool.h)."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Four namespaces; the properties are paths to enter."""

    name: str

    @property
    def client(self) -> str:
        """Where connections come from."""
        return self._path("client")

    @property
    def nodes(self) -> dict[int, str]:
        """Where rules are, by the node's number."""
        return {INGRESS: self._path("ingress"), REPLICA: self._path("replica")}

    @property
    def server(self) -> str:
        """Where every replica is."""
        return self._path("server")

    def _path(self, role: str) -> str:
        return f"/run/netns/{self.name}-{role}"

    def build(self, *, meshed: bool) -> None:
        """Make it; if not `meshed`, with nothing but routes.  Raises CommandFailed, ApplyFailed."""
        for role in _ROLES:
            topology.run("ip", "netns", "add", f"{self.name}-{role}")
        for role, text in (
            ("ingress", _ingress(self)),
            ("replica", _replica(self)),
            ("client", _client()),
            ("server", _server()),
        ):
            with netns.entered(self._path(role)):
                topology.write_sysctls(topology.SYSCTLS.get(role, topology.SYSCTLS["node"]))
                topology.run("ip", "-batch", "-", input="".join(f"{line}\n" for line in text))
        for number, path in self.nodes.items():
            with netns.entered(path):
                _join_packets("warren0")
                if meshed:
                    _mesh(number)
                else:
                    text = _plain(number)
                    topology.run("ip", "-batch", "-", input="".join(f"{line}\n" for line in text))

    def remove(self) -> None:
        """Delete the namespaces."""
        for role in _ROLES:
            topology.run("ip", "netns", "del", f"{self.name}-{role}")

    def forget_flows(self) -> None:
        """Empty the nodes' connection tables: else every round would find them fuller."""
        for path in self.nodes.values():
            topology.forget_flows(path)


def _join_packets(device: str) -> None:
    """Have a device of the thread's namespace join what arrives (GRO)."""
    value = ctypes.create_string_buffer(_GRO_ON)
    request = struct.pack("16sP", device.encode(), ctypes.addressof(value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        fcntl.ioctl(own, _SIOCETHTOOL, request)


def _mesh(number: int) -> None:
    """What an agent gives a node, but for the devices that are here already."""
    names = link.DeviceNames(*backends.devices(number)[:3])
    others = [records.CLUSTER.network(n) for n in (INGRESS, REPLICA) if n != number]
    local = links.Local(names, UNDERLAY_MTU, marks.DEFAULT)
    wanted = links.plan(local, records.CLUSTER, records.CLUSTER.network(number), others)
    for key in sorted(wanted, key=lambda key: link.ORDER.index(type(key))):
        if key not in (link.Device(names.overlay), link.Device(names.bridge)):
            topology.run(*_words(key, wanted[key]))
    settings = sysctl.desired(names)
    topology.write_sysctls({key.removeprefix("net/"): v for key, v in settings.items()})


def _words(key: LinkKey, value: LinkValue) -> tuple[str, ...]:
    """The command that makes a thing: the agent's own driver takes no veth for an overlay."""
    match key, value:
        case link.Device(name), link.Settings(mtu, mac, link.Tunnel(vni, own, port), _):
            text = f"ip link add {name} mtu {mtu} address {mac} up type vxlan id {vni} local {own} "
            text += f"dstport {port} nolearning ttl 64"
        case link.Address(device, prefix), _:
            text = f"ip addr add {prefix} dev {device}{' nodad' if ':' in prefix else ''}"
        case link.Neighbour(device, ip), mac:
            text = f"ip neigh add {ip} lladdr {mac} dev {device} nud permanent"
        case link.TunnelEnd(device, mac), end:
            text = f"bridge fdb append {mac} dev {device} dst {end}"
        case link.Route(table, prefix), link.Via(device, gateway, source):
            text = f"ip route add {prefix} table {table} dev {device}"
            text += f" via {gateway} onlink" if gateway else f" src {source}"
        case link.Route(table, prefix), _:
            text = f"ip route add throw {prefix} table {table}"
        case link.Rule(family, priority, mark, mask), action:
            text = f"ip -{family.value} rule add pref {priority}"
            text += f" fwmark {mark:#x}/{mask:#x}" if mask else ""
            text += f" {_action(action)}"
        case _:
            raise AssertionError(key)
    return tuple(text.split())


def _action(action: object) -> str:
    match action:
        case link.Lookup(table):
            return f"lookup {table}"
        case link.Goto(priority):
            return f"goto {priority}"
        case _:
            return "nop"


def _plain(number: int) -> Iterator[str]:
    """Routes there and back."""
    for family in FAMILIES:
        subnet = records.CLUSTER.network(REPLICA).subnet(family)
        if number == INGRESS:
            yield f"route add {subnet} dev warren0"
        else:
            yield f"addr add {records.CLUSTER.network(REPLICA).gateway(family)} dev warren-br0"
            yield f"route add {subnet} dev warren-br0"
            yield f"route add {OUTSIDE[family]} dev warren0"


def _link(device: str, number: int, far: str, name: str, settings: str = "") -> Iterator[str]:
    mac = f"address 02:00:00:00:00:0{number}"
    yield f"link add {device} {mac} type veth peer name {name} {mac} netns {far}"
    yield f"link set {device} arp off {settings or _MTU} up"


def _ingress(pair: Pair) -> Iterator[str]:
    yield "link set lo up"
    yield from _link("under0", 1, pair.client, "eth0")
    yield "link add warren-br0 up type bridge"
    yield from _link("warren0", 2, pair.nodes[REPLICA], "warren0", _OVERLAY)
    for family in FAMILIES:
        yield topology.own_address(NODE[family], "under0")
        yield f"route add {OUTSIDE[family]} dev under0"


def _replica(pair: Pair) -> Iterator[str]:
    yield "link set lo up"
    yield f"link set warren0 arp off {_OVERLAY} up"
    yield from _link("warren-br0", 3, pair.server, "eth0")


def _client() -> Iterator[str]:
    yield "link set lo up"
    yield f"link set eth0 arp off {_MTU} up"
    for family in FAMILIES:
        yield topology.own_address(OUTSIDE[family], "eth0")
        yield f"route add default dev eth0 src {OUTSIDE[family]}"


def _server() -> Iterator[str]:
    yield "link set lo up"
    yield f"link set eth0 arp off {_MTU} up"
    for family in FAMILIES:
        subnet = records.CLUSTER.network(REPLICA).subnet(family)
        own = address.nth(subnet, _SERVER)
        yield topology.own_address(own, "eth0")
        yield f"route add local {subnet} dev lo table main"
        yield f"route add default dev eth0 src {own}"

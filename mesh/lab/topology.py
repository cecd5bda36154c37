"""The lab's machines and how they are wired.  Pure: gives `ip -batch` texts, runs nothing.

Machines share one underlay, a switch in the lab's own network namespace, where etcd answers too.
A router leads from there to a client that no node shares a link with.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

NODE_COUNTS: Final = range(1, 51)
"""Node addresses end in 11 to 60: below the client's, whose IPv6 address ends in 64."""

FIRST_NODE: Final = 11
"""The number of the first node."""

ETCD: Final = "192.168.50.5"
ETCD_PORT: Final = 2379
SWITCH: Final = "switch"
"""The bridge's name; `lab exec switch` is the lab's own namespace."""

MANAGERS: Final = 3
"""This many of the nodes may be elected, as in a cluster that outlives the loss of one."""

_ROUTER_SIDE: Final = ("192.168.50.254", "fd50::fe")
_FAR_SIDE: Final = ("198.51.100.1", "fd51::1")


class Kind(enum.Enum):
    """What a machine is for."""

    NODE = "node"
    CLIENT = "client"
    ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Machine:
    """A namespace with one link: `addresses` and `gateways` hold IPv4 and IPv6.

    `far` machines are linked to the router, the others to the switch.
    """

    name: str
    kind: Kind
    number: int
    addresses: tuple[str, str]
    gateways: tuple[str, ...]
    far: bool = False

    @property
    def mac(self) -> str:
        """The same after a restart, so that the neighbours need not learn it again."""
        return f"02:4d:4c:00:00:{self.number:02x}"


def machines(nodes: int) -> tuple[Machine, ...]:
    """Every machine of a lab; the router comes first, since the far client's link ends there."""
    return (
        Machine("router", Kind.ROUTER, 254, _ROUTER_SIDE, ()),
        *(
            Machine(
                f"n{i}",
                Kind.NODE,
                i + 10,
                (f"192.168.50.{i + 10}", f"fd50::{i + 10}"),
                _ROUTER_SIDE,
            )
            for i in range(1, nodes + 1)
        ),
        Machine("c1", Kind.CLIENT, 100, ("192.168.50.100", "fd50::64"), _ROUTER_SIDE),
        Machine("c2", Kind.CLIENT, 200, ("198.51.100.2", "fd51::2"), _FAR_SIDE, far=True),
    )


def switch_batch() -> str:
    """Commands that make the switch, with etcd's addresses on it."""
    return _lines(
        "link set lo up",
        # A fixed address, or it would change with the lowest of its ports' when one goes.
        f"link add {SWITCH} address 02:4d:4c:00:00:05 type bridge forward_delay 0 mcast_snooping 0",
        f"addr add {ETCD}/24 dev {SWITCH}",
        f"addr add fd50::5/64 dev {SWITCH} nodad",
        f"link set {SWITCH} up",
    )


def link_batch(machine: Machine, netns: Callable[[str], str]) -> str:
    """Commands, for the switch's namespace, that make a machine's link.

    `netns` gives the path of a machine's namespace by its name.
    """
    inner = f"peer name eth0 address {machine.mac} netns {netns(machine.name)}"
    if machine.far:
        return _lines(f"link add eth1 netns {netns('router')} type veth {inner}")
    return _lines(
        f"link add {machine.name} type veth {inner}",
        f"link set {machine.name} master {SWITCH} up",
    )


def unlink_batch(machine: Machine) -> str:
    """Commands, for the switch's namespace, that pull a machine's cable out at once."""
    return "" if machine.far else _lines(f"link del {machine.name}")


def inside_batch(machine: Machine) -> str:
    """Commands, for the machine's own namespace, that address its link."""
    return _lines("link set lo up", *_address("eth0", machine.addresses), *_routes(machine))


def far_side_batch() -> str:
    """Commands, for the router's namespace, that address its second link."""
    return _lines(*_address("eth1", _FAR_SIDE))


def _address(device: str, addresses: tuple[str, str]) -> Iterable[str]:
    """No duplicate address detection: IPv6 would be unusable for the first two seconds."""
    address4, address6 = addresses
    return (
        f"addr add {address4}/24 dev {device}",
        f"addr add {address6}/64 dev {device} nodad",
        f"link set {device} up",
    )


def _routes(machine: Machine) -> Iterable[str]:
    return (f"route add default via {gateway}" for gateway in machine.gateways)


def _lines(*commands: str) -> str:
    return "".join(f"{command}\n" for command in commands)

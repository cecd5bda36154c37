"""A container's link: a veth pair from the node's bridge into a network namespace.

Owns the pair and what is configured on its inner end.  Never chooses a name or an address, and
never touches a link it was not named.  Blocking: call it from a thread, not from an event loop.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pyroute2 import IPRoute, NetlinkError

from mesh.dataplane import netns
from mesh.errors import ApplyFailed, HostNotReady

if TYPE_CHECKING:
    from collections.abc import Iterator

INNER: Final = "eth0"
"""What every container calls its link."""

_IFA_F_NODAD: Final = 0x02
_SYSCTL: Final = Path("/proc/sys/net")


@dataclass(frozen=True, slots=True)
class Pair:
    """A link to make: `outer` is its name on the node, `addresses` have a prefix length.

    `mac` is the inner end's; `gateways` hold one address per family of `addresses`.
    """

    outer: str
    bridge: str
    mac: str
    addresses: tuple[str, ...]
    gateways: tuple[str, ...]


def connect(pair: Pair, namespace: str) -> None:
    """Make the pair and configure the inner end in the network namespace at path `namespace`.

    A left-over of the same name is replaced.  Raises HostNotReady if there is no such bridge,
    ApplyFailed if the kernel refuses a step; what was made until then is for `remove`.
    """
    with _refusals(f"link {pair.outer}"), IPRoute() as outside:
        bridge = _bridge(outside, pair.bridge)
        _delete(outside, pair.outer)
        _create(outside, pair, bridge, namespace)
        with netns.entered(namespace):
            _configure(pair)


def remove(outer: str) -> None:
    """Delete the pair; one that is already gone is not an error."""
    with _refusals(f"link {outer}"), IPRoute() as outside:
        _delete(outside, outer)


def check_bridge(name: str) -> None:
    """Raises HostNotReady if this node has no such bridge."""
    with IPRoute() as outside:
        _bridge(outside, name)


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        reason = os.strerror(error.code)
        if error.code == errno.EPERM:
            raise HostNotReady(f"{what}: {reason}: run as root (CAP_NET_ADMIN)") from error
        raise ApplyFailed(f"{what}: the kernel refused it: {reason}") from error
    except OSError as error:
        raise ApplyFailed(f"{what}: the container's namespace: {error.strerror}") from error


def _bridge(outside: Any, name: str) -> int:
    for index in outside.link_lookup(ifname=name):
        return int(index)
    raise HostNotReady(f"bridge {name} not found: is `mesh agent` running on this node?")


def _create(outside: Any, pair: Pair, bridge: int, namespace: str) -> None:
    mtu = outside.link("get", index=bridge)[0].get_attr("IFLA_MTU")
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        peer = {
            "ifname": INNER, "address": pair.mac, "mtu": mtu, "net_ns_fd": descriptor,
        }  # fmt: skip
        outside.link("add", ifname=pair.outer, kind="veth", mtu=mtu, peer=peer)
    finally:
        os.close(descriptor)
    (index,) = outside.link_lookup(ifname=pair.outer)
    outside.link("set", index=index, master=bridge)
    if _bridge_calls_netfilter():
        # The bridge would drop a redirected packet that leaves by the port it came in.
        outside.brport("set", index=index, mode=1)
    outside.link("set", index=index, state="up")


def _configure(pair: Pair) -> None:
    """Runs inside the container's namespace."""
    # Another container on the bridge must not be able to give this one routes.
    (_SYSCTL / f"ipv6/conf/{INNER}/accept_ra").write_text("0")
    with IPRoute() as inside:
        (loopback,) = inside.link_lookup(ifname="lo")
        inside.link("set", index=loopback, state="up")
        (index,) = inside.link_lookup(ifname=INNER)
        for address in pair.addresses:
            host, _, length = address.partition("/")
            flags = {"flags": _IFA_F_NODAD} if ":" in host else {}
            inside.addr("add", index=index, address=host, prefixlen=int(length), **flags)
        inside.link("set", index=index, state="up")
        for gateway in pair.gateways:
            inside.route("add", dst="::/0" if ":" in gateway else "0.0.0.0/0", gateway=gateway)


def _bridge_calls_netfilter() -> bool:
    """Whether bridged packets pass the IP hooks; without br_netfilter there is no such file."""
    files = (_SYSCTL / f"bridge/bridge-nf-call-{name}" for name in ("iptables", "ip6tables"))
    return any(file.exists() and file.read_text().strip() == "1" for file in files)


def _delete(route: Any, name: str) -> None:
    for index in route.link_lookup(ifname=name):
        try:
            route.link("del", index=index)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise

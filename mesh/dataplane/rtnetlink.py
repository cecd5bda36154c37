"""Links, addresses, neighbours, routes and rules of one network namespace, through pyroute2.

Translates keyed values to rtnetlink messages and back; never plans.  Blocking, and bound to the
thread that made it: pyroute2 runs an event loop of its own in there.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final, assert_never

from pyroute2 import IPRoute, NetlinkError
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted

from mesh.dataplane.underlay import HostAddress, HostRoute, Underlay
from mesh.errors import ApplyFailed, HostNotReady
from mesh.model import address, link
from mesh.model.address import FAMILIES, Family

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mesh.model.link import DeviceNames, LinkKey, LinkValue

_AF: Final = {Family.V4: 2, Family.V6: 10}
_AF_BRIDGE: Final = 7
_FAMILIES: Final = {number: family for family, number in _AF.items()}
_UP: Final = 1  # IFF_UP
_NODAD: Final = 0x02  # IFA_F_NODAD: a tentative address cannot be a route's source
_UNSTABLE: Final = 0x01 | 0x20 | 0x40  # IFA_F_TEMPORARY, _DEPRECATED, _TENTATIVE
_PERMANENT: Final = 0x80  # NUD_PERMANENT
_ONLINK: Final = 4  # RTNH_F_ONLINK
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
_UNICAST, _LOCAL, _THROW = 1, 2, 9  # RTN_*
_TO_TABLE, _GOTO, _NOP = 1, 2, 3  # FR_ACT_*
_EVERYWHERE: Final = {Family.V4: "0.0.0.0", Family.V6: "::"}
_OUR_LINK_LOCAL: Final = "fe80::7:0/112"
_GONE: Final = {errno.ENODEV, errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL, errno.ENXIO}
_DUMP_TRIES: Final = 5

_HINTS: Final = {
    errno.EPERM: "the agent needs CAP_NET_ADMIN",
    errno.EEXIST: "another program has it: remove that one, or choose other prefixes",
    errno.EADDRINUSE: "its UDP port is taken: stop the other vxlan or choose another port",
    errno.EOPNOTSUPP: "the kernel lacks it: load its module (vxlan, bridge)",
    errno.EACCES: "IPv6 is disabled on it",
}


class Rtnetlink:
    """One rtnetlink socket of the namespace in which it is made."""

    def __init__(self, names: DeviceNames) -> None:
        self._names = names
        self._kinds = {
            names.overlay: ("wireguard", "tun"),
            names.steering: ("vxlan",),
            names.bridge: ("bridge",),
        }
        self._indexes: dict[str, int] = {}
        # No multicast groups: nobody would read the events, and they pile up.
        self._ip = IPRoute(strict_check=True, groups=0)

    def close(self) -> None:
        """Release the socket."""
        self._ip.close()

    # ---- reading

    def read(self) -> dict[LinkKey, LinkValue]:
        """Everything that is ours.  Raises HostNotReady if a device of ours is something else."""
        found: dict[LinkKey, LinkValue] = {}
        self._indexes = {}
        for name in self._kinds:
            message = self._device(name)
            if message is not None:
                self._indexes[name] = message["index"]
                found[link.Device(name)] = self._settings(name, message)
        names = {index: name for name, index in self._indexes.items()}
        found.update(self._addresses(names))
        found.update(self._neighbours())
        found.update(self._routes(names))
        found.update(self._rules())
        return found

    def underlay(self) -> Underlay:
        """What the host has without the mesh."""
        links = {
            m["index"]: (m.get("ifname"), m.get("mtu")) for m in self._dump(self._ip.get_links)
        }
        ours = set(self._kinds)
        hosts = []
        for m in self._dump(self._ip.get_addr):
            device, mtu = links.get(m["index"], (None, 0))
            if device is not None and device not in ours and not _flags(m) & _UNSTABLE:
                hosts.append(HostAddress(m.get("local") or m.get("address"), device, mtu))
        routes = [
            route
            for family in FAMILIES
            for m in self._dump(self._ip.get_routes, family=_AF[family], table=link.MAIN_TABLE)
            for route in _host_routes(m, family, links)
            if route.device not in ours
        ]
        return Underlay(tuple(hosts), tuple(routes))

    def overlay_kind(self) -> str | None:
        """What drives the overlay device: "wireguard", "tun", or None where there is none."""
        message = self._device(self._names.overlay)
        return None if message is None else str(message.get(("linkinfo", "kind")))

    def _device(self, name: str) -> Any:
        try:
            (message,) = self._ip.link("get", ifname=name)
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return None
            raise
        kind = message.get(("linkinfo", "kind"))
        if kind not in self._kinds[name]:
            raise HostNotReady(
                f"device {name} exists and is not a {self._kinds[name][0]} device but "
                f"{kind or 'a physical one'}: name another one in agent.toml or remove it"
            )
        return message

    def _settings(self, name: str, message: Any) -> link.Settings:
        overlay, bridge = name == self._names.overlay, name == self._names.bridge
        tunnel = None
        if name == self._names.steering:
            data = message.get(("linkinfo", "data"))
            tunnel = link.Tunnel(
                vni=data.get("vxlan_id"),
                local=data.get("vxlan_local") or "",
                port=data.get("vxlan_port"),
                learning=bool(data.get("vxlan_learning")),
                ttl=data.get("vxlan_ttl"),
            )
        return link.Settings(
            mtu=None if bridge else message.get("mtu"),
            mac=None if overlay else message.get("address"),
            tunnel=tunnel,
            up=bool(message["flags"] & _UP),
        )

    def _addresses(self, names: dict[int, str]) -> Iterator[tuple[LinkKey, LinkValue]]:
        for m in self._dump(self._ip.get_addr):
            device = names.get(m["index"])
            text = m.get("local") or m.get("address")
            if device is None or (_is_link_local(text) and not _is_our_link_local(text)):
                continue  # the kernel gives every device a link-local address of its own
            yield link.Address(device, f"{text}/{m['prefixlen']}"), None

    def _neighbours(self) -> Iterator[tuple[LinkKey, LinkValue]]:
        device = self._names.steering
        index = self._indexes.get(device)
        if index is None:
            return
        for family in FAMILIES:
            for m in self._dump(self._ip.get_neighbours, family=_AF[family], ifindex=index):
                if m["ifindex"] == index and m["state"] & _PERMANENT:
                    yield link.Neighbour(device, m.get("dst")), m.get("lladdr")
        for m in self._dump(self._ip.get_neighbours, family=_AF_BRIDGE, ifindex=index):
            if m["ifindex"] == index and m.get("dst") is not None:
                yield link.TunnelEnd(device, m.get("lladdr")), m.get("dst")

    def _routes(self, names: dict[int, str]) -> Iterator[tuple[LinkKey, LinkValue]]:
        for family in FAMILIES:
            for m in self._dump(self._ip.get_routes, family=_AF[family], proto=link.PROTOCOL):
                if m["proto"] != link.PROTOCOL:  # kernels before 4.20 do not filter
                    continue
                key = link.Route(m.get("table"), _prefix(m, family))
                if m["type"] == _THROW:
                    yield key, link.Throw()
                elif m.get("oif") in names and m["type"] == _LOCAL:
                    yield key, link.Local(names[m.get("oif")])
                elif m.get("oif") in names:
                    device = names[m.get("oif")]
                    yield key, link.Via(device, m.get("gateway"), m.get("prefsrc"))

    def _rules(self) -> Iterator[tuple[LinkKey, LinkValue]]:
        actions: dict[int, Callable[[Any], LinkValue]] = {
            _TO_TABLE: lambda m: link.Lookup(m.get("table")),
            _GOTO: lambda m: link.Goto(m.get("goto")),
            _NOP: lambda _: link.Nop(),
        }
        for family in FAMILIES:
            for m in self._dump(self._ip.get_rules, family=_AF[family]):
                if m.get("protocol") == link.PROTOCOL and m["action"] in actions:
                    mark, mask = m.get("fwmark") or 0, m.get("fwmask") or 0
                    key = link.Rule(family, m.get("priority") or 0, mark, mask)
                    yield key, actions[m["action"]](m)

    def _dump(self, call: Callable[..., Iterable[Any]], **match: int) -> list[Any]:
        for _ in range(_DUMP_TRIES):
            try:
                return list(call(**match))
            except NetlinkDumpInterrupted:  # the table changed under the dump: read it again
                continue
        raise ApplyFailed("the kernel's link and route tables change too fast to be read")

    # ---- writing

    def add(self, key: LinkKey, value: LinkValue) -> None:
        """Make the thing.  Raises ApplyFailed naming it."""
        self._write("add", key, value)

    def replace(self, key: LinkKey, before: LinkValue, value: LinkValue) -> None:
        """Change the value of something that is ours, without a gap.  Raises ApplyFailed."""
        if isinstance(key, link.Device) and not link.is_recreated(before, value):
            self._write("set", key, value)
        elif isinstance(key, link.Route | link.Neighbour):
            self._write("replace", key, value)
        elif isinstance(key, link.Rule):
            self._write("add", key, value)
            self._write("del", key, before)
        else:
            self._write("del", key, before)
            self._write("add", key, value)

    def remove(self, key: LinkKey, value: LinkValue) -> None:
        """Delete the thing; that it is gone already is no error.  Raises ApplyFailed."""
        self._write("del", key, value)

    def create_wireguard(self, name: str) -> bool:
        """Make the kernel's WireGuard device; False if the kernel has none."""
        try:
            self._ip.link("add", ifname=name, kind="wireguard")
        except NetlinkError as error:
            if error.code == errno.EOPNOTSUPP:
                return False
            raise _refused("add", link.Device(name), error) from None
        return True

    def _write(self, verb: str, key: LinkKey, value: LinkValue) -> None:
        try:
            match key:
                case link.Device():
                    self._write_device(verb, key, value)
                case link.Address():
                    self._write_address(verb, key)
                case link.Neighbour():
                    index = self._index(key.device)
                    self._ip.neigh(
                        verb, ifindex=index, dst=key.address, lladdr=value, state=_PERMANENT
                    )
                case link.TunnelEnd():
                    index = self._index(key.device)
                    self._ip.fdb(verb, ifindex=index, lladdr=key.mac, dst=value)
                case link.Route():
                    self._ip.route(verb, **self._route(key, value))
                case link.Rule():
                    self._ip.rule(verb, **_rule(key, value))
                case _:
                    assert_never(key)
        except NetlinkError as error:
            if verb != "del" or error.code not in _GONE:
                raise _refused(verb, key, error) from None

    def _write_device(self, verb: str, key: link.Device, value: LinkValue) -> None:
        assert isinstance(value, link.Settings)
        if verb == "del":
            self._ip.link("del", ifname=key.name)
            self._indexes.pop(key.name, None)
            return
        wanted: dict[str, Any] = {}
        if value.mtu is not None:
            wanted["mtu"] = value.mtu
        if value.mac is not None:
            wanted["address"] = value.mac
        if verb == "add":
            self._ip.link("add", ifname=key.name, **self._kind(key, value), **wanted)
        else:
            self._ip.link("set", index=self._index(key.name), **wanted)
        self._ip.link("set", index=self._index(key.name), state="up" if value.up else "down")

    def _kind(self, key: link.Device, value: link.Settings) -> dict[str, Any]:
        if key.name == self._names.bridge:
            return {"kind": "bridge"}
        if value.tunnel is None:
            raise ApplyFailed(f"{key} is gone: WireGuard has to be started first")
        return {
            "kind": "vxlan",
            "vxlan_id": value.tunnel.vni,
            "vxlan_local": value.tunnel.local,
            "vxlan_port": value.tunnel.port,
            "vxlan_learning": int(value.tunnel.learning),
            "vxlan_ttl": value.tunnel.ttl,
        }

    def _write_address(self, verb: str, key: link.Address) -> None:
        text, _, length = key.prefix.partition("/")
        extra = {"flags": _NODAD} if address.family_of(text) is Family.V6 and verb == "add" else {}
        index = self._index(key.device)
        self._ip.addr(verb, index=index, address=text, prefixlen=int(length), **extra)

    def _route(self, key: link.Route, value: LinkValue) -> dict[str, Any]:
        family = address.family_of(key.prefix)
        wanted: dict[str, Any] = {
            "family": _AF[family],
            "dst": key.prefix,
            "table": key.table,
            "proto": link.PROTOCOL,
        }
        if isinstance(value, link.Local):
            return wanted | {"type": "local", "oif": self._index(value.device)}
        if not isinstance(value, link.Via):
            return wanted | {"type": "throw"}
        wanted["oif"] = self._index(value.device)
        if value.source is not None:
            wanted["prefsrc"] = value.source
        if value.gateway is not None:
            wanted["gateway"] = value.gateway
            wanted["flags"] = 0 if _is_link_local(value.gateway) else _ONLINK
        elif family is Family.V4:
            wanted["scope"] = _SCOPE_LINK
        return wanted

    def _index(self, name: str) -> int:
        if name not in self._indexes:
            message = self._device(name)
            if message is None:
                raise ApplyFailed(f"device {name} is gone")
            self._indexes[name] = message["index"]
        return self._indexes[name]


def _rule(key: link.Rule, value: LinkValue) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "family": _AF[key.family],
        "priority": key.priority,
        "protocol": link.PROTOCOL,
    }
    if key.mask:
        wanted |= {"fwmark": key.mark, "fwmask": key.mask}
    match value:
        case link.Lookup():
            return wanted | {"table": value.table}
        case link.Goto():
            return wanted | {"action": "goto", "goto": value.priority}
        case _:
            return wanted | {"action": "nop"}


def _refused(verb: str, key: LinkKey, error: NetlinkError) -> ApplyFailed:
    reason = str(error.args[1]) if len(error.args) > 1 else str(error)
    hint = _HINTS.get(error.code)
    return ApplyFailed(f"cannot {verb} {key}: {reason}{'; ' + hint if hint else ''}")


def _prefix(message: Any, family: Family) -> str:
    return f"{message.get('dst') or _EVERYWHERE[family]}/{message['dst_len']}"


def _host_routes(message: Any, family: Family, links: dict[int, Any]) -> Iterator[HostRoute]:
    """The routes of one message: one for each next hop."""
    if message["type"] != _UNICAST or message["proto"] == link.PROTOCOL:
        return
    hops = message.get("multipath") or ()
    for index in (hop["oif"] for hop in hops) if hops else (message.get("oif"),):
        device, _ = links.get(index, (None, 0))
        if device is not None:
            yield HostRoute(
                _prefix(message, family),
                device,
                message.get("priority") or 0,
                message.get("prefsrc"),
                message["proto"],
            )


def _flags(message: Any) -> int:
    return int(message.get("flags") or message["flags"])


def _is_link_local(text: str) -> bool:
    return text.startswith("fe80:")


def _is_our_link_local(text: str) -> bool:
    return address.contains(_OUR_LINK_LOCAL, text)

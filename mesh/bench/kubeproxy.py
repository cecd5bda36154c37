"""The rules kube-proxy writes for the same services, to compare with: nftables and iptables mode.

Written by hand after what kube-proxy's own tests expect of it (pkg/proxy/nftables and
pkg/proxy/iptables of kubernetes, up to 1.35): NodePort services with the Cluster traffic policy,
a chain per endpoint.  Pure: text from services.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from string import Template
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.model.address import Family

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LARGE_CLUSTER: Final = 1000
"""Endpoints beyond which kube-proxy leaves comments out of iptables rules."""

_IP: Final = {Family.V4: "ip", Family.V6: "ip6"}


class Service(NamedTuple):
    """One port of one service.  Endpoints are addresses; they listen on `target`."""

    name: str
    protocol: str
    vip: str
    port: int
    node_port: int
    target: int
    endpoints: tuple[str, ...]

    @property
    def port_name(self) -> str:
        """As kube-proxy calls it in comments."""
        return f"bench/{self.name}:p{self.port}"


@dataclass(frozen=True, slots=True)
class Node:
    """What kube-proxy is told besides: this node's address, and the cluster's ranges."""

    family: Family
    address: str
    pods: str
    vips: str


# ---- nftables


def nftables(node: Node, services: Iterable[Service]) -> str:
    """Everything, for `nft -f`."""
    table = f"{_IP[node.family]} kube-proxy"
    parts = [_base(node)]
    for service in services:
        parts += (f"add {kind} {table} {rest}\n" for kind, rest in _nft_service(node, service))
    return "".join(parts)


def _base(node: Node) -> str:
    words = {
        "ip": _IP[node.family],
        "addr": f"ipv{node.family.suffix}_addr",
        "node": node.address,
        "vips": node.vips,
    }
    return _BASE.substitute(words)


_BASE: Final = Template("""add table $ip kube-proxy
table $ip kube-proxy {
 set cluster-ips { type $addr; }
 set nodeport-ips { type $addr; elements = { $node } }
 map firewall-ips { type $addr . inet_proto . inet_service : verdict; }
 map no-endpoint-nodeports { type inet_proto . inet_service : verdict; }
 map no-endpoint-services { type $addr . inet_proto . inet_service : verdict; }
 map service-ips { type $addr . inet_proto . inet_service : verdict; }
 map service-nodeports { type inet_proto . inet_service : verdict; }
 chain mark-for-masquerade { mark set mark or 0x4000; }
 chain masquerading {
  mark and 0x4000 == 0 return
  mark set mark xor 0x4000
  masquerade fully-random
 }
 chain reject-chain { reject; }
 chain firewall-check { $ip daddr . meta l4proto . th dport vmap @firewall-ips; }
 chain cluster-ips-check {
  $ip daddr @cluster-ips reject
  $ip daddr { $vips } drop
 }
 chain service-endpoints-check {
  $ip daddr . meta l4proto . th dport vmap @no-endpoint-services
 }
 chain nodeport-endpoints-check {
  $ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
 }
 chain services {
  $ip daddr . meta l4proto . th dport vmap @service-ips
  $ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
 }
 chain filter-prerouting-pre-dnat {
  type filter hook prerouting priority -110
  ct state new jump firewall-check
 }
 chain filter-output-pre-dnat {
  type filter hook output priority -110
  ct state new jump firewall-check
 }
 chain filter-forward {
  type filter hook forward priority 0
  ct state new jump service-endpoints-check
  ct state new jump cluster-ips-check
 }
 chain filter-input {
  type filter hook input priority 0
  ct state new jump nodeport-endpoints-check
  ct state new jump service-endpoints-check
 }
 chain filter-output {
  type filter hook output priority 0
  ct state new jump service-endpoints-check
  ct state new jump cluster-ips-check
 }
 chain nat-prerouting { type nat hook prerouting priority -100; jump services; }
 chain nat-output { type nat hook output priority -100; jump services; }
 chain nat-postrouting { type nat hook postrouting priority 100; jump masquerading; }
}
""")


def _nft_service(node: Node, service: Service) -> Iterator[tuple[str, str]]:
    ip, protocol = _IP[node.family], service.protocol
    ending = f"{_digest(service.port_name, 8)}-bench/{service.name}/{protocol}/p{service.port}"
    inside, outside = f"service-{ending}", f"external-{ending}"
    chains = [_nft_endpoint(service, address) for address in service.endpoints]
    yield from (("chain", name) for name in (*chains, inside, outside))
    for chain, address in zip(chains, service.endpoints, strict=True):
        yield "rule", f"{chain} {ip} saddr {address} jump mark-for-masquerade"
        where = socket_text(address, service.target)
        yield "rule", f"{chain} meta l4proto {protocol} dnat to {where}"
    source = f"{ip} daddr {service.vip} {ip} saddr != {node.pods}"
    yield "rule", f"{inside} {source} jump mark-for-masquerade"
    slots = " , ".join(f"{slot} : goto {chain}" for slot, chain in enumerate(chains))
    yield "rule", f"{inside} numgen random mod {len(chains)} vmap {{ {slots} }}"
    yield "rule", f"{outside} jump mark-for-masquerade"
    yield "rule", f"{outside} goto {inside}"
    yield "element", f"cluster-ips {{ {service.vip} }}"
    frontend = f"{service.vip} . {protocol} . {service.port}"
    yield "element", f"service-ips {{ {frontend} : goto {inside} }}"
    yield "element", f"service-nodeports {{ {protocol} . {service.node_port} : goto {outside} }}"


def _nft_endpoint(service: Service, address: str) -> str:
    where = f"{address.replace(':', '.')}/{service.target}"
    name = f"bench/{service.name}/{service.protocol}/p{service.port}__{where}"
    return f"endpoint-{_digest(name, 8)}-{name}"


# ---- iptables


def iptables(node: Node, services: Iterable[Service]) -> str:
    """Everything, for `iptables-restore --noflush`, or ip6tables'."""
    known = list(services)
    large = sum(len(service.endpoints) for service in known) > _LARGE_CLUSTER
    chains: list[str] = []
    frontends: list[str] = []
    rules: list[str] = []
    for service in known:
        own, listed, rest = _xtables_service(node, service, comments=not large)
        chains += own
        frontends += listed
        rules += rest
    named = "".join(f":{chain} - [0:0]\n" for chain in chains)
    last = "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"
    text = "".join(f"{line}\n" for line in (*frontends, last, *rules))
    return f"{_FILTER}*nat\n{_NAT_CHAINS}{named}{_NAT_RULES}{text}COMMIT\n"


_FILTER: Final = """*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A INPUT -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A FORWARD -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"""

_NAT_CHAINS: Final = """:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
"""

_NAT_RULES: Final = """-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
"""


def _xtables_service(
    node: Node, service: Service, *, comments: bool
) -> tuple[list[str], list[str], list[str]]:
    """Its chains; its rules in the lists that all packets walk; the rules of its chains."""

    def said(what: str = "") -> str:
        return f'-m comment --comment "{service.port_name}{what}" ' if comments else ""

    inside = f"KUBE-SVC-{_digest(service.port_name, 16)}"
    outside = inside.replace("SVC", "EXT")
    endpoints = [
        f"KUBE-SEP-{_digest(f'{service.port_name}{address}', 16)}" for address in service.endpoints
    ]
    protocol = f"-m {service.protocol} -p {service.protocol}"
    frontend = f"{said(' cluster IP')}{protocol} -d {service.vip} --dport {service.port}"
    listed = [
        f"-A KUBE-SERVICES {frontend} -j {inside}",
        f"-A KUBE-NODEPORTS {said()}{protocol} --dport {service.node_port} -j {outside}",
    ]
    rules = [
        f"-A {outside} {said(' external')}-j KUBE-MARK-MASQ",
        f"-A {outside} -j {inside}",
        f"-A {inside} {frontend} ! -s {node.pods} -j KUBE-MARK-MASQ",
    ]
    for index, (chain, address) in enumerate(zip(endpoints, service.endpoints, strict=True)):
        left = len(endpoints) - index
        draw = f"-m statistic --mode random --probability {1 / left:.10f} " if left > 1 else ""
        where = socket_text(address, service.target)
        rules += [
            f"-A {inside} {said(f' -> {where}')}{draw}-j {chain}",
            f"-A {chain} {said()}-s {address} -j KUBE-MARK-MASQ",
            f"-A {chain} {said()}{protocol} -j DNAT --to-destination {where}",
        ]
    return [inside, outside, *endpoints], listed, rules


def socket_text(address: str, port: int) -> str:
    """An address and a port as rules write them."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _digest(text: str, length: int) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:length]

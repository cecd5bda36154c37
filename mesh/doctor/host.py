"""Checks of the host: rights, kernel, WireGuard, kernel settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.dataplane import features, host, sysctl
from mesh.doctor import check
from mesh.doctor.check import AS_ROOT
from mesh.errors import CommandFailed, HostNotReady
from mesh.model import spans
from mesh.wg.device import Overlay

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mesh.dataplane.link import LinkDriver
    from mesh.doctor.check import Check
    from mesh.doctor.subject import Subject
    from mesh.model.link import DeviceNames

_ROOT: Final = Path("/proc/sys")
_OLDEST_KERNEL: Final = (5, 13)
_FULL: Final = 0.8
"""How full conntrack's table may be: a full one drops every new connection."""

_FORWARDING: Final = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")
_STRICT: Final = "1"
_RANGE: Final = "ip_local_port_range"
_RESERVED: Final = "ip_local_reserved_ports"


def of_rights() -> Iterator[Check]:
    """Whether this process may look everywhere, and the kernel's age."""
    try:
        host.check_rights()
        yield check.ok("rights", "CAP_NET_ADMIN")
    except HostNotReady as error:
        yield check.warn("rights", str(error).partition(":")[0], AS_ROOT)
    release = os.uname().release
    if check.numbers(release) < _OLDEST_KERNEL:
        yield check.fail("kernel", f"Linux {release}", "upgrade to Linux 5.13 or newer")
    else:
        yield check.ok("kernel", f"Linux {release}")


async def of_wireguard(names: DeviceNames) -> list[Check]:
    """What drives, or would drive, the overlay; whether the other devices can be made."""
    found = [await check.program("wg", "wireguard-tools", "wg", "--version")]
    try:
        in_kernel, refused = await features.in_scratch(lambda: features.devices(names))
    except HostNotReady as error:
        return [*found, check.warn("wireguard", f"not tried: {error}", AS_ROOT)]
    in_kernel_text = check.ok("wireguard", "the kernel has it")
    found.append(in_kernel_text if in_kernel else await _of_userspace())
    if refused:
        fix = "load the modules vxlan and bridge"
        return [*found, check.fail("devices", "; ".join(refused), fix)]
    return [*found, check.ok("devices", "bridge and vxlan can be made")]


async def _of_userspace() -> Check:
    """Without the module."""
    try:
        version = await features.version("wireguard-go", "--version")
    except CommandFailed:
        fix = "load the module wireguard (modprobe wireguard), or apt install wireguard-go"
        return check.fail("wireguard", "neither a kernel module nor wireguard-go", fix)
    try:
        host.check_tun()
    except HostNotReady as error:
        return check.fail("wireguard", str(error), "load the module tun (modprobe tun)")
    return check.ok("wireguard", f"no kernel module; {version}")


async def of_peers(subject: Subject, links: LinkDriver, now: float) -> list[Check]:
    """Whether WireGuard heard of the living nodes lately, and the agent reaches them; `now` in
    seconds since the epoch.
    """
    if subject.known is None or not subject.known.peers:
        return []
    peers = subject.known.peers
    try:
        found = await Overlay(links).read()
    except CommandFailed as error:
        return [check.warn("peers", str(error), AS_ROOT)]
    silent = sorted(name for key, name in peers.items() if key not in found.live(now))
    if silent:
        fix = f"let UDP {subject.cluster.wireguard_port} pass between the nodes, both ways"
        text = f"no WireGuard session with {', '.join(silent)}"
        return [check.warn("peers", text, fix)]
    lost = sorted(subject.reported.unreachable) if subject.reported is not None else []
    if lost:
        fix = "run `mesh doctor` there; look at the path between the nodes"
        text = f"{', '.join(lost)} cannot be reached over the overlay, and gets no connections"
        return [check.warn("peers", text, fix)]
    return [check.ok("peers", f"WireGuard sessions with every living node ({len(peers)})")]


async def of_settings(subject: Subject, backend: str, *, running: bool) -> list[Check]:
    """The kernel settings that a node needs; `running` says whether an agent has set them."""
    wanted = sysctl.desired(subject.names, loopback=subject.config.loopback_ports)
    read = await sysctl.SysctlDriver(_ROOT).read(wanted)
    groups: dict[str, dict[str, str]] = {"forwarding": {}, "bridge-nf-call": {}, "sysctl": {}}
    for key, value in read.items():
        bridged = "bridge-nf-call" if key.startswith("net/bridge/") else "sysctl"
        groups["forwarding" if key in _FORWARDING else bridged][key] = value
    return [
        *(_of_values(name, v, wanted, running=running) for name, v in groups.items() if v),
        await _of_reverse_path(subject.names, backend),
        await _of_loopback(subject),
        *_of_ports(subject),
        *_of_conntrack(),
    ]


def _of_values(
    name: str, actual: Mapping[str, str], wanted: Mapping[str, str], *, running: bool
) -> Check:
    wrong = {key: value for key, value in actual.items() if value != wanted[key]}
    if not wrong:
        return check.ok(name, f"{len(actual)} settings are as they should be")
    evidence = ", ".join(f"{_dotted(key)}={value}" for key, value in wrong.items())
    words = " ".join(f"{_dotted(key)}={wanted[key]}" for key in wrong)
    if running:
        fix = f"run `sysctl -w {words}`, and find who set it otherwise (sysctl.d, Docker)"
        return check.fail(name, evidence, fix)
    if all(os.access(_ROOT / key, os.W_OK) for key in wrong) or os.geteuid() != 0:
        return check.ok(name, f"{evidence}; the agent will set {words}")
    return check.fail(name, f"{evidence}, read-only", f"run `sysctl -w {words}` on the host")


def _dotted(key: str) -> str:
    return key.replace("/", ".")


async def _of_loopback(subject: Subject) -> Check:
    """Who may reach what listens on 127.0.0.1 only (CVE-2020-8558).  ::1 the kernel guards itself.

    Of the bridge the settings tell: it is for the agent to set.
    """
    devices = (path.name for path in (_ROOT / "net/ipv4/conf").iterdir())
    asked = {f"net/ipv4/conf/{each}/route_localnet" for each in devices}
    asked.discard(f"net/ipv4/conf/{subject.names.bridge}/route_localnet")
    found = await sysctl.SysctlDriver(_ROOT).read(sorted(asked))
    routed = [_dotted(key) for key, value in found.items() if value == "1"]
    if routed:
        text = f"{', '.join(routed)}=1: neighbours may reach what listens on 127.0.0.1"
        words = " ".join(f"{key}=0" for key in routed)
        return check.warn("loopback", text, f"run `sysctl -w {words}`, unless somebody needs it")
    if subject.config.loopback_ports:
        return check.ok("loopback", "ports that name 127.0.0.1 or ::1 answer there")
    return check.ok("loopback", "nothing is published on 127.0.0.1 and ::1")


async def _of_reverse_path(names: DeviceNames, backend: str) -> Check:
    """The stricter of two settings counts: loose (2) is above strict (1)."""
    keys = [f"net/ipv4/conf/{device}/rp_filter" for device in ("all", names.steering)]
    found = await sysctl.SysctlDriver(_ROOT).read(keys)
    shown = ", ".join(f"{_dotted(key)}={value}" for key, value in found.items())
    if backend.startswith("iptables") and max(found.values(), default="0") == _STRICT:
        fix = (
            f"run `sysctl -w net.ipv4.conf.{names.steering}.rp_filter=2`: clients do not hear "
            "ICMP errors of other nodes else"
        )
        return check.warn("rp_filter", f"{shown}: strict, with {backend}", fix)
    return check.ok("rp_filter", f"{shown or 'not set'}; {backend} works with it")


def _of_ports(subject: Subject) -> Iterator[Check]:
    """Whether the kernel may take published ports as the source of the host's connections."""
    settings = {name: _value(f"net/ipv4/{name}") for name in (_RANGE, _RESERVED)}
    if settings[_RANGE] is None:
        return
    low, high = map(int, str(settings[_RANGE]).split())
    reserved = spans.parsed(settings[_RESERVED] or "")
    cluster = subject.cluster
    taken = [
        f"{max(low, first)}-{min(high, last)}"
        for first, last in (cluster.ingress_ports, cluster.host_ports)
        if max(low, first) <= min(high, last)
        and not reserved.issuperset(range(max(low, first), min(high, last) + 1))
    ]
    if not taken:
        yield check.ok("local-ports", f"{_RANGE}={low}-{high} leaves published ports alone")
        return
    kept = ",".join(filter(None, (settings[_RESERVED], *taken)))
    yield check.warn(
        "local-ports",
        f"{_RANGE}={low}-{high} and ports to publish share {', '.join(taken)}",
        f"run `sysctl -w net.ipv4.{_RESERVED}={kept}`",
    )


def _of_conntrack() -> Iterator[Check]:
    count, most = (_value(f"net/netfilter/nf_conntrack_{name}") for name in ("count", "max"))
    if count is None or not most:
        return
    evidence = f"{count} of {most} flows"
    if int(count) > _FULL * int(most):
        words = f"net.netfilter.nf_conntrack_max={2 * int(most)}"
        yield check.warn("conntrack", evidence, f"run `sysctl -w {words}`")
    else:
        yield check.ok("conntrack", evidence)


def _value(key: str) -> str | None:
    try:
        return (_ROOT / key).read_text(encoding="ascii").strip()
    except OSError:
        return None

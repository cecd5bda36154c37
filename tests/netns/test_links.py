"""The link driver against the kernel: idempotent, healing, and blind to what is not ours."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mesh.dataplane import foreign, host
from mesh.dataplane.link import LinkDriver
from mesh.dataplane.linkwatch import LinkWatch
from mesh.dataplane.sysctl import SysctlDriver
from mesh.dataplane.sysctl import desired as desired_sysctls
from mesh.delta import Delta
from mesh.errors import ApplyFailed, HostNotReady
from mesh.model import link
from mesh.model.cluster import Cluster
from mesh.rules import marks
from mesh.wg import links
from tests.support.namespaces import Namespace, wire

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.model.link import LinkDelta, Links

pytestmark = pytest.mark.netns

NAMES = link.DeviceNames("warren0", "warren-x0", "warren-br0")
CLUSTER = Cluster(id="test", prefix6="fd12:3456:789a::/48")


def plan(peers: tuple[int, ...] = (2, 3), cluster: Cluster = CLUSTER) -> Links:
    others = [cluster.network(number) for number in peers]
    return links.plan(links.Local(NAMES, 1500, marks.DEFAULT), cluster, cluster.network(1), others)


@pytest.fixture
def node() -> Iterator[Namespace]:
    """A machine whose WireGuard device is played by a tun device without a program behind it."""
    node = Namespace("links")
    node.sh("ip", "tuntap", "add", NAMES.overlay, "mode", "tun")
    yield node
    node.close()


@pytest.fixture
def driver(node: Namespace) -> Iterator[LinkDriver]:
    driver = LinkDriver(NAMES)
    yield driver
    node.run(driver.close())


async def converge(driver: LinkDriver, desired: Links) -> LinkDelta:
    """Apply what differs; what differs then."""
    await driver.apply(link.changes(await driver.read(), desired))
    return link.changes(await driver.read(), desired)


def test_what_was_applied_is_read_back_and_a_second_time_nothing_differs(
    node: Namespace, driver: LinkDriver
) -> None:
    assert node.run(converge(driver, plan())) == Delta()

    rules = node.sh("ip", "rule")
    assert "7000:	from all fwmark 0/0xfff00000 goto 7003" in rules
    assert "7002:	from all fwmark 0x300000/0xfff00000 lookup 7003" in rules
    assert "via fe80::7:2 dev warren-x0" in node.sh("ip", "-6", "route", "show", "table", "7002")
    assert "mtu 1370" in node.sh("ip", "link", "show", NAMES.steering)


def test_a_new_driver_adopts_what_another_left(node: Namespace, driver: LinkDriver) -> None:
    node.run(converge(driver, plan()))
    before = node.sh("ip", "link", "show", NAMES.steering)
    successor = LinkDriver(NAMES)

    delta = link.changes(node.run(successor.read()), plan())

    node.run(successor.close())
    assert delta == Delta()
    assert node.sh("ip", "link", "show", NAMES.steering) == before


def test_a_peer_that_left_takes_only_its_own_things_along(
    node: Namespace, driver: LinkDriver
) -> None:
    node.run(converge(driver, plan((2, 3))))
    delta = link.changes(node.run(driver.read()), plan((2,)))

    assert not delta.add
    assert node.run(converge(driver, plan((2,)))) == Delta()
    assert "10.0.3" not in node.sh("ip", "route", "show", "table", "all")
    assert "10.0.2.0/24" in node.sh("ip", "route")


@pytest.mark.parametrize(
    "damage",
    [
        ("ip", "rule", "del", "pref", "7000"),
        ("ip", "-6", "rule", "flush"),
        ("ip", "route", "flush", "table", "7002"),
        ("ip", "route", "del", "10.0.2.0/24"),
        ("ip", "-6", "route", "flush", "table", "7000"),
        ("ip", "addr", "flush", "dev", "warren-x0"),
        ("ip", "neigh", "flush", "dev", "warren-x0", "nud", "permanent"),
        ("bridge", "fdb", "del", "02:4d:45:53:00:02", "dev", "warren-x0"),
        ("ip", "link", "set", "warren-x0", "down"),
        ("ip", "link", "set", "warren0", "down", "mtu", "1300"),
        ("ip", "link", "del", "warren-br0"),
        ("ip", "link", "del", "warren-x0"),
        ("ip", "link", "set", "warren-br0", "address", "02:00:00:00:00:01"),
    ],
)
def test_damage_by_somebody_else_is_seen_and_repaired(
    node: Namespace, driver: LinkDriver, damage: tuple[str, ...]
) -> None:
    node.run(converge(driver, plan()))
    node.sh(*damage)

    assert link.changes(node.run(driver.read()), plan())
    assert node.run(converge(driver, plan())) == Delta()


def test_a_vxlan_device_with_other_parameters_is_made_anew_with_all_that_hangs_on_it(
    node: Namespace, driver: LinkDriver
) -> None:
    node.run(converge(driver, plan(cluster=CLUSTER)))
    moved = Cluster(id="test", prefix6=CLUSTER.prefix6, steering_port=4791)

    assert node.run(converge(driver, plan(cluster=moved))) == Delta()
    assert "dstport 4791" in node.sh("ip", "-d", "link", "show", NAMES.steering)


def test_routes_and_rules_of_others_survive(node: Namespace, driver: LinkDriver) -> None:
    node.run(converge(driver, plan()))
    node.sh("ip", "route", "add", "10.0.9.0/24", "dev", "warren-br0", "proto", "static")
    node.sh("ip", "rule", "add", "pref", "7002", "fwmark", "0x500000/0xfff00000", "lookup", "7005")
    node.sh("ip", "route", "add", "default", "dev", "warren-br0", "table", "7005")

    assert node.run(converge(driver, plan())) == Delta()
    node.run(driver.apply(link.changes(plan(), plan(()))))

    assert "10.0.9.0/24" in node.sh("ip", "route")
    assert "lookup 7005" in node.sh("ip", "rule")
    assert "default" in node.sh("ip", "route", "show", "table", "7005")


def test_a_route_somebody_else_has_is_named_and_does_not_stop_the_others(
    node: Namespace, driver: LinkDriver
) -> None:
    node.sh("ip", "link", "set", "lo", "up")
    node.sh("ip", "route", "add", "10.0.2.0/24", "dev", "lo")

    with pytest.raises(ApplyFailed, match=r"route 10\.0\.2\.0/24 in table 254.*another program"):
        node.run(converge(driver, plan()))

    left = link.changes(node.run(driver.read()), plan())
    assert list(left.add) == [link.Route(link.MAIN_TABLE, "10.0.2.0/24")]
    assert "10.0.2.0/24 dev lo" in node.sh("ip", "route")


def test_a_device_of_another_kind_is_refused_by_name(node: Namespace, driver: LinkDriver) -> None:
    node.sh("ip", "link", "add", NAMES.bridge, "type", "veth", "peer", "name", "other")

    with pytest.raises(HostNotReady, match="warren-br0 exists and is not a bridge"):
        node.run(driver.read())


def test_removal_leaves_nothing_of_ours_and_everything_of_others(
    node: Namespace, driver: LinkDriver
) -> None:
    node.sh("ip", "rule", "add", "pref", "7777", "lookup", "99")
    before = node.sh("ip", "rule"), node.sh("ip", "-6", "route")
    node.run(converge(driver, plan()))

    node.run(driver.remove())

    assert node.run(driver.read()) == {}
    assert (node.sh("ip", "rule"), node.sh("ip", "-6", "route")) == before
    assert "warren" not in node.sh("ip", "link")


@pytest.fixture
def far() -> Iterator[Namespace]:
    """A machine at the other end of a cable."""
    far = Namespace("far")
    yield far
    far.close()


def test_the_host_is_seen_without_the_mesh(
    node: Namespace, driver: LinkDriver, far: Namespace
) -> None:
    wire(node, "eth0", far, "eth0", "192.0.2.1/24", "2001:db8::1/64")
    wire(node, "eth1", far, "eth1", "198.51.100.1/24")
    node.sh("ip", "link", "set", "eth0", "mtu", "1400")
    node.sh("ip", "link", "set", "eth1", "mtu", "1300")
    node.sh("ip", "route", "add", "default", "via", "192.0.2.254")
    node.run(converge(driver, plan()))

    underlay = node.run(driver.underlay())

    assert underlay.endpoints == ("192.0.2.1", "2001:db8::1")
    assert set(underlay.addresses) == {"192.0.2.1", "2001:db8::1", "198.51.100.1"}
    assert underlay.mtu(underlay.endpoints) == 1400
    underlay.check(CLUSTER)
    node.sh("ip", "route", "add", "10.1.128.0/20", "dev", "eth1")
    with pytest.raises(HostNotReady, match=r"10\.1\.128\.0/20 dev eth1 overlaps.*vips4"):
        node.run(driver.underlay()).check(CLUSTER)


def test_rules_about_marks_are_seen_but_for_the_meshs_own(
    node: Namespace, driver: LinkDriver
) -> None:
    for family in ("-4", "-6"):
        node.sh("ip", family, "rule", "add", "pref", "6999", "fwmark", "7", "lookup", "7777")
    node.sh("ip", "rule", "add", "pref", "9", "not", "fwmark", "0x100/0xf00", "lookup", "7777")
    node.sh("ip", "rule", "add", "pref", "8", "from", "192.0.2.0/24", "lookup", "7777")
    node.run(converge(driver, plan()))

    rules = node.run(foreign.routing_rules())

    assert {str(rule) for rule in rules if rule.mask} == {
        "IPv4 rule 6999 (fwmark 0x7)",
        "IPv6 rule 6999 (fwmark 0x7)",
        "IPv4 rule 9 (fwmark 0x100/0xf00)",
    }
    foreign.check_marks(marks.DEFAULT, rules, {})


@pytest.mark.parametrize(
    "change",
    [
        ("ip", "rule", "add", "pref", "99", "lookup", "99"),
        ("ip", "-6", "rule", "add", "pref", "99", "lookup", "99"),
        ("ip", "route", "add", "192.0.2.0/24", "dev", "lo"),
        ("ip", "-6", "route", "add", "2001:db8::/64", "dev", "lo"),
        ("ip", "addr", "add", "192.0.2.1/32", "dev", "lo"),
        ("ip", "link", "add", "other", "type", "bridge"),
    ],
)
def test_a_change_by_somebody_else_wakes_the_watch(far: Namespace, change: tuple[str, ...]) -> None:
    async def watch() -> None:
        woken = asyncio.Event()
        watch = LinkWatch(woken.set)
        try:
            await asyncio.to_thread(far.sh, *change)
            await asyncio.wait_for(woken.wait(), 30)
        finally:
            watch.close()

    far.run(watch())


def test_a_route_for_answers_to_loopback_comes_and_goes(
    node: Namespace, driver: LinkDriver
) -> None:
    allowed = links.plan(
        links.Local(NAMES, 1500, marks.DEFAULT, loopback=True), CLUSTER, CLUSTER.network(1), ()
    )

    assert node.run(converge(driver, allowed)) == Delta()
    assert "local ::1 dev warren-br0 proto 77" in node.sh(
        "ip", "-6", "route", "show", "table", "all"
    )
    node.sh("ip", "-6", "route", "del", "local", "::1", "dev", "warren-br0", "table", "main")
    assert node.run(converge(driver, allowed)) == Delta()
    assert node.run(converge(driver, plan(()))) == Delta()
    assert "local ::1 dev warren-br0" not in node.sh("ip", "-6", "route", "show", "table", "all")


@pytest.mark.parametrize(("loopback", "value"), [(True, "1"), (False, "0"), (None, None)])
def test_loopback_addresses_are_routed_on_the_bridge_only(
    loopback: bool | None, value: str | None
) -> None:
    wanted = desired_sysctls(NAMES, loopback=loopback)

    routed = {key: of for key, of in wanted.items() if "localnet" in key}
    assert routed == ({"net/ipv4/conf/warren-br0/route_localnet": value} if value else {})


def test_kernel_settings_are_written_once(node: Namespace, driver: LinkDriver) -> None:
    node.run(converge(driver, plan()))
    sysctls = SysctlDriver(Path("/proc/sys"))
    wanted = desired_sysctls(NAMES)
    present = node.run(sysctls.read(wanted))
    node.sh("sysctl", "-w", "net.ipv4.ip_forward=0")

    problems = node.run(sysctls.apply(Delta.between(node.run(sysctls.read(wanted)), wanted)))

    assert problems == ()
    assert node.sh("sysctl", "-n", "net.ipv4.ip_forward") == "1\n"
    assert node.run(sysctls.read(wanted)) == {key: wanted[key] for key in present}


def test_a_setting_that_cannot_be_written_is_a_problem_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "net/ipv4/ip_forward").mkdir(parents=True)
    sysctls = SysctlDriver(tmp_path)
    wanted = {"net/ipv4/ip_forward": "1", "net/bridge/bridge-nf-call-iptables": "0"}

    (problem,) = asyncio.run(sysctls.apply(Delta({}, wanted)))

    assert problem.about == "sysctl net.ipv4.ip_forward"
    assert "sysctl -w net.ipv4.ip_forward=1" in problem.message


def test_a_taken_udp_port_is_named(node: Namespace) -> None:
    async def check() -> None:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as other:
            other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            other.bind(("::", 51820))
            with pytest.raises(HostNotReady, match="UDP port 51820 is taken"):
                host.check_port(51820)
        host.check_port(51820)

    node.run(check())

"""The overlay with real WireGuard between machines in namespaces, with containers behind them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mesh.dataplane import sysctl
from mesh.dataplane.link import LinkDriver
from mesh.dataplane.sysctl import SysctlDriver
from mesh.errors import HostNotReady
from mesh.model import link
from mesh.model.address import FAMILIES, Family
from mesh.model.cluster import Cluster
from mesh.model.node import Node, Role
from mesh.model.view import PeerNode
from mesh.rules import marks
from mesh.wg import keys, links, plan
from mesh.wg.device import Overlay
from mesh.wg.network import Network, Wanted
from tests.support.namespaces import Namespace, wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mesh.wg.plan import Session

pytestmark = pytest.mark.netns

CLUSTER = Cluster(id="test", prefix6="fd12:3456:789a::/48")
PATIENCE = 60.0
STEERED = 0xFFF00000


class Machine:
    """A node: underlay 192.0.2.N and 2001:db8::N, and a container behind its bridge."""

    def __init__(self, number: int, switch: Namespace, state_dir: Path) -> None:
        self.number = number
        self.name = f"n{number}"
        self.state_dir = state_dir
        self.network = CLUSTER.network(number)
        # wireguard-go's socket is named after the device, in a directory all namespaces share.
        self.names = link.DeviceNames(f"warren{number}", "warren-x0", "warren-br0")
        self.namespace = Namespace(self.name)
        wire(
            self.namespace, "eth0", switch, f"port{number}",
            f"192.0.2.{number}/24", f"2001:db8::{number}/64",
        )  # fmt: skip
        switch.sh("ip", "link", "set", f"port{number}", "master", "switch")
        self.container: Namespace | None = None
        self.start()
        self.key = self.namespace.run(keys.load(state_dir))

    def start(self) -> None:
        """A new agent: drivers that know nothing."""
        self.links = LinkDriver(self.names)
        self.overlay = Overlay(self.links)
        self.net = Network(self.overlay, self.links, SysctlDriver(Path("/proc/sys")))

    def restart(self) -> None:
        self.namespace.run(self.links.close())
        self.start()

    def node(self, family: Family = Family.V4) -> PeerNode:
        host = f"192.0.2.{self.number}" if family is Family.V4 else f"2001:db8::{self.number}"
        endpoint = f"{host}:51820" if family is Family.V4 else f"[{host}]:51820"
        addresses = (f"192.0.2.{self.number}", f"2001:db8::{self.number}")
        node = Node(
            name=self.name,
            role=Role.WORKER,
            public_key=self.key.public,
            endpoints=(endpoint,),
            addresses=addresses,
        )
        return PeerNode(node, self.network)

    def wanted(self, nodes: dict[str, PeerNode]) -> Wanted:
        return Wanted.of(links.Local(self.names, 1500, marks.DEFAULT), CLUSTER, nodes, self.name)

    def join(self, nodes: dict[str, PeerNode]) -> None:
        """What an agent does with the nodes it hears of."""
        assert self.namespace.run(self._reconcile(self.wanted(nodes))) == ()

    async def _reconcile(self, wanted: Wanted) -> tuple[object, ...]:
        underlay = await self.links.underlay()
        settings = sysctl.desired(self.names)
        port = CLUSTER.wireguard_port
        return await self.net.reconcile(self.key, port, wanted, underlay, settings)

    def sessions(self) -> dict[str, Session]:
        return self.namespace.run(self.overlay.read()).sessions

    def wireguard(self) -> int:
        """The process behind the device."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if words[:2] == [b"wireguard-go", self.names.overlay.encode()]:
                    return int(entry.name)
        raise AssertionError(f"no wireguard-go drives {self.names.overlay}")

    def start_container(self) -> Namespace:
        container = self.container = Namespace(f"{self.name}-c")
        wire(
            container, "eth0", self.namespace, "veth0",
            *(f"{container_address(self, f)}/{'24' if f is Family.V4 else '64'}" for f in FAMILIES),
        )  # fmt: skip
        self.namespace.sh("ip", "link", "set", "veth0", "master", self.names.bridge)
        for family in FAMILIES:
            gateway = self.network.gateway(family)
            container.sh("ip", f"-{family.value}", "route", "add", "default", "via", gateway)
        return container

    def close(self) -> None:
        if self.container is not None:
            self.container.close()
        self.namespace.run(self.net.remove())
        self.namespace.run(self.links.close())
        self.namespace.close()


def container_address(machine: Machine, family: Family) -> str:
    return machine.network.gateway(family)[:-1] + ("11" if family is Family.V4 else "b")


def eventually(happens: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < deadline, f"not within {PATIENCE:g} s: {what}"
        time.sleep(0.05)


def has_ended(process: int) -> bool:
    """An ended process that nobody waited for keeps its entry and has no command line."""
    try:
        return not Path(f"/proc/{process}/cmdline").read_bytes()
    except FileNotFoundError:
        return True


def mesh(*machines: Machine, family: Family = Family.V4) -> dict[str, PeerNode]:
    return {machine.name: machine.node(family) for machine in machines}


@pytest.fixture
def switch() -> Iterator[Namespace]:
    switch = Namespace("switch")
    switch.sh("ip", "link", "add", "switch", "type", "bridge")
    switch.sh("ip", "link", "set", "switch", "up")
    yield switch
    switch.close()


@pytest.fixture
def machines(switch: Namespace, tmp_path: Path) -> Iterator[list[Machine]]:
    machines = [Machine(number, switch, tmp_path / f"n{number}") for number in (1, 2, 3)]
    yield machines
    for machine in machines:
        machine.close()


@pytest.mark.parametrize("underlay", FAMILIES)
def test_containers_reach_each_other_across_the_overlay(
    machines: list[Machine], underlay: Family
) -> None:
    one, two, _ = machines
    nodes = mesh(one, two, family=underlay)
    for machine in (one, two):
        machine.join(nodes)
    near, _ = one.start_container(), two.start_container()

    for family in FAMILIES:
        target = container_address(two, family)
        eventually(lambda t=target: near.reaches(t), f"container to {target}")  # type: ignore[misc]
        assert one.namespace.reaches(target)
        assert near.reaches(two.network.overlay_address(family))
    assert one.sessions()[two.key.public].handshake > 0


def test_a_steered_packet_goes_through_the_steering_device(machines: list[Machine]) -> None:
    one, two, _ = machines
    for machine in (one, two):
        machine.join(mesh(one, two))
    two.start_container()
    # As the program's last chain does: vxlan looks up its outer route with the packet's mark.
    one.namespace.sh(
        "nft",
        "add table inet t; add chain inet t last { type filter hook postrouting priority 300; }; "
        f"add rule inet t last oifname {one.names.steering} meta mark set 0",
    )

    for family in FAMILIES:
        before = _received(two)
        target, source = container_address(two, family), one.network.overlay_address(family)
        eventually(
            lambda t=target, s=source: one.namespace.reaches(t, STEERED, s),  # type: ignore[misc]
            f"steered to {target}",
        )
        assert _received(two) > before


def _received(machine: Machine) -> int:
    path = f"/sys/class/net/{machine.names.steering}/statistics/rx_packets"
    return int(machine.namespace.sh("cat", path))


def test_a_restarted_agent_finds_everything_in_place(machines: list[Machine]) -> None:
    one, two, _ = machines
    nodes = mesh(one, two)
    for machine in (one, two):
        machine.join(nodes)
    eventually(lambda: one.namespace.reaches(two.network.overlay[0]), "overlay")
    before, process = one.sessions()[two.key.public], one.wireguard()

    one.restart()
    peers = one.namespace.run(one.overlay.read()).peers
    links = one.namespace.run(one.links.read())

    wanted = one.wanted(nodes)
    assert not plan.changes(peers, wanted.peers, frozenset())
    assert not link.changes(links, wanted.links)
    assert one.namespace.run(keys.load(one.state_dir)) == one.key
    one.join(nodes)
    assert one.wireguard() == process
    assert one.sessions()[two.key.public].handshake == before.handshake
    assert one.namespace.reaches(two.network.overlay[0])


def test_the_tunnel_belongs_to_no_agent(machines: list[Machine]) -> None:
    one, *_ = machines
    one.join(mesh(one))

    process = one.wireguard()
    assert os.getsid(process) != os.getsid(0)
    assert os.getpgid(process) != os.getpgid(0)


def test_peers_come_and_go_without_touching_the_sessions_of_others(
    machines: list[Machine],
) -> None:
    one, two, three = machines
    for machine in (one, two):
        machine.join(mesh(one, two))
    eventually(lambda: one.namespace.reaches(two.network.overlay[0]), "overlay")
    before = one.sessions()[two.key.public]

    for machine in machines:
        machine.join(mesh(*machines))
    eventually(lambda: one.namespace.reaches(three.network.overlay[1]), "the new peer")
    one.join(mesh(one, two))

    assert one.namespace.reaches(two.network.overlay[0])
    after = one.sessions()
    assert set(after) == {two.key.public}
    assert after[two.key.public].handshake == before.handshake
    assert after[two.key.public].received > before.received
    assert not one.namespace.reaches(three.network.overlay[0])


def test_a_change_of_plan_is_applied_without_reading_and_leaves_nothing_to_do(
    machines: list[Machine],
) -> None:
    one, two, three = machines
    for machine in (one, three):
        machine.join(mesh(*machines))
    before, after = one.wanted(mesh(one, two)), one.wanted(mesh(one, three, family=Family.V6))
    one.join(mesh(one, two))

    one.namespace.run(one.net.update(before, after))

    assert not link.changes(one.namespace.run(one.links.read()), after.links)
    assert one.namespace.run(one.overlay.read()).peers == after.peers
    eventually(lambda: one.namespace.reaches(three.network.overlay[1]), "the new peer")


def test_a_tunnel_that_died_is_revived_with_all_that_hung_on_it(machines: list[Machine]) -> None:
    one, two, _ = machines
    nodes = mesh(one, two)
    for machine in (one, two):
        machine.join(nodes)
    os.kill(one.wireguard(), signal.SIGKILL)
    eventually(lambda: one.names.overlay not in one.namespace.sh("ip", "link"), "the device ends")

    one.join(nodes)

    assert not link.changes(one.namespace.run(one.links.read()), one.wanted(nodes).links)
    eventually(lambda: one.namespace.reaches(two.network.overlay[0]), "overlay")


def test_a_peer_that_roamed_is_not_sent_back_to_what_it_announced(
    machines: list[Machine],
) -> None:
    one, two, _ = machines
    nodes = mesh(one, two)
    for machine in (one, two):
        machine.join(nodes)
    eventually(lambda: one.namespace.reaches(two.network.overlay[0]), "overlay")
    two.namespace.sh("ip", "addr", "del", "192.0.2.2/24", "dev", "eth0")
    two.namespace.sh("ip", "addr", "add", "192.0.2.99/24", "dev", "eth0")
    eventually(lambda: two.namespace.reaches(one.network.overlay[0]), "from the new address")

    one.join(nodes)

    peers = one.namespace.run(one.overlay.read()).peers
    assert peers[two.key.public].endpoint == "192.0.2.99:51820"
    assert one.namespace.reaches(two.network.overlay[0])


def test_removal_ends_the_tunnel_and_leaves_nothing(machines: list[Machine]) -> None:
    one, *_ = machines
    before = one.namespace.sh("ip", "rule"), one.namespace.sh("ip", "route")
    one.join(mesh(*machines))
    process = one.wireguard()

    one.namespace.run(one.net.remove())

    eventually(lambda: has_ended(process), "wireguard-go ends")
    assert "warren" not in one.namespace.sh("ip", "link")
    assert (one.namespace.sh("ip", "rule"), one.namespace.sh("ip", "route")) == before
    assert not Path(f"/var/run/wireguard/{one.names.overlay}.sock").exists()


def test_a_tun_device_of_somebody_else_is_not_taken(machines: list[Machine]) -> None:
    one, *_ = machines
    one.namespace.sh("ip", "tuntap", "add", one.names.overlay, "mode", "tun")

    with pytest.raises(HostNotReady, match="warren1 exists, and no wireguard-go drives it"):
        one.join(mesh(one))


def test_the_key_is_private_made_once_and_never_printed(tmp_path: Path) -> None:
    node = Namespace("keys")
    state_dir = tmp_path / "state"

    key = node.run(keys.load(state_dir))

    path = state_dir / keys.FILE_NAME
    assert path.stat().st_mode & 0o777 == 0o600
    assert key.secret == path.read_text().strip()
    assert key.secret not in repr(key) + str(key)
    assert node.run(keys.load(state_dir)) == key
    path.write_text("nonsense\n")
    with pytest.raises(HostNotReady, match="not a WireGuard key"):
        node.run(keys.load(state_dir))
    node.close()

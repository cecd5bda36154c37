"""Ports published without etcd: what is left when processes are killed, work at once, or are
refused; asked of those who connect.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from typing import TYPE_CHECKING, Final

import msgspec
import pytest

from mesh.dataplane import netns
from mesh.errors import Conflict
from mesh.hostports import AsyncHostPortPublisher
from mesh.model.address import FAMILIES, Family
from mesh.model.publish import Protocol
from tests.support.echo import REFUSED, SILENCE, ask
from tests.support.lonehost import (
    ADDRESSES,
    HOST,
    SERVER_PORT,
    answers,
    publisher,
)

if TYPE_CHECKING:
    from pathlib import Path

    from mesh.hostports import HostPortPublisher
    from mesh.model.mapping import PortMapping
    from tests.support.namespaces import Namespace

pytestmark = pytest.mark.netns

TASK: Final = "task-abc123"


def at(name: str, family: Family) -> str:
    return ADDRESSES[name][FAMILIES.index(family)]


def numbers(mappings: tuple[PortMapping, ...]) -> list[int]:
    return [each.host_port for each in mappings]


def test_what_is_unpublished_refuses(ports: HostPortPublisher) -> None:
    ports.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}", f"30081:{SERVER_PORT}"])
    ports.publish_ports("other", ADDRESSES["c2"], [f"30082:{SERVER_PORT}"])
    assert answers(30080) == answers(30081) == {"c1"}

    assert ports.unpublish_ports(TASK)

    assert answers(30080) == answers(30081) == {REFUSED}
    assert answers(30082) == {"c2"}
    assert ports.get_published_ports(TASK) == ()
    assert not ports.unpublish_ports(TASK)


def test_what_a_process_of_the_host_listens_on_is_not_taken_from_it(
    ports: HostPortPublisher,
) -> None:
    with netns.entered(HOST), socket.create_server(("192.0.2.1", 30080)):
        with pytest.raises(Conflict, match=rf"30080/tcp is used by .*\(pid {os.getpid()}\)"):
            ports.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}"])
        ports.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}/udp"])
        ports.publish_ports("other", ADDRESSES["c2"], [f"172.17.0.1:30080:{SERVER_PORT}"])
    with netns.entered(HOST), socket.create_server(("", 32000)):
        given = ports.publish_ports("dynamic", ADDRESSES["c1"], [f"{SERVER_PORT}"])
    assert numbers(given) == [32001]


def test_a_task_asks_again(ports: HostPortPublisher) -> None:
    first = ports.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}", f"{SERVER_PORT}"])

    again = ports.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}", f"{SERVER_PORT}"])
    assert again == first == ports.get_published_ports(TASK)

    moved = ports.publish_ports(TASK, ADDRESSES["c2"], [f"{SERVER_PORT}", f"30081:{SERVER_PORT}"])
    dynamic = numbers(first)[1]
    assert numbers(moved) == [dynamic, 30081]
    assert answers(dynamic) == answers(30081) == {"c2"}
    assert answers(30080) == {REFUSED}


def test_udp_clients_follow_a_task_that_moves(ports: HostPortPublisher) -> None:
    """A flow that goes on is not left with the container that is gone."""
    ports.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}/udp"])
    source = {family: at("client", family) for family in FAMILIES}
    assert _from_one_port(source) == {"c1"}

    ports.publish_ports(TASK, ADDRESSES["c2"], [f"30080:{SERVER_PORT}/udp"])
    ports.close()  # once it is done, all is tidy

    assert _from_one_port(source) == {"c2"}


def _from_one_port(sources: dict[Family, str]) -> set[str]:
    """Who answers to a client that keeps its port."""
    found = set()
    for family, source in sources.items():
        with netns.entered("/run/netns/client"):
            domain = socket.AF_INET if family is Family.V4 else socket.AF_INET6
            client = socket.socket(domain, socket.SOCK_DGRAM)
        with client:
            client.settimeout(10)
            client.bind((source, 40123))
            client.connect((at("host", family), 30080))
            client.send(b"?")
            found.add(client.recv(100).decode().partition(" ")[0])
    return found


def test_a_restart_adopts_and_loses_no_connection(
    ports: HostPortPublisher, state: Path, backend: str
) -> None:
    ports.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}"])
    ports.close()
    failed, stop = [], threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            if answers(30080) != {"c1"}:
                failed.append(1)

    client = threading.Thread(target=keep_asking)
    client.start()
    try:
        for _ in range(3):
            with publisher(state, backend) as again:
                assert numbers(again.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}"]))
                assert not again.check().repaired
    finally:
        stop.set()
        client.join()

    assert not failed


async def test_in_a_running_loop(host: Namespace, state: Path) -> None:
    """Both kinds: the one for loops does not block it."""
    del host
    with publisher(state, "nftables") as blocking, netns.entered(HOST):
        blocking.publish_ports("one", "172.17.0.2", [f"30080:{SERVER_PORT}"])
        async with AsyncHostPortPublisher(state, backend="nftables") as ports:
            done = await asyncio.gather(
                *(ports.publish_ports(f"t{n}", "172.17.0.3", [f"{SERVER_PORT}"]) for n in range(5))
            )
            assert len({each.host_port for mappings in done for each in mappings}) == 5
            assert len(await ports.published()) == 6
            assert await ports.unpublish_ports("one")
            assert await ports.get_published_ports("one") == ()
            assert not (await ports.check()).repaired
            assert ask("client", Protocol.TCP, "192.0.2.1", 30080) == REFUSED
            await ports.cleanup()


def test_after_a_reboot_the_state_is_installed(
    host: Namespace, ports: HostPortPublisher, state: Path, backend: str
) -> None:
    ports.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}"])
    ports.publish_ports("other", ADDRESSES["c2"], [f"30081:{SERVER_PORT}"])
    _reboot(host, ports, state)

    with publisher(state, backend) as again:
        assert again.restore() == 2

    assert answers(30080) == {"c1"}
    assert answers(30081) == {"c2"}


def _reboot(host: Namespace, ports: HostPortPublisher, state: Path) -> None:
    """The kernel forgets, and the boot has another name."""
    ports.close()
    host.sh("nft", "flush", "ruleset")
    for program in ("iptables-legacy", "ip6tables-legacy"):
        for table in ("raw", "nat", "filter", "mangle"):
            host.sh(program, "-t", table, "-F")
            host.sh(program, "-t", table, "-X")
    host.sh("ipset", "destroy")
    header = state / "header"
    told = msgspec.json.decode(header.read_bytes().strip())
    told["namespace"] = "another-boot/1"
    header.write_bytes(msgspec.json.encode(told).ljust(512))


def test_what_somebody_changed_is_put_right(host: Namespace, ports: HostPortPublisher) -> None:
    ports.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}"])
    assert not ports.check().repaired
    host.sh("nft", "flush", "ruleset")
    host.sh("iptables-legacy", "-t", "nat", "-F")

    assert ports.check().repaired

    assert answers(30080) == {"c1"}
    assert not ports.check().repaired


@pytest.mark.parametrize("flavour", ["legacy", "nft"])
def test_beside_a_firewall_that_drops_what_is_forwarded(
    host: Namespace, ports: HostPortPublisher, state: Path, backend: str, flavour: str
) -> None:
    """As Docker and ufw set it up, and forget what others had there when they are restarted."""
    programs = (f"iptables-{flavour}", f"ip6tables-{flavour}")
    for program in programs:
        host.sh(program, "-P", "FORWARD", "DROP")
    try:
        ports.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}"])

        assert answers(30080) == {"c1"}
        assert ask("client", Protocol.TCP, ADDRESSES["c1"][0], SERVER_PORT, patience=0.3) == SILENCE
        assert ports.problems == ()

        ports.close()
        for program in programs:
            host.sh(program, "-F", "FORWARD")
        with publisher(state, backend) as again:
            again.restore()
            assert answers(30080) == {"c1"}
    finally:
        for program in programs:
            host.sh(program, "-P", "FORWARD", "ACCEPT")


def test_where_bridged_packets_pass_the_firewall(host: Namespace, ports: HostPortPublisher) -> None:
    """Docker has the kernel do so.  It bridges a container's packets to itself then, and a bridge
    sends nothing back where it came from, unless that port is a hairpin.
    """
    settings = [f"net.bridge.bridge-nf-call-{each}" for each in ("iptables", "ip6tables")]
    if host.sh("sysctl", "-nq", "-e", *settings) == "":
        pytest.skip("this kernel has no br_netfilter")

    def hairpin(state: str) -> None:
        host.sh("ip", "link", "set", "veth-c1", "type", "bridge_slave", "hairpin", state)

    host.sh("sysctl", "-qw", *(f"{each}=1" for each in settings))
    hairpin("on")
    try:
        texts = [f"30080:{SERVER_PORT}/{p.value}" for p in Protocol]
        ports.publish_ports(TASK, ADDRESSES["c1"], texts)

        for who in ("client", "host", "c1", "c2", "c3"):
            seen = ADDRESSES["docker0" if who in ("c1", "c2") else who]
            for protocol in Protocol:
                for at, address in zip(ADDRESSES["host"], seen, strict=True):
                    assert ask(who, protocol, at, 30080) == f"c1 {address}", (who, protocol)
    finally:
        hairpin("off")
        host.sh("sysctl", "-qw", *(f"{each}=0" for each in settings))


def test_a_kernel_that_does_not_forward_is_told_of(
    host: Namespace, ports: HostPortPublisher
) -> None:
    host.sh("sysctl", "-qw", "net.ipv4.ip_forward=0")
    try:
        ports.publish_ports(TASK, ADDRESSES["c1"][0], [f"30080:{SERVER_PORT}"])

        (problem,) = ports.problems
        assert "sysctl -w net.ipv4.ip_forward=1" in problem.message
    finally:
        host.sh("sysctl", "-qw", "net.ipv4.ip_forward=1")


def test_cleanup_leaves_nothing(host: Namespace, ports: HostPortPublisher, state: Path) -> None:
    def everything() -> list[str]:
        found = [host.sh("nft", "list", "ruleset"), host.sh("ipset", "list", "-n")]
        for program in ("iptables-legacy-save", "ip6tables-legacy-save"):
            found += [line for line in host.sh(program).splitlines() if line.startswith("-A")]
        return found

    ports.cleanup()
    before = everything()
    ports.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}"])
    assert everything() != before

    ports.cleanup()

    assert everything() == before
    assert not state.exists()
    ports.cleanup()
    ports.publish_ports(TASK, ADDRESSES["c1"], [f"30080:{SERVER_PORT}"])
    assert answers(30080) == {"c1"}

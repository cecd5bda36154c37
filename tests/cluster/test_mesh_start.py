"""An agent on a host that cannot take part says why in one line; --cleanup leaves what is not ours.

One lab of one machine, on which no agent runs unless a test starts one.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from mesh.agent import config
from mesh.lab import control, wire
from mesh.rules import edition
from tests.support.bare import machine
from tests.support.cluster import LIMIT, Cluster, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.lab.client import Completed

pytestmark = pytest.mark.cluster

MESH: Final = (sys.executable, "-m", "mesh")
HOME: Final = "/run/lab"
"""A machine's own directory, as it sees it."""


@pytest.fixture(scope="module")
def bare() -> Iterator[Cluster]:
    with machine("bare") as made:
        yield made


def configure(bare: Cluster, **changes: object) -> str:
    """A configuration like the lab's own with some changes; its path on the machine."""
    path = Path(bare.node("n1").config)
    settings = config.load(path)
    fields = {name: getattr(settings, name) for name in settings.__struct_fields__}
    other = path.with_name("other.toml")
    other.write_text(config.dump(config.AgentConfig(**{**fields, **changes})))
    return f"{HOME}/other.toml"


async def agent(bare: Cluster, path: str, *prelude: str) -> Completed:
    """What `mesh agent` comes to on the machine; `prelude` is a program that runs it."""
    async with asyncio.timeout(LIMIT):
        return await bare.lab.run("n1", [*prelude, *MESH, "agent", "--config", path])


def expect_refusal(done: Completed, *words: str) -> None:
    """Exit code 1, and a last line for the user that has these words; no traceback."""
    assert done.code == 1, done.stderr
    assert "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("mesh: ")]
    assert len(told) == 1, done.stderr
    assert done.stderr.rstrip().endswith(told[0])
    for word in words:
        assert word in told[0]


def etcd(bare: Cluster, **changes: object) -> config.EtcdConfig:
    own = config.load(Path(bare.node("n1").config)).etcd
    fields = {name: getattr(own, name) for name in own.__struct_fields__}
    return config.EtcdConfig(**{**fields, **changes})


async def test_no_etcd(bare: Cluster) -> None:
    path = configure(bare, etcd=etcd(bare, endpoints=("http://192.168.50.5:1",)))

    expect_refusal(await agent(bare, path), "http://192.168.50.5:1", "check that it runs")


async def test_no_cluster(bare: Cluster) -> None:
    path = configure(bare, etcd=etcd(bare, prefix="/nobody"))

    expect_refusal(await agent(bare, path), "/nobody/cluster", "mesh cluster init")


async def test_an_unreadable_cluster(bare: Cluster) -> None:
    bare.records.call("kv/put", {"key": "L2JhZC9jbHVzdGVy", "value": "e30="})  # /bad/cluster: {}
    path = configure(bare, etcd=etcd(bare, prefix="/bad"))

    expect_refusal(await agent(bare, path), "/bad/cluster", "`id`")


async def test_the_wireguard_port_is_taken(bare: Cluster) -> None:
    holder = (
        "import os, socket, sys; s = socket.socket(type=socket.SOCK_DGRAM); "
        "s.bind(('', 51820)); s.set_inheritable(True); os.execvp(sys.argv[1], sys.argv[1:])"
    )

    done = await agent(bare, configure(bare), sys.executable, "-c", holder)

    expect_refusal(done, "51820", "stop what uses it")


async def test_a_route_of_the_host_overlaps(bare: Cluster) -> None:
    bare.sh("n1", "ip", "route", "add", "10.0.3.0/24", "via", "192.168.50.254")
    try:
        done = await agent(bare, configure(bare))
    finally:
        bare.sh("n1", "ip", "route", "del", "10.0.3.0/24")

    expect_refusal(done, "10.0.3.0/24", "10.0.0.0/16")


async def test_a_routing_rule_of_the_host_is_about_our_marks(bare: Cluster) -> None:
    rule = ("pref", "5270", "fwmark", "0x80000/0xff0000", "lookup", "52")
    chosen = config.MarksConfig(packet_mark=0x0FFF0000)  # with Tailscale's bit in it
    bare.sh("n1", "ip", "-6", "rule", "add", *rule)
    try:
        done = await agent(bare, configure(bare, marks=chosen))
    finally:
        bare.sh("n1", "ip", "-6", "rule", "del", *rule)

    expect_refusal(
        done, "packet_mark 0x0fff0000", "IPv6 rule 5270 (fwmark 0x80000/0xff0000)", "agent.toml"
    )


async def test_no_right_to_change_the_network(bare: Cluster) -> None:
    drop = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", "--")

    expect_refusal(await agent(bare, configure(bare), *drop), "CAP_NET_ADMIN", "root")


@pytest.mark.parametrize(
    ("program", "package"),
    [("nft", "nftables"), ("wg", "wireguard-tools"), ("wireguard-go", "wireguard-go")],
)
async def test_a_program_is_missing(bare: Cluster, program: str, package: str) -> None:
    hide = f'mount --bind /dev/null "$(command -v {program})" && exec "$@"'
    private = ("unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "sh")

    done = await agent(bare, configure(bare, backend="nftables"), *private)

    expect_refusal(done, program, package)


async def test_no_tun_device(bare: Cluster) -> None:
    hide = 'mount -t tmpfs tmpfs /dev/net && exec "$@"'
    private = ("unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "sh")

    expect_refusal(await agent(bare, configure(bare), *private), "/dev/net/tun")


async def test_a_second_agent_with_the_same_state(bare: Cluster) -> None:
    path = configure(bare, state_dir=f"{HOME}/held")
    (Path(bare.node("n1").config).with_name("held")).mkdir()
    locked = ("flock", "--no-fork", f"{HOME}/held/agent.lock")

    expect_refusal(await agent(bare, path, *locked), f"{HOME}/held", "stop it first")


async def test_a_second_agent_with_another_configuration(bare: Cluster) -> None:
    other = configure(bare, state_dir=f"{HOME}/elsewhere", node="n9", overlay_device="other0")
    await control.call(bare.lab.name, wire.Start(target="n1"))
    await until(lambda: bare.records.get("applied/n1") is not None, "the agent forwards")

    done = await agent(bare, other)
    await bare.signal("n1", signal.SIGTERM)
    await bare.refresh()
    await until(lambda: not bare.agent_runs("n1"))
    await remove(bare)

    expect_refusal(done, "another agent (process", "stop it first")


async def remove(bare: Cluster, *options: str) -> Completed:
    """`mesh agent --cleanup`."""
    path = configure(bare)
    return await bare.lab.run("n1", [*MESH, "agent", "--cleanup", *options, "--config", path])


async def test_rules_of_a_later_version(bare: Cluster) -> None:
    for line in (
        "add table inet mesh",
        "add map inet mesh fingerprint { type mark : mark; }",
        f"add element inet mesh fingerprint {{ {edition.SLOT} : 77 }}",
    ):
        bare.sh("n1", "nft", line)

    refused = await agent(bare, configure(bare))
    not_removed = await remove(bare)
    there = bare.sh("n1", "nft", "list", "tables")
    removed = await remove(bare, "--downgrade")

    expect_refusal(refused, "table inet mesh", "edition 77", "--downgrade")
    expect_refusal(not_removed, "edition 77", "--downgrade")
    assert "table inet mesh" in there
    assert removed.code == 0, removed.stderr
    assert "table inet mesh" not in bare.sh("n1", "nft", "list", "tables")


OLD_NFT: Final = """#!/bin/sh
text=$(cat)
case $text in
  *numgen*) echo "Error: Could not process rule: Operation not supported" >&2; exit 1;;
esac
printf '%s\\n' "$text" | exec /usr/sbin/nft "$@"
"""
"""An nft or a kernel that cannot draw lots."""


async def test_a_feature_of_nftables_is_missing(bare: Cluster) -> None:
    fake = Path(bare.node("n1").config).with_name("fake")
    fake.mkdir()
    (fake / "nft").write_text(OLD_NFT)
    (fake / "nft").chmod(0o755)
    old = ("env", f"PATH={HOME}/fake:/usr/sbin:/usr/bin:/sbin:/bin")
    noted = ("sh", "-c", f'echo $$ >{HOME}/pid && exec "$@"', "sh")
    path = configure(bare, backend="auto")

    running = asyncio.create_task(agent(bare, path, *old, *noted))
    await until(lambda: bare.records.get("applied/n1") is not None, "the agent forwards")
    told = bare.records.get("applied/n1")
    await bare.lab.run("n1", ["sh", "-c", f"kill $(cat {HOME}/pid)"])
    done = await running
    await remove(bare)

    assert told["backend"].startswith("iptables-")
    assert "Operation not supported" in told["reason"]
    assert f"backend={told['backend']}" in done.stderr
    assert "Operation not supported" in done.stderr


async def test_a_feature_of_nftables_and_what_replaces_it_are_missing(bare: Cluster) -> None:
    fake = Path(bare.node("n1").config).with_name("poor")
    fake.mkdir()
    (fake / "nft").write_text(OLD_NFT)
    (fake / "nft").chmod(0o755)
    old = ("env", f"PATH={HOME}/poor:/usr/sbin:/usr/bin:/sbin:/bin")
    hide = 'mount --bind /dev/null "$(command -v ipset)" && exec "$@"'
    private = ("unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "sh")

    done = await agent(bare, configure(bare, backend="auto"), *private, *old)
    await remove(bare)

    expect_refusal(done, "ipset is not installed", "apt install ipset")
    assert "Operation not supported" in done.stderr


async def test_wrong_credentials(bare: Cluster) -> None:
    """An etcd without users takes any; one with users refuses what is wrong."""
    for user in ("root", "mesh"):
        bare.records.call("auth/user/add", {"name": user, "password": "right"})
    bare.records.call("auth/role/add", {"name": "root"})
    bare.records.call("auth/user/grant", {"user": "root", "role": "root"})
    bare.records.call("auth/enable", {})
    try:
        wrong = configure(bare, etcd=etcd(bare, user="mesh", password="wrong"))
        refused = await agent(bare, wrong)
        nobody = await agent(bare, configure(bare))
        helpless = configure(bare, etcd=etcd(bare, user="mesh", password="right"))
        denied = await agent(bare, helpless)
    finally:
        with bare.records.user("root", "right"):
            bare.records.call("auth/disable", {})

    expect_refusal(refused, "check user and password")
    expect_refusal(nobody, "give it user and password")
    expect_refusal(denied, "permission denied", "grant")


async def test_cleanup_leaves_what_is_not_ours(bare: Cluster) -> None:
    for foreign in (
        "sysctl -qw net.ipv6.conf.all.forwarding=1",  # kernel settings stay, with their routes
        "nft add table inet theirs",
        "nft add chain inet theirs in { type filter hook input priority 0; }",
        "nft add rule inet theirs in tcp dport 7 drop",
        "nft add table ip mesh2",
        "iptables -A FORWARD -s 203.0.113.0/24 -j DROP",
        "ip6tables -A FORWARD -s 2001:db8::/32 -j DROP",
        "ip link add theirs type bridge",
        "ip route add 203.0.113.0/24 via 192.168.50.254",
        "ip route add table 7777 203.0.114.0/24 via 192.168.50.254",
        "ip rule add pref 6999 fwmark 7 lookup 7777",
        "ip rule add pref 7500 fwmark 8 lookup 7777",
        "ip -6 rule add pref 7500 fwmark 8 lookup 7777",
    ):
        bare.sh("n1", *foreign.split())
    before = everything(bare)

    await control.call(bare.lab.name, wire.Start(target="n1"))
    await until(lambda: bare.records.get("applied/n1") is not None, "the agent forwards")
    during = everything(bare)
    path = configure(bare)
    busy = await bare.lab.run("n1", [*MESH, "agent", "--cleanup", "--config", path])
    await bare.signal("n1", signal.SIGTERM)
    await bare.refresh()
    await until(lambda: not bare.agent_runs("n1"))
    done = await bare.lab.run("n1", [*MESH, "agent", "--cleanup", "--config", path])
    again = await bare.lab.run("n1", [*MESH, "agent", "--cleanup", "--config", path])
    processes = await bare.lab.run("n1", ["ps", "-A", "-o", "comm="])

    expect_refusal(busy, "another agent runs")
    assert all(during[what] != before[what] for what in before)
    assert (done.code, again.code) == (0, 0), done.stderr
    assert everything(bare) == before
    assert "wireguard-go" not in processes.stdout
    assert bare.records.get("alive/n1") is None


def everything(bare: Cluster) -> dict[str, str]:
    """All of a machine's network that the mesh has a part in."""
    listed = {
        "links": "ip -o -br link",
        "addresses": "ip -o addr show scope global",
        "rules": "ip rule",
        "rules6": "ip -6 rule",
        "routes": "ip route show table all",
        "routes6": "ip -6 route show table all",
        "nftables": "nft -s list ruleset",
    }
    return {what: bare.sh("n1", *command.split()) for what, command in listed.items()}

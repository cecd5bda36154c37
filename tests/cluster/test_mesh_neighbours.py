"""The agent keeps its hands off everything that is not its own, on every backend.

What is foreign on a host is written down before an agent starts, and compared while it forwards,
after it healed, and after `mesh agent --cleanup`.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from mesh.lab import control, wire
from tests.support import drivers
from tests.support.bare import machine
from tests.support.cluster import Cluster, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cluster

OURS: Final = ("warren0", "warren-x0", "warren-br0")
PROTOCOL: Final = ("77", 77)
PROGRAMS: Final = tuple(
    f"{program}-{flavour}" for program in ("iptables", "ip6tables") for flavour in ("nft", "legacy")
)
FOREIGN: Final = (
    # Settings that the mesh needs, and leaves behind.
    "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1",
    "sysctl -qw net.ipv4.conf.all.send_redirects=0",
    "sysctl -qwe net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0",
    "sysctl -qw net.ipv4.conf.default.rp_filter=2 net.ipv4.ip_local_port_range=40000\t60000",
    "nft add table inet theirs",
    "nft add chain inet theirs in { type filter hook input priority 0; }",
    "nft add rule inet theirs in tcp dport 7 drop",
    "nft add set inet theirs mesh { type ipv4_addr; elements = { 192.0.2.1 }; }",
    "nft add table ip mesh",
    "nft add chain ip mesh forward { type filter hook forward priority 0; }",
    "nft add table bridge meshes",
    "ipset create theirs hash:ip",
    "ipset add theirs 192.0.2.1",
    "ipset create mesh-theirs hash:net",
    "ip link add theirs type bridge",
    "ip link set theirs up",
    "ip addr add 203.0.113.1/32 dev theirs",
    "ip route add 203.0.113.0/24 via 192.168.50.254",
    "ip route add table 7777 203.0.114.0/24 via 192.168.50.254",
    "ip route add table 7000 203.0.115.0/24 via 192.168.50.254",
    "ip rule add pref 6999 fwmark 7 lookup 7777",
    "ip rule add pref 7500 fwmark 8 lookup 7777",
    "ip -6 rule add pref 7500 fwmark 8 lookup 7777",
    "ip neigh replace 192.168.50.253 lladdr 02:00:00:00:00:99 dev eth0 nud permanent",
)
OF_IPTABLES: Final = (
    "-P FORWARD DROP",
    "-A FORWARD -i theirs -j ACCEPT",
    "-N MESH-THEIRS",
    "-A MESH-THEIRS -j RETURN",
    "-A INPUT -j MESH-THEIRS",
    "-t nat -A POSTROUTING -o theirs -j MASQUERADE",
    "-t mangle -A FORWARD -o theirs -j MARK --set-mark 7",
    "-t raw -A PREROUTING -i theirs -j ACCEPT",
)
DAMAGE: Final = {
    "nftables": "nft flush chain inet mesh dispatch",
    "iptables-nft": "iptables-nft -t nat -F MESH-FRONTEND",
    "iptables-legacy": "iptables-legacy -t nat -F MESH-FRONTEND",
}


@pytest.fixture(params=drivers.KERNEL)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def host(backend: str) -> Iterator[Cluster]:
    with machine(f"neighbours-{backend}", backend) as made:
        yield made


async def test_what_is_foreign_stays_as_it_is(host: Cluster, backend: str) -> None:
    _furnish(host)
    whole, before = _everything(host), _foreign(host)

    await control.call(host.lab.name, wire.Start(target="n1"))
    await until(lambda: _report(host) is not None, "the agent forwards")
    await until(lambda: "warren-mesh" in _saved(host), "our line is in place")
    running = _foreign(host)
    _sh(host, *DAMAGE[backend].split())
    await until(lambda: _report(host)["healings"]["total"] > 0, "what was broken is healed")
    healed = _foreign(host)
    await host.signal("n1", signal.SIGTERM)
    await host.refresh()
    await until(lambda: not host.agent_runs("n1"))
    stopped = _foreign(host)
    config = str(Path("/run/lab", Path(host.node("n1").config).name))
    cleanup = (sys.executable, "-m", "mesh", "agent", "--cleanup", "--config", config)
    done = await host.lab.run("n1", cleanup)

    assert running == before
    assert healed == before
    assert stopped == before
    assert done.code == 0, done.stderr
    assert _everything(host) == whole
    assert "net.ipv4.ip_forward" in done.stderr


def _sh(host: Cluster, *argv: str) -> str:
    """What a program prints in the machine's network; its /proc is ours, or it would have none."""
    words = ("nsenter", f"--net={host.netns('n1')}", "--", *argv)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def _report(host: Cluster) -> Any:
    return host.records.get("applied/n1")


def _furnish(host: Cluster) -> None:
    for line in FOREIGN:
        _sh(host, *line.split(" "))
    for program in PROGRAMS:
        for line in OF_IPTABLES:
            _sh(host, program, *line.split())
        for table in ("raw", "nat", "mangle", "filter"):  # legacy tables cannot go again
            _sh(host, program, "-t", table, "-S")
    _sh(host, "iptables-nft", "-A", "INPUT", "-m", "set", "--match-set", "theirs", "src",
            "-j", "DROP")  # fmt: skip


def _saved(host: Cluster) -> str:
    return "".join(_sh(host, f"{program}-save") for program in PROGRAMS)


def _everything(host: Cluster) -> dict[str, str]:
    """All that the kernel has of the machine's network."""
    listed = {
        "links": "ip -o link",
        "addresses": "ip -o addr show scope global",
        "neighbours": "ip neigh show nud permanent",
        "rules": "ip rule",
        "rules6": "ip -6 rule",
        "routes": "ip route show table all",
        "routes6": "ip -6 route show table all",
        "ipset": "ipset save",
        "settings": "sysctl -a -r ^net\\.",
    }
    listed |= {program: f"{program}-save" for program in PROGRAMS}
    found = {what: _stable(_sh(host, *line.split())) for what, line in listed.items()}
    return found | {"nftables": "\n".join(json.dumps(each) for each in _nftables(host))}


def _nftables(host: Cluster) -> list[dict[str, Any]]:
    """All but the built-in chains of iptables: those without a rule come and go."""
    listed = json.loads(_sh(host, "nft", "-s", "-j", "list", "ruleset"))["nftables"]
    return [_without_handles(each) for each in listed if not _is_built_in(each)]


def _is_built_in(each: dict[str, Any]) -> bool:
    chain = each.get("chain", {})
    return chain.get("family") in ("ip", "ip6") and chain["name"].isupper() and "hook" in chain


def _stable(text: str) -> str:
    """Without times, counters and settings that count something."""
    lines = (_COUNTERS.sub("", line) for line in text.splitlines())
    return "\n".join(line for line in lines if line[:1] != "#" and not _VOLATILE.match(line))


_COUNTERS: Final = re.compile(r"\[\d+:\d+\]$|packets \d+ bytes \d+")
_VOLATILE: Final = re.compile(r"net\.netfilter\.nf_conntrack_count|net\..*(gc_|stable_secret)")


def _foreign(host: Cluster) -> dict[str, object]:
    """The same without what is the mesh's."""
    found = _everything(host)
    return {
        "links": _lines(found["links"], OURS),
        "addresses": _lines(found["addresses"], OURS),
        "neighbours": _lines(found["neighbours"], OURS),
        "settings": _lines(found["settings"], OURS),
        "ipset": _lines(found["ipset"], ("mesh-",)) | {"mesh-theirs" in found["ipset"]},
        "rules": _routing(host, "rule"),
        "routes": _routing(host, "route", "show", "table", "all"),
        "nftables": [json.dumps(each) for each in _nftables(host) if _is_theirs(each)],
        **{
            program: [line for line in found[program].splitlines() if not _OF_MESH.search(line)]
            for program in PROGRAMS
        },
    }


_OF_MESH: Final = re.compile(r"warren-mesh|MESH-(?!THEIRS)|^\*|^COMMIT|^:[A-Z]+ ACCEPT")
"""In iptables' tables; tables that only we use have nothing but built-in chains that accept."""


def _lines(text: str, ours: tuple[str, ...]) -> set[object]:
    return {line.strip() for line in text.splitlines() if not any(word in line for word in ours)}


def _routing(host: Cluster, *what: str) -> list[str]:
    found = [
        each
        for family in ("-4", "-6")
        for each in json.loads(_sh(host, "ip", family, "-j", "-d", *what))
    ]
    theirs = (e for e in found if e.get("protocol") not in PROTOCOL and e.get("dev") not in OURS)
    return sorted(json.dumps(each, sort_keys=True) for each in theirs)


def _is_theirs(each: dict[str, Any]) -> bool:
    """iptables' own tables are compared as iptables tells them."""
    (kind, body), *_ = each.items()
    table = body.get("name") if kind == "table" else body.get("table")
    if kind == "metainfo" or (body["family"] in ("inet", "bridge") and table == "mesh"):
        return False
    return body["family"] not in ("ip", "ip6") or table == "mesh"


def _without_handles(each: Any) -> Any:
    if isinstance(each, dict):
        return {key: _without_handles(value) for key, value in each.items() if key != "handle"}
    return [_without_handles(one) for one in each] if isinstance(each, list) else each

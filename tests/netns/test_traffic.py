"""Counting flows where the kernel cannot tell of all of them, and from another agent's time."""

from __future__ import annotations

import socket
import subprocess
from contextlib import closing
from typing import TYPE_CHECKING, Final

import pytest

from mesh.engine.traffic import Traffic
from mesh.rules.traffic import Port
from tests.support import layouts
from tests.support.cluster import until
from tests.support.namespaces import Namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.rules.marks import Layout
    from mesh.rules.traffic import Entrance

pytestmark = pytest.mark.netns

DNS: Final = Port("dns", "host", "udp", 53)
OTHER: Final = 54
QUERY: Final = b"query"
MANY: Final = 16_000
"""More than there is room for: eight megabytes, half a kilobyte and more for each."""


def program(layout: Layout) -> str:
    """Gives flows to one port the mark of a frontend, those to others one of ours without, and has
    those to a third come through another node.
    """
    frontend = layout.frontend(7, 1)
    return f"""
    table inet like {{
     map marks {{ type inet_service : mark
      elements = {{ {DNS.port} : {frontend}, {OTHER} : {layout.plain},
       55 : {layout.arrival(7)} }} }}
     chain out {{
      type nat hook output priority -100
      ct mark set udp dport map @marks dnat ip to 127.0.0.1:5353
     }}
    }}"""


@pytest.fixture(params=layouts.ALL)
def layout(request: pytest.FixtureRequest) -> Layout:
    return layouts.ALL[request.param]


@pytest.fixture
def node(layout: Layout) -> Iterator[Namespace]:
    made = Namespace("node")
    try:
        made.sh("nft", program(layout))
        yield made
    finally:
        made.close()


def name(pool: str, entrance: Entrance) -> Port:
    return Port(pool, "host", "udp", entrance.port)


def counting(layout: Layout) -> Traffic:
    arrival = layout.id_of(layout.arrival(7))
    return Traffic(layout, {7: "dns", arrival: "dns"}.get, name, lambda: None)


def flows(first: int, count: int, port: int = DNS.port) -> None:
    """New flows, each of a client of its own, with five bytes of payload."""
    for number in range(first, first + count):
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as own:
            own.bind((f"127.1.{number // 250}.{1 + number % 250}", 0))
            own.sendto(QUERY, ("127.0.0.1", port))


async def connections(traffic: Traffic) -> int:
    found = await traffic.read({DNS})
    assert found.keys() <= {DNS}
    return found[DNS].connections if DNS in found else 0


def test_flows_of_frontends_count_and_no_others(node: Namespace, layout: Layout) -> None:
    async def scenario() -> None:
        traffic = counting(layout)
        try:
            assert await connections(traffic) == 0
            for port in (DNS.port, OTHER, 55, 56):
                flows(0, 20, port)
            assert await connections(traffic) == 20
            node.sh("conntrack", "-F")
            assert await connections(traffic) == 20
            flows(20, 5)
            assert await connections(traffic) == 25
            found = await traffic.read({DNS})
            assert found[DNS].sent == 25 * (20 + 8 + len(QUERY))
        finally:
            traffic.close()

    node.run(scenario())


@pytest.mark.parametrize("layout", ["default"], indirect=True)
def test_more_ends_than_the_kernel_can_tell_hide_nothing_that_comes_later(
    node: Namespace, layout: Layout
) -> None:
    async def scenario() -> None:
        traffic = counting(layout)
        try:
            assert await connections(traffic) == 0
            flows(0, MANY)
            flows(0, 100, OTHER)
            await until(lambda: become(traffic, MANY), "all are counted, and only those")

            subprocess.run(("conntrack", "-F"), check=True, capture_output=True)  # noqa: ASYNC221
            await until(lambda: has_lost(traffic), "not all could be told of")
            assert await connections(traffic) == MANY

            flows(MANY, 10)
            await until(lambda: become(traffic, MANY + 10), "and those that come are counted")
        finally:
            traffic.close()

    node.run(scenario())


async def become(traffic: Traffic, count: int) -> bool:
    return await connections(traffic) == count


async def has_lost(traffic: Traffic) -> bool:
    await connections(traffic)
    return 0 < traffic.lost < MANY


@pytest.mark.parametrize("layout", ["default"], indirect=True)
def test_settings_are_the_host_s_until_somebody_asks(node: Namespace, layout: Layout) -> None:
    def setting() -> str:
        return node.sh("sysctl", "-n", "net.netfilter.nf_conntrack_acct").strip()

    async def scenario() -> None:
        traffic = counting(layout)
        try:
            node.sh("sysctl", "-qw", "net.netfilter.nf_conntrack_acct=0")
            assert setting() == "0"
            await connections(traffic)
            assert setting() == "1"
            assert traffic.problems == ()
        finally:
            traffic.close()

    node.run(scenario())

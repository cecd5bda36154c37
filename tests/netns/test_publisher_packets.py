"""Real packets through ports published without etcd: who answers, and whom it sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mesh.model.address import FAMILIES, Family
from mesh.model.publish import Protocol
from tests.support import drivers
from tests.support.echo import REFUSED, ask
from tests.support.lonehost import ADDRESSES, SERVER_PORT, lone_host, publisher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.hostports import HostPortPublisher

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"v{family.suffix}")


def at(name: str, family: Family) -> str:
    return ADDRESSES[name][FAMILIES.index(family)]


@pytest.fixture(scope="module", params=drivers.KERNEL)
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HostPortPublisher]:
    """c1 on 30001 and, of two addresses of the host, c2 on 30002 of the first; c3 on 30003."""
    state = tmp_path_factory.mktemp("state")
    with lone_host(), publisher(state, request.param) as made:
        for number, name in enumerate(("c1", "c2", "c3"), 1):
            texts = [f"{30000 + number}:{SERVER_PORT}/{p.value}" for p in Protocol]
            if name == "c2":
                addresses = (f"[{a}]" if ":" in a else a for a in ADDRESSES["host"])
                texts = [f"{address}:{text}" for address in addresses for text in texts]
            made.publish_ports(name, ADDRESSES[name], texts)
        yield made
        made.cleanup()


@BOTH
@pytest.mark.parametrize("protocol", Protocol, ids=lambda protocol: protocol.value)
@pytest.mark.parametrize(
    ("who", "target", "port", "expected"),
    [
        # From outside: the client's own address.
        ("client", "host", 30001, "c1 client"),
        ("client", "host", 30002, "c2 client"),
        ("client", "host", 30003, "c3 client"),
        # From the host itself.
        ("host", "host", 30001, "c1 host"),
        # From another bridge: its own address.  From the same one, whose hosts reach each other
        # without this host, or from the container itself: the bridge's.
        ("c3", "host", 30001, "c1 c3"),
        ("c3", "docker0", 30001, "c1 c3"),
        ("c2", "host", 30001, "c1 docker0"),
        ("c2", "docker0", 30001, "c1 docker0"),
        ("c1", "host", 30001, "c1 docker0"),
        ("c3", "host", 30003, "c3 other0"),
        # Not published: only one address; what it was before.
        ("client", "docker0", 30002, REFUSED),
        ("client", "host", SERVER_PORT, REFUSED),
        ("c1", "c2", SERVER_PORT, "c2 c1"),
        ("c1", "c3", SERVER_PORT, "c3 c1"),
        ("client", "c1", SERVER_PORT, "c1 client"),
        ("client", "c3", SERVER_PORT, "c3 client"),
    ],
)
def test_a_container_answers_and_sees_the_right_client(
    published: HostPortPublisher,
    family: Family,
    protocol: Protocol,
    who: str,
    target: str,
    port: int,
    expected: str,
) -> None:
    del published
    answer = ask(who, protocol, at(target, family), port)

    server, _, seen = expected.partition(" ")
    assert answer == (f"{server} {at(seen, family)}" if seen else expected)


@BOTH
def test_other_ports_of_the_host_are_its_own(published: HostPortPublisher, family: Family) -> None:
    """Also those that a node of a cluster would keep for itself."""
    del published
    for port in (4790, 51820, 0x1E61):
        assert ask("client", Protocol.UDP, at("host", family), port) == REFUSED

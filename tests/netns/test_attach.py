"""A program that was loaded but not attached: no packet meets anything of it, until it is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from mesh.model.address import FAMILIES, Family
from mesh.model.publish import Protocol
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from tests.support import drivers
from tests.support.echo import REFUSED, SILENCE, ask
from tests.support.onenode import ADDRESSES, SERVER_PORT, OneNode, one_node

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.netns

PUBLISHED: Final = 30080
POOL: Final = tuple(Backend(address, SERVER_PORT) for address in ADDRESSES["c1"])


@pytest.fixture(params=drivers.KERNEL)
def world(request: pytest.FixtureRequest) -> Iterator[OneNode]:
    """A node whose program is loaded anew, with a service in it, and not attached."""
    with one_node(request.param) as made:
        made.node.run(made.driver.remove())
        made.node.run(made.driver.prepare())
        made.publish(
            Forwarding(f"web/{p}", (Frontend(Scope.INGRESS, None, p, PUBLISHED),), POOL)
            for p in Protocol
        )
        yield made


def answers(target: str, port: int) -> set[tuple[Family, str]]:
    """What the client hears from a target, over both protocols."""
    return {
        (family, ask("client", protocol, ADDRESSES[target][index], port, patience=1).split()[0])
        for index, family in enumerate(FAMILIES)
        for protocol in Protocol
    }


def everywhere(answer: str) -> set[tuple[Family, str]]:
    return {(family, answer) for family in FAMILIES}


def test_packets_meet_all_of_a_program_at_once_or_nothing(world: OneNode) -> None:
    untouched = answers("c2", SERVER_PORT), answers("node", PUBLISHED)
    world.node.run(world.driver.prepare())
    again = answers("c2", SERVER_PORT), answers("node", PUBLISHED)

    world.node.run(world.driver.attach())
    world.node.run(world.driver.attach())
    attached = answers("c2", SERVER_PORT), answers("node", PUBLISHED)

    assert untouched == again == (everywhere("c2"), everywhere(REFUSED))
    assert attached == (everywhere(SILENCE), everywhere("c1"))


def test_what_is_attached_stays_so(world: OneNode) -> None:
    world.node.run(world.driver.attach())

    world.node.run(world.driver.prepare())

    assert answers("node", PUBLISHED) == everywhere("c1")

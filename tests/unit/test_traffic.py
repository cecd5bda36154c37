"""Connections and bytes by port, from what the kernel tells of flows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from mesh.agent import ports
from mesh.model import address
from mesh.rules import marks
from mesh.rules.elements import mark_bytes, port_bytes, proto_bytes
from mesh.rules.traffic import Account, Counted, Elder, Entrance, Port, Volume

if TYPE_CHECKING:
    from mesh.rules.elements import ElementKey

LAYOUT: Final = marks.DEFAULT
VIPS: Final = ("10.1.0.0/16", "fd00:0:0:f000::/64")
WEB: Final = Port("web", "ingress", "tcp", 8080)


def entrance(port: int = 8080, number: int = 7, to: str = "192.0.2.1", slots: int = 1) -> Entrance:
    return Entrance(address.packed(to), 6, port, LAYOUT.frontend(number, slots))


class World:
    """An account of a node that has these pools."""

    def __init__(self, **pools: int) -> None:
        self.pools = {number: f"{service}/80/tcp" for service, number in pools.items()}
        self.account = Account(LAYOUT, self.pools.get, lambda *of: ports.named(VIPS, *of))

    def ended(self, *sums: tuple[Entrance, Volume], elders: tuple[Elder, ...] = ()) -> None:
        self.account.ended(Counted(list(sums), list(elders)))

    def look(
        self,
        *sums: tuple[Entrance, Volume],
        elders: tuple[Elder, ...] = (),
        some_lost: bool = False,
    ) -> dict[Port, Volume]:
        self.account.there(Counted(list(sums), list(elders)), some_lost=some_lost)
        return dict(self.account.totals)


def test_what_ended_and_what_is_there_is_what_went_through() -> None:
    world = World(web=7)

    assert world.look((entrance(), Volume(2, 20, 200))) == {WEB: Volume(2, 20, 200)}
    world.ended((entrance(), Volume(1, 15, 150)))
    found = world.look((entrance(), Volume(1, 9, 90)), (entrance(slots=2), Volume(1, 1, 1)))

    assert found == {WEB: Volume(3, 25, 241)}


def test_a_flow_that_ends_during_a_look_is_not_counted_backwards() -> None:
    world = World(web=7)
    world.look((entrance(), Volume(5, 50, 50)))

    assert world.look((entrance(), Volume(4, 40, 40))) == {WEB: Volume(5, 50, 50)}
    world.ended((entrance(), Volume(1, 10, 10)))
    assert world.look((entrance(), Volume(5, 50, 50))) == {WEB: Volume(6, 60, 60)}


def test_flows_of_which_nothing_was_told_do_not_hide_new_ones() -> None:
    world = World(web=7)
    world.look((entrance(), Volume(100, 1000, 1000)))

    assert world.look(some_lost=True) == {WEB: Volume(100, 1000, 1000)}
    assert world.look((entrance(), Volume(1, 10, 10))) == {WEB: Volume(101, 1010, 1010)}


def test_flows_from_before_count_by_what_they_gain() -> None:
    world = World(web=7)
    world.account.begin([(1, 100, 1000), (2, 50, 50)])

    two = (Elder(entrance(), 1, 110, 1000), Elder(entrance(), 2, 50, 50))
    assert world.look(elders=two) == {WEB: Volume(0, 10, 0)}
    world.ended(elders=(Elder(entrance(), 1, 115, 1001),))
    assert set(world.account.elders) == {2}
    assert world.look(elders=(Elder(entrance(), 2, 51, 50),)) == {WEB: Volume(0, 16, 1)}


def test_a_flow_from_before_that_vanishes_is_remembered_until_it_was_told_of() -> None:
    world = World(web=7)
    world.account.begin([(1, 100, 100)])

    world.look()
    assert 1 in world.account.elders
    world.look()
    assert 1 not in world.account.elders


def test_a_service_that_is_gone_is_known_while_it_has_flows() -> None:
    world = World(web=7)
    there = Counted([(entrance(), Volume(1, 1, 1))], [])
    world.account.there(there, some_lost=False)
    world.account.forget((), there)
    world.pools.clear()

    world.ended((entrance(), Volume(1, 2, 2)))
    assert world.look() == {WEB: Volume(1, 2, 2)}

    world.account.forget([WEB], Counted([], []))
    assert world.account.totals
    world.account.forget([], Counted([], []))
    assert world.account.totals == {}
    assert world.look() == {}


def test_a_flow_that_nobody_s_frontend_took_is_nobody_s() -> None:
    world = World(web=7)

    assert world.look((entrance(number=8), Volume(1, 1, 1))) == {}


@pytest.mark.parametrize(
    ("pool", "to", "mode"),
    [
        ("web/80/tcp", "192.0.2.1", "ingress"),
        ("web/80/tcp/local", "2001:db8::1", "ingress"),
        ("web/80/tcp/host/web-1", "192.0.2.1", "host"),
        ("web/80/tcp", "10.1.0.7", "vip"),
        ("web/80/tcp/local", "fd00:0:0:f000::7", "vip"),
    ],
)
def test_a_flow_is_named_by_where_it_came_in(pool: str, to: str, mode: str) -> None:
    assert ports.named(VIPS, pool, entrance(to=to)) == Port("web", mode, "tcp", 8080)


def test_published_ports_are_the_frontends_but_for_vips() -> None:
    def key(name: str, port: int, protocol: int = 6, to: bytes = b"") -> ElementKey:
        return name, to + proto_bytes(protocol) + port_bytes(port)

    frontends = [
        (key("vips4", 80, to=mark_bytes(1)), "web"),
        (key("meshports4", 8080), "web"),
        (key("meshports6", 8080), "web"),
        (key("ports4", 9000, 17), "dns"),
        (key("hostips4", 9001, to=mark_bytes(1)), "dns"),
        (key("ports6", 9002), "near"),
        (key("ports6", 9003), "near"),
    ]

    assert ports.published(lambda: frontends, {"near": {(6, 9002)}}) == {
        WEB,
        Port("dns", "host", "udp", 9000),
        Port("dns", "host", "tcp", 9001),
        Port("near", "ingress", "tcp", 9002),
        Port("near", "host", "tcp", 9003),
    }

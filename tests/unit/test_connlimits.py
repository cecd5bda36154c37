"""Limits of connections: who is one client, and what of the rules they come to is read back."""

from __future__ import annotations

import pytest

from mesh.delta import Delta
from mesh.errors import InvalidRecord
from mesh.model.address import FAMILIES, Family
from mesh.model.publish import Protocol
from mesh.rules import connlimits, elements, extras, marks, nft, program, xtables_limits
from mesh.rules.extras import Extras
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.ids import Ids
from mesh.rules.xtables_image import Image
from mesh.store import schema
from tests.support import rules

PREFIXES = rules.PARAMETERS.prefixes[1]
ON_VIP = (Frontend(Scope.VIP, "10.1.0.1", Protocol.TCP, 80),)


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("10.0.1.5", "10.0.1.5"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("fd11:2233:4455:1::5", "fd11:2233:4455:1::5"),
    ],
)
def test_a_client_is_an_address_or_a_network_outside(host: str, client: str) -> None:
    assert connlimits.client(host, PREFIXES) == client


def test_limits_are_one_element_however_many_ways_lead_there() -> None:
    pool = (Backend("10.0.1.5", 80), Backend("fd11:2233:4455:1::5", 80))
    ids = Ids(marks.DEFAULT)
    web = Forwarding("web/80/tcp", (*ON_VIP, Frontend(Scope.INGRESS, None, Protocol.TCP, 80)), pool)

    found = nft.lower(web._replace(limit=70_000), ids)

    assert elements.connlimits(found) == {70_000}
    assert found.keys() - nft.lower(web, ids).keys() == {
        elements.connlimit_key(marks.DEFAULT.id_bits(ids.of("web/80/tcp")), 70_000)
    }


def test_the_program_counts_only_what_is_limited() -> None:
    made = program.build(rules.PARAMETERS)

    text = extras.added(made, Extras(limits=frozenset((5, 9))), Extras(limits=frozenset((5,))))

    assert "ct count" not in made.inet
    assert "ct count over 9 }" in text
    assert "ct count over 5 }" not in text, "it is there, and its counts"
    assert text.count("@connlimits goto connlimit_") == 2
    assert str(Extras(frozenset((300,)), True, frozenset((9,)))) == (
        "pools of sizes [300], policies, limits of connections [9]"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_that_is_not_as_it_was_written_is_no_limit(family: Family) -> None:
    key = elements.connlimit_key(marks.DEFAULT.id_bits(7), 100)
    image = Image(marks.DEFAULT)
    image.update(Delta(add={key: b""}))
    chains = image.chains(family)["mangle"]
    first, *rest = chains["MESH-L-00007"]

    def read(found: dict[str, tuple[str, ...]]) -> list[object]:
        return list(xtables_limits.parse(family, found, marks.DEFAULT))

    assert read(chains) == [key]
    assert read({**chains, "MESH-L-00007": ()}) == []
    assert read({**chains, "MESH-L-00007": (first,)}) == []
    assert read({**chains, "MESH-L-00007": ("-j RETURN", *rest)}) == []
    image.update(Delta({key: b""}, {}))
    assert image.chains(family)["mangle"] == {"MESH-LIMITS": ()}
    assert not image.has_limits


def test_the_surplus_is_what_the_last_rule_of_a_chain_counted() -> None:
    saved = """
[9:540] -A MESH-LIMITS -m connmark --mark 0x400/0xfff0fc00 -g MESH-L-00001
[4:240] -A MESH-L-00001 -m connlimit --connlimit-above 2 --connlimit-mask 32 -j MESH-FULL
[3:180] -A MESH-L-00001 -m connmark --mark 0x40000/0x403ff -j RETURN
[0:0] -A MESH-L-000ff -m connmark --mark 0x40000/0x403ff -j RETURN
"""

    assert xtables_limits.surplus(saved) == {1: 3, 255: 0}


@pytest.mark.parametrize("limit", [-1, 65_536])
def test_a_record_with_an_impossible_limit_is_refused(limit: int) -> None:
    with pytest.raises(InvalidRecord, match="from 1 to 65535"):
        schema.parse_service("/mesh/services/web", b'{"name":"web","limitConnections":%d}' % limit)

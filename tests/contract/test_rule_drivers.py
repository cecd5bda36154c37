"""What every rule driver does alike: changes are whole, reads are true, damage is mended."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest

from mesh.dataplane import witness
from mesh.dataplane.memory import MemoryDriver
from mesh.delta import Delta
from mesh.errors import ApplyFailed, NotFound
from mesh.model.address import Family
from mesh.model.publish import Protocol
from mesh.model.service import Affinity
from mesh.rules import elements, marks, nft, xtables_pools
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.ids import Ids
from tests.support import drivers, rules

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from mesh.dataplane.protocol import Driver
    from mesh.rules.elements import ElementKey, Elements

pytestmark = pytest.mark.netns


@pytest.fixture
def namespace() -> Iterator[None]:
    with rules.namespace():
        yield


@pytest.fixture(params=["memory", *drivers.KERNEL])
async def driver(request: pytest.FixtureRequest, namespace: None) -> AsyncIterator[Driver]:
    memory = request.param == "memory"
    found = MemoryDriver() if memory else drivers.make(request.param, rules.PARAMETERS)
    await found.prepare()
    await found.attach()
    yield found
    found.close()


def adding(found: Elements) -> Delta[ElementKey, bytes]:
    return Delta(add=found)


async def check_witness(driver: Driver) -> None:
    """Let somebody else read what the driver wrote: he sees it as iptables-save does.

    python-iptables reads legacy tables alone, in a process of its own.
    """
    if driver.name == "iptables-legacy" and witness.is_installed():
        compared = await witness.compare(rules.PARAMETERS)
        assert compared.rules > 100
        assert compared.disagreements == ()


def service(replicas: int, *, number: int = 1) -> Forwarding:
    port = Frontend(Scope.INGRESS, None, Protocol.TCP, 30000 + number)
    pool = tuple(Backend(f"10.0.{i >> 8}.{i & 255}", 80) for i in range(replicas))
    return Forwarding(f"service{number}", (port,), pool)


@pytest.mark.parametrize("name", elements.SETS)
async def test_elements_of_every_set_read_back_as_written(driver: Driver, name: str) -> None:
    wanted = rules.samples(elements.SETS[name], 5)

    await driver.apply(adding(wanted))

    assert await driver.read() == wanted
    await check_witness(driver)


async def test_applying_what_is_there_changes_nothing(driver: Driver) -> None:
    wanted = {
        key: data for spec in elements.SETS.values() for key, data in rules.samples(spec, 3).items()
    }
    await driver.apply(adding(wanted))

    await driver.apply(adding(wanted))
    found = await driver.read()

    assert not Delta.between(found, wanted)


async def test_a_change_removes_adds_and_replaces_at_once(driver: Driver) -> None:
    before, after = (rules.samples(elements.SETS["vips4"], count) for count in (4, 6))
    changed = next(iter(before))
    after[changed] = elements.mark_bytes(0x77)
    gone = list(before)[2]
    del after[gone]
    await driver.apply(adding(before))

    await driver.apply(Delta.between(before, after))

    assert await driver.read() == after


async def test_an_empty_change_is_no_change(driver: Driver) -> None:
    await driver.apply(Delta())

    assert await driver.read() == {}


async def test_a_large_change_is_one_change(driver: Driver) -> None:
    wanted = rules.samples(elements.SETS["targets6"], 2000)

    await driver.apply(adding(wanted))
    found = await driver.read()
    await driver.apply(Delta(remove=wanted))

    assert found == wanted
    assert await driver.read() == {}


@pytest.mark.parametrize("name", ["vips6", "ports4", "zones"])
async def test_new_data_for_an_existing_key_is_refused_whole(driver: Driver, name: str) -> None:
    wanted = rules.samples(elements.SETS[name], 9)
    culprit = list(wanted)[6]
    existing = {culprit: rules.samples(elements.SETS[name], 1).popitem()[1]}
    await driver.apply(adding(existing))

    with pytest.raises(ApplyFailed) as failure:
        await driver.apply(adding(rules.samples(elements.SETS["nodes4"], 3) | wanted))

    assert elements.describe(culprit) in str(failure.value)
    assert await driver.read() == existing


async def test_removing_what_is_not_there_is_refused_whole(driver: Driver) -> None:
    there = rules.samples(elements.SETS["hairpin4"], 3)
    missing = list(rules.samples(elements.SETS["hairpin4"], 4).items())[3]
    await driver.apply(adding(there))

    with pytest.raises(ApplyFailed) as failure:
        await driver.apply(
            Delta({**there, missing[0]: b""}, rules.samples(elements.SETS["via"], 1))
        )

    assert elements.describe(missing[0]) in str(failure.value)
    assert await driver.read() == there


async def test_some_elements_are_read_for_themselves(driver: Driver) -> None:
    wanted = nft.lower(service(3), Ids())
    others = {("known4", bytes((10, 1, 0, 9))): b"", ("known6", bytes(16)): b""}
    await driver.apply(adding(wanted))

    assert await driver.read_some({**wanted, **others}) == wanted
    assert await driver.read_some(others) == {}


async def test_nested_ranges_are_fine(driver: Driver) -> None:
    ranges = ("10.0.0.0/8", "10.0.0.0/24", "0.0.0.0/0", "2001:db8::/32", "2001:db8::1/128")
    wanted = {elements.allow_key(0x400, prefix, marks.DEFAULT): b"" for prefix in ranges}
    wanted["limited", elements.mark_bytes(0x400)] = b""

    await driver.apply(adding(wanted))

    assert await driver.read() == wanted


@pytest.mark.parametrize("replicas", [0, 1, 32, 33, 300, 1023])
async def test_pools_of_every_size_are_accepted(driver: Driver, replicas: int) -> None:
    wanted = nft.lower(service(replicas), Ids())

    await driver.apply(adding(wanted))

    assert await driver.read() == wanted


def drawn(rules: list[dict[str, Any]]) -> dict[str, Fraction]:
    """The share of each backend in a chain as the witness tells it."""
    shares, left = dict[str, Fraction](), Fraction(1)
    for rule in rules:
        odds = Fraction(rule["statistic"]["probability"]) if "statistic" in rule else Fraction(1)
        part = left * odds.limit_denominator(1023)
        shares[rule["target"]["DNAT"]["to-destination"]] = part
        left -= part
    return shares


@pytest.mark.skipif(not witness.is_installed(), reason="python-iptables is not installed")
@pytest.mark.parametrize("driver", ["iptables-legacy"], indirect=True)
async def test_a_witness_sees_every_backend_with_its_share(driver: Driver) -> None:
    port = Frontend(Scope.INGRESS, None, Protocol.TCP, 30001)
    weights = {"10.0.1.2": 1, "10.0.1.3": 2, "fd11::2": 1, "fd11::3": 3}
    pool = tuple(Backend(address, 80, weight) for address, weight in weights.items())
    affine = Frontend(Scope.INGRESS, None, Protocol.TCP, 30002)
    ids = Ids()
    wanted = nft.lower(Forwarding("random", (port,), pool), ids)
    wanted |= nft.lower(
        Forwarding("affine", (affine,), pool, Affinity.CLIENT_IP, allow=("10.0.0.0/8",)), ids
    )
    await driver.apply(adding(wanted))

    await check_witness(driver)
    told = {family: (await witness.tell(family, ("nat",)))["nat"] for family in Family}

    chain = xtables_pools.chain(ids.layout.frontend(ids.of("random"), 3), ids.layout)
    assert drawn(told[Family.V4][chain]) == {
        "10.0.1.2:80": Fraction(1, 3),
        "10.0.1.3:80": Fraction(2, 3),
    }
    assert drawn(told[Family.V6][chain]) == {
        "[fd11::2]:80": Fraction(1, 4),
        "[fd11::3]:80": Fraction(3, 4),
    }


async def test_what_is_examined_is_what_is_read_until_somebody_changes_it(driver: Driver) -> None:
    wanted = nft.lower(service(300), Ids())
    await driver.apply(adding(wanted))

    examined = await driver.examine()

    assert examined.elements == await driver.read() == wanted
    assert (examined.loaded, examined.differences) == (examined.wanted, ())


async def test_preparing_again_keeps_all_elements(driver: Driver) -> None:
    wanted = nft.lower(service(300), Ids())
    await driver.apply(adding(wanted))

    await driver.prepare()

    assert await driver.read() == wanted


async def test_after_removal_there_is_nothing_to_read(driver: Driver) -> None:
    await driver.apply(adding(rules.samples(elements.SETS["via"], 3)))

    await driver.remove()

    for look in (driver.read, driver.examine):
        with pytest.raises(NotFound):
            await look()
    await driver.remove()
    await driver.prepare()
    assert await driver.read() == {}

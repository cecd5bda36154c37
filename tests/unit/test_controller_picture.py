"""The controller's picture: what it believes of its own writes and of the store's echoes."""

from __future__ import annotations

import pytest

from mesh.controller.picture import Held, Owner, Picture
from mesh.controller.places import Place, share
from mesh.model.allocation import PortAllocation, VipAllocation
from mesh.model.service import ServiceSpec
from mesh.store.protocol import Change, KeyValue
from mesh.store.schema import Keys, encode

KEYS = Keys()
KEY = KEYS.vip_allocation(1)
PLACE = Place("vips", 1)
WEB, API = Owner("services", "web"), Owner("services", "api")


def written(service: str, revision: int) -> Change:
    value = encode(VipAllocation(service=service, addresses=()))
    return Change(KEY, KeyValue(KEY, value, revision, revision, 1, 0), revision)


def deleted(revision: int) -> Change:
    return Change(KEY, None, revision)


def test_nothing_is_kept_of_a_share_that_was_freed() -> None:
    picture, key = Picture(KEYS, {}), KEYS.port_share("tcp", 8080, "web")
    place = Place(share("tcp", "web"), 8080)
    picture.hold(place, Held(WEB, PortAllocation(service="web", target=80), 5))
    picture.release(place)

    picture.observe([Change(key, None, 6)])  # what the watch says of it

    assert picture.taken == Picture(KEYS, {}).taken
    assert not picture.occupied


@pytest.fixture
def picture() -> Picture:
    """A picture in which `web` was given a VIP at revision 5, which the watch has yet to say."""
    picture = Picture(KEYS, {})
    record = VipAllocation(service="web", addresses=())
    picture.hold(PLACE, Held(WEB, record, 5))
    picture.wrote(KEY, 5)
    return picture


@pytest.mark.parametrize("stale", [written("api", 3), deleted(4), written("web", 5)])
def test_what_came_before_an_own_write_changes_nothing(picture: Picture, stale: Change) -> None:
    picture.observe([stale])

    assert picture.taken["vips"][1].owner == WEB


def test_what_comes_after_an_own_write_counts(picture: Picture) -> None:
    picture.observe([written("web", 5), deleted(6)])

    assert picture.taken["vips"] == {}
    assert picture.held == {}


def test_a_revision_that_was_skipped_is_not_waited_for(picture: Picture) -> None:
    picture.observe([written("api", 6), deleted(7)])

    assert picture.taken["vips"] == {}


def test_an_own_deletion_is_not_undone_by_the_echo_of_the_write(picture: Picture) -> None:
    picture.release(PLACE)
    picture.wrote(KEY, 6)

    picture.observe([written("web", 5)])

    assert picture.taken["vips"] == {}


@pytest.mark.parametrize("tail", ["07", "x", "", "1/2", "-1", "99999999999999999999"])
def test_keys_that_name_no_place_are_ignored(tail: str) -> None:
    picture = Picture(KEYS, {})
    key = KEYS.under("allocations/vips") + tail

    picture.load([KeyValue(key, b"{}", 1, 1, 1, 0)])
    picture.observe([Change(key, None, 2)])

    assert picture.taken["vips"] == {}


def test_a_record_that_the_process_holds_already_is_not_kept_twice() -> None:
    web = ServiceSpec(name="web")
    held = {KEYS.service("web"): web, KEYS.service("api"): web}
    picture = Picture(KEYS, {}, held.get)

    picture.load(
        KeyValue(KEYS.service(name), encode(ServiceSpec(name=name)), 1, 1, 1, 0)
        for name in ("web", "api")
    )

    assert picture.specs()[WEB] is web
    assert picture.specs()[API] == ServiceSpec(name="api")

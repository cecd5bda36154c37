"""Element messages: how many fit, whom an error means, and what a dump may look like."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from mesh.dataplane import nfmessages
from mesh.dataplane.nfnetlink import HEADER_SIZE, Message, Refused, Socket
from mesh.rules import elements
from tests.support import rules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.rules.elements import Elements


class Told(Socket):
    """A kernel that answers each dump with the next of `dumps`."""

    def __init__(self, *dumps: list[bytes]) -> None:
        self._dumps: Iterator[list[bytes]] = iter(dumps)

    def dump(self, message: Message) -> list[bytes]:
        return next(self._dumps)


def bodies(found: Elements) -> list[bytes]:
    """What the kernel says of elements: the same as it is told."""
    name = next(iter(found))[0]
    items = [(key, data) for (_, key), data in found.items()]
    return [chunk.message.body for chunk in nfmessages.additions(name, items)]


@pytest.mark.parametrize("name", elements.SETS)
def test_elements_of_every_set_parse_as_packed(name: str) -> None:
    wanted = rules.samples(elements.SETS[name], 7)

    assert nfmessages.read_elements(Told(bodies(wanted)), [name]) == wanted


def test_a_dump_that_tells_elements_twice_is_taken_again() -> None:
    whole = rules.samples(elements.SETS["vips4"], 6)
    part = dict(list(whole.items())[:3])

    found = nfmessages.read_elements(Told(bodies(part) + bodies(part), bodies(whole)), ["vips4"])

    assert found == whole


def test_a_single_address_that_somebody_added_reads_as_a_range_of_one() -> None:
    key = (0x400).to_bytes(4, "big") + bytes((10, 0, 0, 1))
    value = struct.pack("=HH", 12, 1) + key
    element = struct.pack("=HH", 20, 1) + struct.pack("=HH", 16, 1) + value
    body = bytes(4) + struct.pack("=HH", 24, 3) + element

    found = nfmessages.read_elements(Told([body]), ["allow4"])

    assert found == {("allow4", key + key): b""}


def test_a_long_list_is_cut_below_what_an_attribute_can_hold() -> None:
    wanted = rules.samples(elements.SETS["targets6"], 5000)

    chunks = list(
        nfmessages.additions("targets6", [(key, data) for (_, key), data in wanted.items()])
    )

    assert len(chunks) > 1
    assert all(len(chunk.message.body) < 1 << 16 for chunk in chunks)
    assert [key for chunk in chunks for key in chunk.keys] == [key for _, key in wanted]


def test_nothing_to_remove_is_no_message() -> None:
    # An empty list of keys would be read as: flush the set.
    assert list(nfmessages.removals("vips4", [])) == []


@pytest.mark.parametrize("name", ["vips6", "via", "zones", "allow4"])
def test_an_error_at_an_offset_means_the_element_there(name: str) -> None:
    wanted = rules.samples(elements.SETS[name], 4)
    (chunk,) = nfmessages.additions(name, [(key, data) for (_, key), data in wanted.items()])
    body = chunk.message.body
    start = body.index(next(iter(wanted))[1][: nfmessages.LAYOUTS[name].key]) - 12
    size = (len(body) - start) // 4

    found = [chunk.culprit(start + size * index + HEADER_SIZE) for index in range(4)]

    assert found == list(wanted)
    assert chunk.culprit(None) is None
    assert chunk.culprit(5) is None


def test_a_refusal_without_an_index_means_the_change_as_a_whole() -> None:
    refused = Refused(1, None, None)

    assert refused.errno == 1
    assert refused.strerror == "Operation not permitted"

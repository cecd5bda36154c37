"""Element messages: how many fit, whom an error means, and what a dump may look like."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from mesh.dataplane import nfmessages
from mesh.dataplane.nfnetlink import HEADER_SIZE, Message, Refused, Socket, nested
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


def test_an_element_that_somebody_annotated_is_read_too() -> None:
    wanted = rules.samples(elements.SETS["vips4"], 3)
    (body,) = bodies(wanted)
    start = body.index(next(iter(wanted))[1]) - 12
    listed = body[start:]
    first, rest = listed[: len(listed) // 3], listed[len(listed) // 3 :]
    comment = struct.pack("=HH", 8, 6) + b"mine"
    longer = struct.pack("=H", len(first) + 8) + first[2:] + comment

    dump = [body[: start - 4] + nested(3, longer + rest)]

    assert nfmessages.read_elements(Told(dump), ["vips4"]) == wanted


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

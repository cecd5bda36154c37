"""When the edition of the rules has to go up, and whose rules an agent takes over."""

from __future__ import annotations

import hashlib

import pytest

from mesh.rules import edition, elements, ipsets, program
from mesh.rules.edition import EDITION
from tests.support import rules

KNOWN = {
    1: (0x9F780BA6, "374cb96d"),
    2: (0x226C0A17, "374cb96d"),
    3: (0x70A69A08, "374cb96d"),
    4: (0x21F5D51E, "374cb96d"),
}
"""By edition: the schema of the nftables program, and a digest of the ipsets."""


def test_other_sets_are_another_edition() -> None:
    """Or an agent of the version before would delete what it cannot hold, and its connections.

    If this fails, add one to mesh.rules.edition.EDITION and a line to KNOWN, and keep the others.
    """
    sets = "\n".join(ipsets.program())
    now = (
        program.build(rules.PARAMETERS).schema,
        hashlib.sha256(sets.encode()).hexdigest()[:8],
    )

    assert (max(KNOWN), KNOWN[max(KNOWN)]) == (EDITION, now)


def test_the_program_tells_its_edition() -> None:
    text = program.build(rules.PARAMETERS).inet

    assert f", {edition.SLOT} : {EDITION:#x} }}" in text


@pytest.mark.parametrize(
    ("comment", "found"),
    [
        ("", 0),
        ("dd8e3da7.a2580751", 0),
        ("dd8e3da7.a2580751/1", 1),
        ("dd8e3da7.a2580751.ff0.fff0/12", 12),
    ],
)
def test_a_canary_tells_the_edition(comment: str, found: int) -> None:
    assert edition.of_canary(comment) == found


def test_a_fingerprint_tells_the_edition() -> None:
    slots = {0: 0x9F780BA6, 1: 0x096BDC27, 2: 0xF92791BA}
    before = {
        ("fingerprint", elements.mark_bytes(slot)): elements.mark_bytes(value)
        for slot, value in slots.items()
    }
    later = {("fingerprint", elements.mark_bytes(edition.SLOT)): elements.mark_bytes(7)}

    assert edition.of_fingerprint(before) == 0
    assert edition.of_fingerprint(before | later) == 7


def test_only_later_editions_are_refused() -> None:
    assert edition.refusal("table inet mesh", 0) is None
    assert edition.refusal("table inet mesh", EDITION) is None
    told = edition.refusal("table inet mesh", EDITION + 1)
    assert told is not None
    for word in ("table inet mesh", "upgrade", "--cleanup", "--downgrade"):
        assert word in told

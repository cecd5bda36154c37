"""Selectors of nodes: what matches, and what is said of those that make no sense."""

from __future__ import annotations

import pytest

from mesh.model import selector

LABELS = {"zone": "a", "role": "worker", "gpu": "2", "topology.kubernetes.io/zone": "eu-1"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("  ", True),
        ("zone=a", True),
        ("zone == a", True),
        ("zone=b", False),
        ("zone!=a", False),
        ("zone!=b", True),
        ("rack!=1", True),
        ("rack=1", False),
        ("gpu", True),
        ("!gpu", False),
        ("! rack", True),
        ("zone in (a, b)", True),
        ("zone in (b,c)", False),
        ("zone notin (b,c)", True),
        ("zone notin (a)", False),
        ("rack notin (a)", True),
        ("zone=a,role!=manager, gpu", True),
        ("zone=a,role=manager", False),
        ("zone in (a,b),gpu=2,", True),
        ("topology.kubernetes.io/zone=eu-1", True),
        ("in=a", False),
    ],
)
def test_all_requirements_must_hold(text: str, expected: bool) -> None:
    assert selector.matches(selector.parse(text), LABELS) is expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("zone=", "'zone=' is not understood"),
        ("=a", "'=a' is not understood"),
        ("zone=a role=b", "'zone=a role=b' is not understood"),
        ("zone=a,,gpu", "',gpu' is not understood"),
        ("zone in a", "'zone in a' is not understood"),
        ("zone in (a", "'zone in (a' is not understood"),
        ("zone in ()", "in needs values"),
        ("zone notin (a,)", "notin needs values"),
        ("zone>1,", "label 'zone>1' is not a key"),
        ("-x", "label '-x' is not a key"),
        ("zone=a,!", "'!' is not understood"),
    ],
)
def test_what_makes_no_sense_is_named(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=r"selector|label") as caught:
        selector.parse(text)

    assert told in str(caught.value)

"""Layouts of marks that differ from the default, and all there may be."""

from __future__ import annotations

from typing import Final

from hypothesis import strategies as st

from mesh.agent.config import MarksConfig
from mesh.rules import marks
from mesh.rules.marks import Layout

HIGH: Final = Layout.of(0x000FFF00, 0x0FFFFFFF)
"""The host keeps the four highest bits of the ct mark."""

LOW: Final = Layout.of(0x000FFF00, 0xFFFFFFF0)
"""The host keeps the four lowest, so the slot count is shifted."""

RAGGED: Final = Layout.of(0xFFF00000, 0xFFFB7DDF)
"""The host's bits lie scattered among ours, and n among the bits of the field."""

ALL: Final = {"default": marks.DEFAULT, "high": HIGH, "low": LOW, "ragged": RAGGED}


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout."""
    field = 0xFFF << draw(st.integers(0, 20))
    outside = [1 << at for at in range(32) if not field >> at & 1]
    hosts = draw(st.sets(st.sampled_from(outside), max_size=32 - marks.LEAST_BITS))
    return Layout.of(field, 0xFFFFFFFF & ~sum(hosts))


def marks_of(layout: Layout) -> MarksConfig:
    """How a node is told of a layout."""
    return MarksConfig(packet_mark=layout.packet_mark, ct_mark=layout.ct_mark)

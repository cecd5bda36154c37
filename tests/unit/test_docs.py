"""What docs/dataplane.md tells authors of other tools, where it is a table of facts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from mesh.agent import config
from mesh.model.address import FAMILIES
from mesh.model.health import HealthCheck
from mesh.rules import marks, program, xtables
from mesh.rules.marks import Layout
from tests.support import rules

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parents[2]
CHAPTER = (ROOT / "docs" / "dataplane.md").read_text().partition("\n## Next to other tools\n")[2]


def rows(heading: str, columns: int) -> set[tuple[str, ...]]:
    """The rows of the tables under a heading of the chapter that have so many columns."""
    part = re.split(r"^##+ ", CHAPTER.partition(f"\n### {heading}\n")[2], flags=re.MULTILINE)[0]
    split = (
        tuple(cell.strip().replace("`", "") for cell in line.strip("|").split("|"))
        for line in part.splitlines()
        if line.startswith("|")
    )
    return {row for row in split if len(row) == columns and row[0][:3] != "---"}


def test_every_hook_of_the_program_is_told() -> None:
    built = program.build(rules.PARAMETERS)
    base = r"^ chain (\w+) \{\n  type (\w+) hook (\w+) priority (-?\d+);"

    hooks = set(re.findall(base, built.inet + built.guard, re.MULTILINE))
    hooks |= {
        (f"{name} of bridge mesh", *rest)
        for name, *rest in re.findall(base, built.bridge, re.MULTILINE)
    }

    told = {(*row[:3], row[3].replace("\N{MINUS SIGN}", "-")) for row in rows("Hooks", 4)}
    assert told - {("chain", "type", "hook", "priority")} == hooks


def test_every_jump_of_iptables_is_told() -> None:
    hooks = {
        (table, hook, chain)
        for family in FAMILIES
        for table, each in xtables.program(rules.PARAMETERS, family).items()
        for hook, chain in each.hooks.items()
    }

    assert rows("Hooks", 3) - {("table", "chain", "jumps to")} == hooks


def test_the_examples_of_layouts_are_right() -> None:
    told = {row[0]: row[1:] for row in rows("Bits", 4)}
    headings = told.pop("")
    layouts = [marks.DEFAULT, *(Layout.of(*_masks(text)) for text in headings[1:])]

    assert told == {
        "OURS": _hex(layout.ours for layout in layouts),
        "VIA": _hex(layout.via for layout in layouts),
        "HASH": _hex(layout.hash for layout in layouts),
        "STAY": _hex(layout.stay for layout in layouts),
        "n": _hex(layout.slots for layout in layouts),
        "frontend id": _hex(layout.id for layout in layouts),
        "pools, at most": tuple(f"{len(layout.ids):,}".replace(",", " ") for layout in layouts),
        "the host's": ("none", *_hex(layout.foreign for layout in layouts[1:])),
    }


def _masks(text: str) -> tuple[int, int]:
    packet_mark, _, ct_mark = text.partition(",")
    return int(packet_mark, 16), int(ct_mark, 16)


def _hex(masks: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"0x{mask:x}" for mask in masks)


@pytest.mark.parametrize("name", ["packet_mark", "ct_mark"])
@pytest.mark.parametrize("path", ["README.md", "docs/dataplane.md"])
def test_the_masks_that_are_told_are_the_defaults(path: str, name: str) -> None:
    (told,) = re.findall(rf"^    {name} = (0x[0-9a-f]+)", (ROOT / path).read_text(), re.MULTILINE)

    assert int(told, 16) == getattr(config.MarksConfig(), name)


def test_the_configuration_in_the_readme_is_one(tmp_path: Path) -> None:
    """With the defaults that it names."""
    text = (ROOT / "README.md").read_text().partition("## Configuration of a node\n")[2]
    block = re.split(r"^\S", text.partition('    node = "n1"')[2], maxsplit=1, flags=re.MULTILINE)
    path = tmp_path / "agent.toml"
    path.write_text(f'node = "n1"{block[0]}')

    assert config.load(path) == config.AgentConfig(node="n1")


def test_the_fields_of_a_health_check_are_told_with_their_defaults() -> None:
    page = (ROOT / "docs" / "health.md").read_text()
    rows = (line.strip("|").split("|") for line in page.splitlines() if line.startswith("| `"))
    told = {name.strip(" `"): default.strip(" `") for name, _, default, _ in rows}

    given = msgspec.json.decode(msgspec.json.encode(HealthCheck()))

    assert told.keys() == given.keys()
    for name, value in given.items():
        if value not in (None, []):
            assert told[name] == (value if isinstance(value, str) else json.dumps(value))

"""What a node's kernel holds, read by the driver of the backend that the node reports."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

from mesh.dataplane import netns
from mesh.errors import NotFound
from mesh.rules import elements
from tests.support import drivers

if TYPE_CHECKING:
    from mesh.rules.elements import Elements
    from mesh.rules.program import Parameters


def read(path: str, backend: str, parameters: Parameters) -> Elements:
    """The elements in a network namespace; none where they are gone or damaged."""
    with ThreadPoolExecutor(1) as there:
        return there.submit(_read, path, backend, parameters).result()


def _read(path: str, backend: str, parameters: Parameters) -> Elements:
    with netns.entered(path), closing(drivers.make(backend, parameters)) as driver:
        try:
            return asyncio.run(driver.read())
        except NotFound:
            return {}


def told(found: Elements, *kinds: str) -> dict[str, str]:
    """Elements as people read them, by the name of their set: those of some kinds of sets."""
    lines: dict[str, list[str]] = {name: [] for name in elements.SETS if name.rstrip("46") in kinds}
    for key, data in found.items():
        if key[0] in lines:
            lines[key[0]].append(elements.describe(key, data))
    return {name: "\n".join(sorted(each)) for name, each in lines.items()}

"""Asks an agent for its metrics as Prometheus does, from the node's own namespace."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from mesh.model.publish import Protocol
from tests.support.requests import PATIENCE, born

if TYPE_CHECKING:
    from tests.support.cluster import Cluster

ADMIN: Final = 9477


class Page(NamedTuple):
    """What the admin end point said."""

    status: int
    head: str
    body: str


class Scraped:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, labels, value = _sample(line)
                self._samples.setdefault(name, []).append((labels, value))
        assert list(text_string_to_metric_families(text)), "Prometheus can read it"

    def sum(self, name: str, **labels: object) -> int:
        """The sum of all samples that have these labels; 0 if there are none."""
        return int(self.value(name, **labels))

    def value(self, name: str, **labels: object) -> float:
        """The same, with fractions."""
        wanted = {key: str(value) for key, value in labels.items()}.items()
        return sum(value for has, value in self._samples.get(name, ()) if wanted <= has.items())

    def has(self, name: str, **labels: object) -> bool:
        """Whether there is any such sample."""
        wanted = {key: str(value) for key, value in labels.items()}.items()
        return any(wanted <= has.items() for has, _ in self._samples.get(name, ()))


def _sample(line: str) -> tuple[str, dict[str, str], float]:
    found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
    assert found is not None, line
    return found[1], dict(re.findall(r'(\w+)="([^"]*)"', found[2] or "")), float(found[3])


async def page(mesh: Cluster, node: str, path: str, accept: str = "*/*") -> Page:
    """One page of a node's agent."""
    loop = asyncio.get_running_loop()
    request = f"GET {path} HTTP/1.1\r\nHost: here\r\nAccept: {accept}\r\n\r\n"
    with born(mesh.netns(node), "127.0.0.1", Protocol.TCP) as own:
        async with asyncio.timeout(PATIENCE):
            await loop.sock_connect(own, ("127.0.0.1", ADMIN))
            await loop.sock_sendall(own, request.encode())
            said = b""
            while more := await loop.sock_recv(own, 1 << 16):
                said += more
    head, _, body = said.decode().partition("\r\n\r\n")
    return Page(int(head.split()[1]), head, body)


async def scrape(mesh: Cluster, node: str) -> Scraped:
    """The metrics of a node's agent."""
    found = await page(mesh, node, "/metrics")
    assert found.status == 200, found
    return Scraped(found.body)

"""Tables of iptables-nft without a rule go; what anybody uses stays."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from mesh.dataplane import xttidy
from tests.support import rules

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.netns


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with rules.namespace():
        yield


def sh(line: str) -> None:
    subprocess.run(line.split(), check=True)


def test_empty_tables_go() -> None:
    for table in ("raw", "nat", "mangle", "filter"):
        sh(f"iptables-nft -t {table} -A OUTPUT -j ACCEPT")
        sh(f"ip6tables-nft -t {table} -A OUTPUT -j ACCEPT")
        sh(f"iptables-nft -t {table} -F")
        sh(f"ip6tables-nft -t {table} -F")

    xttidy.remove_empty()

    assert rules.nft("list", "ruleset") == ""


@pytest.mark.parametrize(
    "use",
    [
        "iptables-nft -t nat -A OUTPUT -j ACCEPT",
        "iptables-nft -P FORWARD DROP",
        "ip6tables-nft -t mangle -N THEIRS",
        "nft add table ip filter",
        "nft add table inet raw",
    ],
)
def test_what_somebody_uses_stays(use: str) -> None:
    sh(use)
    if use.startswith("nft add table ip "):
        sh("nft add set ip filter theirs { type ipv4_addr; }")
    before = rules.nft("list", "ruleset")

    xttidy.remove_empty()

    assert rules.nft("list", "ruleset") == before


def test_a_host_without_tables_is_left_without() -> None:
    xttidy.remove_empty()

    assert rules.nft("list", "ruleset") == ""

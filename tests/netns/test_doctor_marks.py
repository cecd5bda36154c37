"""Whose bits of the marks `mesh doctor` takes for ours: those that are configured."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from mesh.dataplane import foreign as others
from mesh.doctor import foreign
from tests.support import drivers, rules
from tests.support.layouts import HIGH
from tests.support.namespaces import run

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.netns

MANGLE = ("iptables-nft", "-t", "mangle", "-A", "INPUT", "-j")


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with rules.namespace():
        yield


async def found() -> tuple[str, str]:
    """What is said of marks, and of routing rules."""
    (marks,) = await foreign.of_marks(HIGH)
    (routing,) = foreign.of_routing(HIGH, await others.routing_rules(), {})
    return marks.status.value, routing.status.value


@pytest.mark.parametrize("backend", drivers.KERNEL)
async def test_a_host_may_use_the_bits_that_are_left_to_it(backend: str) -> None:
    with closing(drivers.make(backend, replace(rules.PARAMETERS, layout=HIGH))) as driver:
        await driver.prepare()
    run(*MANGLE, "CONNMARK", "--set-xmark", "0x10000000/0xf0000000")
    run(*MANGLE, "MARK", "--set-xmark", "0x100000/0xfff00000")
    run("ip", "rule", "add", "fwmark", "0x100000/0xfff00000", "lookup", "9")

    before = await found()
    run("ip", "rule", "add", "fwmark", "0x100/0x100", "lookup", "9")
    routed = await found()
    run(*MANGLE, "CONNMARK", "--set-xmark", "0x8000000/0x8000000")
    marked = await found()

    assert (before, routed, marked) == (("ok", "ok"), ("ok", "fail"), ("warn", "fail"))

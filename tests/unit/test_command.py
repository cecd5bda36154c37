"""Running programs: what is handed in, what comes back, and what an error says."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING

import pytest
import uvloop

from mesh.dataplane import command
from mesh.errors import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_output_comes_back_and_input_goes_in() -> None:
    assert asyncio.run(command.run("cat", input="grüezi\n")) == "grüezi\n"
    assert asyncio.run(command.run("cat")) == ""


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_input_can_be_opened_by_name_on_either_loop(run: Callable[..., str]) -> None:
    assert run(command.run("cat", "/dev/stdin", input="secret")) == "secret"


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_lot_of_text_fits_both_ways(run: Callable[..., str]) -> None:
    text = "x" * (1 << 20)

    assert run(command.run("cat", input=text)) == text


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")

    for program, package in (
        ("wg", "wireguard-tools"),
        ("wireguard-go", "wireguard-go"),
        ("iptables-legacy-restore", "iptables"),
        ("ip6tables-nft-save", "iptables"),
        ("nft", "nftables"),
        ("ip", "iproute2"),
        ("etcd", "etcd"),
    ):
        with pytest.raises(CommandFailed, match=f"^{program} is not installed.*install {package}$"):
            asyncio.run(command.run(program))


def test_a_program_that_may_not_be_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="cannot be started: Permission denied"):
        asyncio.run(command.run(str(tmp_path)))


def test_a_failure_is_one_line_of_what_the_program_said() -> None:
    with pytest.raises(CommandFailed, match=r"one; two$") as failure:
        asyncio.run(command.run("sh", "-c", "printf 'one\\n\\n two\\nthree\\n' >&2; exit 3"))

    assert "\n" not in str(failure.value)


def test_a_silent_failure_tells_the_status() -> None:
    with pytest.raises(CommandFailed, match="exit status 7"):
        asyncio.run(command.run("sh", "-c", "exit 7"))


def test_a_refused_ruleset_shows_the_line_that_was_refused() -> None:
    text = "table inet a {\n chain b {\n }\n}\nadd rule inet a b nonsense\nadd table inet c\n"

    with pytest.raises(CommandFailed) as failure:
        asyncio.run(command.run("nft", "-c", "-f", "-", input=text))

    notes = "\n".join(failure.value.__notes__)
    assert ">    5 add rule inet a b nonsense" in notes
    assert "     4 }" in notes


def test_a_program_that_does_not_end_is_stopped() -> None:
    code = "import time, sys; print('up', flush=True); time.sleep(600)"
    started = time.monotonic()

    with pytest.raises(CommandFailed, match=r"no end after 0\.2 s"):
        asyncio.run(command.run(sys.executable, "-c", code, timeout=0.2))

    assert time.monotonic() - started < 60

"""All tests run in namespaces of their own: nothing they do can reach this machine's network.

Without root the same is done inside a user namespace.  The process tree lives in its own PID
namespace, so nothing survives the run, even when it is killed.  With `-n` every worker has such
namespaces to itself, so tests that run at the same time are as far apart as on two machines.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Final

import pytest
from hypothesis import settings

settings.register_profile("mesh", deadline=None)  # this machine may be busy with others
settings.load_profile("mesh")

_MARK: Final = "MESH_TEST_NAMESPACES"
_APART: Final = Path(__file__).with_name("support") / "apart"

_LONGEST_FIRST: Final = ("cluster", "netns", "contract", "scenarios", "unit")
"""Directories in this order end all workers together; in any other they only end later."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.collectonly:
        return
    if os.environ.get(_MARK) != "1":
        _start_apart(config)
    # What nohup, or a shell in the background, ignores is inherited by all that tests start.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # The first process of a PID namespace ignores what it has no handler for.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if config.getoption("numprocesses", None):
        worker = shlex.join((str(_APART), sys.executable))
        config.option.tx = [f"popen//python={worker}"] * len(config.option.tx)
        config.option.dist = "loadfile"  # a module's fixtures are made once
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort what workers share out by length; the order within a directory remains random."""
    if hasattr(config, "workerinput"):
        items.sort(key=_rank)


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(
    report: pytest.CollectReport | pytest.TestReport, config: pytest.Config
) -> tuple[str, str, str] | None:
    """Name what failed at once: between the dots of several workers nobody could tell."""
    if not report.failed or not config.getoption("numprocesses", None):
        return None
    category = "failed" if report.when == "call" else "error"
    return category, f"\n{report.nodeid} {category}\n", category.upper()


def _rank(item: pytest.Item) -> int:
    (room, *_) = item.path.relative_to(Path(__file__).parent).parts
    return _LONGEST_FIRST.index(room)


def _start_apart(config: pytest.Config) -> None:
    """Become the same program in namespaces of its own."""
    os.environ[_MARK] = "1"
    capture = config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    capture.stop_global_capturing()  # else what runs next would print into the capture file
    os.execv(_APART, (str(_APART), *sys.orig_argv))

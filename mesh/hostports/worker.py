"""One thread that does a publisher's calls one after the other, and tidies up when it has none.

Knows nothing of ports: of whoever it works for only `Tidy`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from mesh.errors import HostNotReady, MeshError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

_IDLE_SECONDS: Final = 0.1
"""After so long without a call it tidies up: nobody waits for it then."""

_BUSY_SECONDS: Final = 1.0
"""Where calls never pause, it does so this often all the same."""

log = logging.getLogger(__name__)

_Job = tuple["Callable[[], Coroutine[Any, Any, Any]]", "Future[Any]"]


class Tidy(Protocol):
    """Who leaves something to be done after the answer."""

    @property
    def is_tidy(self) -> bool:
        """Whether nothing was left."""
        ...

    async def tidy(self) -> None:
        """Do what was left.  Raises MeshError."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class Worker:
    """The thread, in the network namespace of the one that makes it, and its event loop."""

    def __init__(self, whose: Tidy) -> None:
        self._whose = whose
        self._process = os.getpid()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._ended = False
        self._thread = threading.Thread(target=self._live, name="mesh-hostports", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Have a call done.  Raises HostNotReady where there is no thread any more."""
        if os.getpid() != self._process:
            raise HostNotReady("a publisher does not outlive fork(2): make one in each process")
        if self._ended:
            raise HostNotReady("this publisher is closed: make another one")
        done: Future[T] = Future()
        self._jobs.put((call, done))
        return done

    def close(self) -> None:
        """End, once all is done and tidy."""
        if os.getpid() == self._process and not self._ended:
            self._ended = True
            self._jobs.put(None)
            if threading.current_thread() is not self._thread:  # as in a garbage collection
                self._thread.join()

    def _live(self) -> None:
        untidy_since: float | None = None
        with asyncio.Runner() as runner:
            while True:
                if self._whose.is_tidy:
                    untidy_since = None
                elif untidy_since is None:
                    untidy_since = time.monotonic()
                elif time.monotonic() > untidy_since + _BUSY_SECONDS:
                    self._tidy(runner)
                    continue
                try:
                    job = self._jobs.get(timeout=None if untidy_since is None else _IDLE_SECONDS)
                except queue.Empty:
                    self._tidy(runner)
                    continue
                if job is None:
                    break
                _do(runner, *job)
            self._tidy(runner)
            self._whose.close()

    def _tidy(self, runner: asyncio.Runner) -> None:
        if not self._whose.is_tidy:
            try:
                runner.run(self._whose.tidy())
            except MeshError as error:
                log.warning("not tidied up: %s", error)


def _do(
    runner: asyncio.Runner, call: Callable[[], Coroutine[Any, Any, T]], done: Future[T]
) -> None:
    if not done.set_running_or_notify_cancel():
        return  # nobody waits for it any more, and nothing of it was begun
    try:
        done.set_result(runner.run(call()))
    except BaseException as error:  # noqa: BLE001 - it is the caller's
        done.set_exception(error)

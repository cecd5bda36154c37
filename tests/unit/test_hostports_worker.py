"""The thread of a publisher: one call after the other, and tidy in the end."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mesh.errors import ApplyFailed, HostNotReady
from mesh.hostports.worker import Worker


class House:
    """Is untidy after each call."""

    def __init__(self) -> None:
        self.is_tidy = True
        self.log: list[str] = []
        self.tidied = threading.Event()
        self.refuses = False

    async def tidy(self) -> None:
        self.is_tidy = True
        self.log.append("tidy")
        self.tidied.set()
        if self.refuses:
            raise ApplyFailed("conntrack: no")

    async def call(self, what: str) -> str:
        self.log.append(what)
        self.is_tidy = False
        if what == "bad":
            raise ValueError(what)
        return what

    def close(self) -> None:
        self.log.append("close")


def test_calls_are_answered_in_order_and_tidied_up_after() -> None:
    house = House()
    worker = Worker(house)
    try:
        with ThreadPoolExecutor(4) as pool:
            names = [str(n) for n in range(40)]
            answers = pool.map(lambda n: worker.submit(lambda: house.call(n)).result(), names)
            assert list(answers) == names
        assert house.tidied.wait(10)
        with pytest.raises(ValueError, match="bad"):
            worker.submit(lambda: house.call("bad")).result()
    finally:
        worker.close()

    assert house.log[-2:] == ["tidy", "close"]
    assert house.log[-3] == "bad"


def test_what_could_not_be_tidied_ends_nothing() -> None:
    house = House()
    house.refuses = True
    worker = Worker(house)
    worker.submit(lambda: house.call("one")).result()
    assert house.tidied.wait(10)

    assert worker.submit(lambda: house.call("two")).result() == "two"
    worker.close()
    worker.close()


def test_a_closed_one_and_a_forked_one_say_so() -> None:
    house = House()
    worker = Worker(house)
    child = os.fork()
    if child == 0:
        try:
            worker.submit(lambda: house.call("never"))
        except HostNotReady:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    worker.close()

    with pytest.raises(HostNotReady, match="closed"):
        worker.submit(lambda: house.call("never"))

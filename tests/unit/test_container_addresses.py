"""Container addresses: never two owners, none lost for good, a freed one rests."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mesh.containers import addresses
from mesh.errors import Conflict, MeshError
from mesh.model.cluster import Cluster

if TYPE_CHECKING:
    from pathlib import Path

SMALL = Cluster(id="test", prefix6="fd11:2233:4455::/48", node_bits4=29, containers4="10.9.0.0/16",
                overlay4="10.8.0.0/24").network(3)  # fmt: skip
"""10.9.0.24/29: numbers 2 to 6 are the containers'."""


def living(task: str) -> addresses.Owner:
    return addresses.this_process(task)


def dead(task: str) -> addresses.Owner:
    """A process that had this process's number before it."""
    return addresses.Owner(task=task, pid=os.getpid(), started="an earlier boot/1")


def test_a_claim_gives_one_address_per_family_with_the_same_number(tmp_path: Path) -> None:
    assert addresses.claim(tmp_path, SMALL, living("a")) == ("10.9.0.26", "fd11:2233:4455:3::2")


def test_the_subnet_its_gateway_and_its_broadcast_address_are_never_given() -> None:
    assert list(addresses.hosts("10.9.0.24/29")) == [2, 3, 4, 5, 6]


def test_a_freed_address_rests_until_the_others_were_given(tmp_path: Path) -> None:
    first = addresses.claim(tmp_path, SMALL, living("a"))
    addresses.release(tmp_path, first, living("a"))

    given_next = [addresses.claim(tmp_path, SMALL, living(f"b{n}"))[0] for n in range(5)]

    assert given_next == ["10.9.0.27", "10.9.0.28", "10.9.0.29", "10.9.0.30", first[0]]


def test_the_address_of_a_dead_owner_is_given_again(tmp_path: Path) -> None:
    for number in range(5):
        addresses.claim(tmp_path, SMALL, dead(f"t{number}"))

    again = {addresses.claim(tmp_path, SMALL, living(f"u{number}"))[0] for number in range(5)}

    assert again == {f"10.9.0.{24 + number}" for number in range(2, 7)}


def test_a_claim_half_written_by_a_crash_is_free(tmp_path: Path) -> None:
    (tmp_path / "10.9.0.26").write_bytes(b'{"task": "a", "pi')

    assert addresses.claim(tmp_path, SMALL, living("b"))[0] == "10.9.0.26"


def test_a_damaged_cursor_starts_the_circle_anew(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(b"\xff\x00")

    assert addresses.claim(tmp_path, SMALL, living("a"))[0] == "10.9.0.26"


def test_a_full_subnet_is_named_with_its_size(tmp_path: Path) -> None:
    for number in range(5):
        addresses.claim(tmp_path, SMALL, living(f"t{number}"))

    with pytest.raises(MeshError, match=r"10\.9\.0\.24/29 .* 5 "):
        addresses.claim(tmp_path, SMALL, living("one-more"))


def test_a_task_cannot_run_twice_on_a_node(tmp_path: Path) -> None:
    addresses.claim(tmp_path, SMALL, living("a"))

    with pytest.raises(Conflict, match="a already runs"):
        addresses.claim(tmp_path, SMALL, living("a"))


def test_a_late_release_leaves_the_next_owner_alone(tmp_path: Path) -> None:
    old = addresses.claim(tmp_path, SMALL, dead("a"))
    for number in range(5):
        addresses.claim(tmp_path, SMALL, living(f"t{number}"))

    addresses.release(tmp_path, old, dead("a"))

    assert len(addresses.claims(tmp_path)) == 5


def _claim_in_child(directory: Path, task: str) -> str:
    addresses.claim(directory, SMALL, living(task))
    return task


def test_processes_that_claim_at_once_never_share_an_address(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_claim_in_child, [(tmp_path, f"t{number}") for number in range(5)])

        assert {owner.task for owner in addresses.claims(tmp_path).values()} == {
            f"t{number}" for number in range(5)
        }


def test_a_claim_waits_for_another_that_is_being_made(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        claiming = threading.Thread(target=_claim_in_child, args=(tmp_path, "a"))
        claiming.start()
        claiming.join(0.2)
        assert claiming.is_alive()
    claiming.join()

    assert list(addresses.claims(tmp_path)) == ["10.9.0.26"]


@given(
    taken=st.sets(st.integers(min_value=2, max_value=20)),
    last=st.integers(min_value=0, max_value=400),
    size=st.integers(min_value=0, max_value=18),
)
def test_the_choice_is_the_nearest_free_number_in_the_circle(
    taken: set[int], last: int, size: int
) -> None:
    numbers = range(2, 2 + size)

    chosen = addresses.choose(numbers, taken, last)

    free = [number for number in numbers if number not in taken]
    if chosen is None:
        assert free == []
    else:
        after = [number for number in free if number > last] if last in numbers else free
        assert chosen in free
        assert last not in numbers or chosen == min(after or free)


class Claims(RuleBasedStateMachine):
    """Tasks start, stop and crash in any order on a node with five addresses."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile
        from pathlib import Path

        self.home = tempfile.TemporaryDirectory()
        self.directory = Path(self.home.name) / "addresses"
        self.held: dict[str, tuple[str, ...]] = {}
        self.started = 0

    def teardown(self) -> None:
        self.home.cleanup()

    @rule(crashes=st.booleans())
    def start(self, crashes: bool) -> None:
        self.started += 1
        task = f"t{self.started}"
        owner = dead(task) if crashes else living(task)
        if len(self.held) == 5:
            with pytest.raises(MeshError):
                addresses.claim(self.directory, SMALL, owner)
            return
        got = addresses.claim(self.directory, SMALL, owner)
        assert got not in self.held.values()
        if not crashes:
            self.held[task] = got

    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        if self.held:
            task = data.draw(st.sampled_from(sorted(self.held)))
            addresses.release(self.directory, self.held.pop(task), living(task))

    @invariant()
    def every_living_task_holds_exactly_its_own(self) -> None:
        found = {owner.task: one for one, owner in addresses.claims(self.directory).items()}
        assert found == {task: got[0] for task, got in self.held.items()}


Claims.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestClaims = Claims.TestCase

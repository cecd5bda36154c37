"""What an agent makes of the probes of its peers: configuration, who is watched, who is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import pytest

from mesh.agent import config
from mesh.agent.config import AgentConfig, ReachConfig
from mesh.agent.reach import Reachability
from mesh.agent.state import State
from mesh.agent.tally import Tally
from mesh.errors import BadUsage
from mesh.model.address import FAMILIES
from mesh.reach import memory
from mesh.reach.judge import Pace, Reach
from mesh.reach.sockets import Answer
from mesh.wg.conf import Interface
from mesh.wg.plan import Session
from tests.support import records

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mesh.engine.desired import Touched
    from mesh.model.address import Family

PACE: Final = Pace(interval=0.25, fall=4, rise=3)


class Wire:
    """Echoes to peers whose kernels answer, but for the `cut` ones."""

    families = FAMILIES

    def __init__(self) -> None:
        self.cut: set[int] = set()
        self.sent: list[tuple[Family, str, int]] = []
        self._back: list[Answer] = []

    def send(self, family: Family, address: str, number: int) -> bool:
        self.sent.append((family, address, number))
        if number not in self.cut:
            self._back.append(Answer(number, family, 0.002))
        return True

    def receive(self) -> Iterator[Answer]:
        back, self._back = self._back, []
        yield from back


class Node:
    """The node n1 of a cluster of three, with a replica on each of the others."""

    def __init__(self, directory: Path) -> None:
        self.state = State(records.KEYS, "n1")
        web = records.service("web", {"target": 80})
        tasks = records.task("web", "b", 2, 2) | records.task("web", "c", 3, 2)
        self.state.apply(records.snapshot(records.cluster() | web | tasks))
        self.network = SimpleNamespace(nodes=self.state.peers(), overlay=SimpleNamespace(seen=None))
        self.touched: list[Touched] = []
        self.tally = Tally()
        settings = AgentConfig(node="n1", state_dir=str(directory))
        network: Any = self.network
        self.reach = Reachability(settings, self.state, network, self.touched.append, self.tally)
        self.reach.adopt()
        self.wire = Wire()

    def look(self, times: int, elapsed: float = PACE.interval) -> None:
        for _ in range(times):
            wire: Any = self.wire
            self.reach.look(wire, PACE, elapsed)

    @property
    def held(self) -> dict[str, str]:
        return {name: standing.reach.value for name, standing in self.reach.standings()}

    @property
    def unreachable(self) -> frozenset[str]:
        view = self.state.node_view()
        assert view is not None
        return view.unreachable


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_every_other_node_is_probed_once_a_look_in_both_families(node: Node) -> None:
    node.look(8)

    per_look = [{number for _, _, number in node.wire.sent[i : i + 2]} for i in range(0, 16, 2)]
    assert per_look == [{2, 3}] * 8
    assert {(f, a) for f, a, n in node.wire.sent if n == 2} == set(
        zip(FAMILIES, ("10.0.0.2", "fd12:3456:789a::2"), strict=True)
    )
    assert node.held == {"n2": "reachable", "n3": "reachable"}
    assert node.touched == []


def test_a_lost_node_is_planned_without_until_it_is_back(node: Node) -> None:
    node.look(4)
    node.wire.cut = {3}

    node.look(6)
    lost, out = node.unreachable, node.reach.left_out
    node.wire.cut = set()
    node.look(6)

    assert lost == out == {"n3"}
    assert node.unreachable == frozenset()
    assert [touched.services for touched in node.touched] == [{"web"}, {"web"}]
    assert node.tally.peer_changes["n3", "unreachable"] == 1
    assert node.tally.peer_changes["n3", "reachable"] == 2


def test_a_node_that_is_cut_off_changes_nothing(node: Node) -> None:
    node.look(4)
    node.wire.cut = {2, 3}

    node.look(20)

    assert node.held == {"n2": "unreachable", "n3": "unreachable"}
    assert node.unreachable == frozenset()
    assert node.touched == []


def test_an_agent_that_slept_begins_to_count_anew(node: Node) -> None:
    node.look(4)
    node.wire.cut = {3}
    node.look(4)

    node.look(1, elapsed=30)
    node.look(3)
    spared = node.held["n3"]
    node.look(2)

    assert spared == "reachable"
    assert node.held["n3"] == "unreachable"


def test_the_next_agent_leaves_out_whom_the_last_one_did(tmp_path: Path) -> None:
    memory.save(tmp_path, {"n3"})
    node = Node(tmp_path)
    before = node.unreachable
    node.wire.cut = {3}

    node.look(10)
    still = node.unreachable
    node.wire.cut = set()
    node.look(6)

    assert before == still == {"n3"}
    assert node.unreachable == frozenset()


@pytest.mark.parametrize("text", [b"", b"{}", b'{"boot": "another", "nodes": ["n3"]}', b"\xff"])
def test_what_is_remembered_of_another_boot_or_unreadable_is_nobody(
    tmp_path: Path, text: bytes
) -> None:
    (tmp_path / memory.FILE_NAME).write_bytes(text)

    assert memory.load(tmp_path) == frozenset()


def test_a_node_with_another_key_is_another_node(node: Node) -> None:
    node.look(4)
    node.wire.cut = {3}
    node.look(6)
    peer = node.network.nodes["n3"]
    other = {"name": "n3", "role": "worker", "publicKey": "B" * 43 + "=", "endpoints": [],
             "addresses": []}  # fmt: skip
    node.state.apply(records.put(records.KEYS.node("n3"), other, 9))

    node.network.nodes = node.state.peers()
    node.look(1)

    assert peer.node.public_key != "B" * 43 + "="
    assert node.held["n3"] == "unknown"
    assert node.unreachable == frozenset()


def test_a_node_that_is_no_peer_any_more_is_forgotten(node: Node) -> None:
    node.look(4)
    node.wire.cut = {3}
    node.look(6)

    node.network.nodes = {n: p for n, p in node.network.nodes.items() if n != "n3"}
    node.look(1)

    assert node.held.keys() == {"n2"}
    assert node.unreachable == frozenset()


def test_without_a_session_a_node_that_never_answers_is_lost(node: Node) -> None:
    node.wire.cut = {3}
    node.look(100)
    never = Session(0, 0, 0)
    keys = {name: peer.node.public_key for name, peer in node.network.nodes.items()}

    node.network.overlay.seen = Interface(None, 0, {}, {keys["n3"]: never})
    node.look(2)

    assert node.held == {"n2": "reachable", "n3": Reach.UNREACHABLE.value}
    assert node.unreachable == {"n3"}


# ---- configuration


def test_the_pace_is_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    settings = AgentConfig(node="n1", reach=ReachConfig(interval="1s", fall=2, rise=5))

    path.write_text(config.dump(settings))

    assert config.load(path) == settings
    assert settings.reach.pace == Pace(1.0, 2, 5)
    assert "rise = 5\n" in path.read_text()
    assert ReachConfig(interval="off").pace is None


@pytest.mark.parametrize(
    "line", ['interval = "10ms"', 'interval = "2m"', 'interval = "on"', "fall = 0", "rise = 101"]
)
def test_a_pace_that_makes_no_sense_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f'node = "n1"\n[reach]\n{line}\n')

    with pytest.raises(BadUsage, match=line.partition(" ")[0]):
        config.load(path)


def test_what_is_off_leaves_nobody_out(tmp_path: Path) -> None:
    memory.save(tmp_path, {"n3"})
    settings = AgentConfig(node="n1", state_dir=str(tmp_path), reach=ReachConfig(interval="off"))
    state = State(records.KEYS, "n1")
    network: Any = SimpleNamespace(nodes={})

    Reachability(settings, state, network, print, Tally()).adopt()

    assert state.nodes.unreachable == frozenset()
    assert memory.load(tmp_path) == frozenset()

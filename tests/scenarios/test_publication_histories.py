"""Whatever is published, unpublished, refused and restarted, in whatever order: no port has two
owners, a task keeps the numbers it was given, and the state directory says what there is.
"""

from __future__ import annotations

import shutil
import tempfile
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mesh.errors import Conflict
from mesh.hostports import asked
from mesh.hostports.alone import Published
from mesh.hostports.publications import Publications, Request, Settings
from mesh.hostports.statedir import StateDirectory
from mesh.model.mapping import Cursors
from mesh.rules import ids, nft

if TYPE_CHECKING:
    from mesh.rules.elements import Elements

SETTINGS: Final = Settings(dynamic=(32000, 32003), protected=("32001/tcp",))

TASKS = st.sampled_from(["a", "b", "c", "d"])
TEXTS = st.lists(
    st.sampled_from(
        ["80", "81", "80/udp", "target=80,published=random", "32000:80", "32002:80/udp",
         "8080:80", "192.0.2.1:8080:80", "192.0.2.2:8080:81", "8000-8002:90-92", "22:22"]
    ),
    min_size=1,
    max_size=4,
    unique=True,
)  # fmt: skip


class Histories(RuleBasedStateMachine):
    """Steps of orchestrators, and of processes that end."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp())
        self.begin()
        self.cursors = Cursors()
        self.draw = 0
        self.texts: dict[str, list[str]] = {}

    def begin(self) -> None:
        self.state = StateDirectory(self.path / "state")
        self.known = Publications(SETTINGS)
        for each in self.state.tasks():
            self.known.put(each)

    def teardown(self) -> None:
        shutil.rmtree(self.path)

    @rule(task=TASKS, texts=TEXTS)
    def publish(self, task: str, texts: list[str]) -> None:
        told = set(self.known)
        self.draw += 1
        request = Request(task, ("172.17.0.2", "fd17::2"), asked.ports(texts), self.draw)
        try:
            found, self.cursors = self.known.decide(request, self.cursors, lambda _: None)
        except Conflict:
            assert set(self.known) == told
            return
        assert len(found.ports) == len(request.ports)
        if self.texts.get(task) == texts:
            assert found == self.known.get(task)
        self.texts[task] = texts
        with self.state.locked():
            self.state.write(found)
        self.known.put(found)
        again, _ = self.known.decide(request, self.cursors, lambda _: None)
        assert again == found

    @rule(task=TASKS)
    def unpublish(self, task: str) -> None:
        with self.state.locked():
            self.state.remove(task)
        self.known.drop(task)
        self.texts.pop(task, None)

    @rule()
    def restart(self) -> None:
        self.begin()

    @invariant()
    def the_state_says_what_there_is(self) -> None:
        assert sorted(self.state.tasks(), key=str) == sorted(self.known, key=str)

    @invariant()
    def no_port_has_two_owners(self) -> None:
        places = [(each.task, port) for each in self.known for port in each.ports]
        for (one, port), (other, same) in combinations(places, 2):
            if one != other and (port.protocol, port.published) == (same.protocol, same.published):
                assert None not in (port.host_ip, same.host_ip)
                assert port.host_ip != same.host_ip

    @invariant()
    def each_wants_elements_of_its_own(self) -> None:
        """But for those that may be shared."""
        published, table = Published(self.known), ids.Ids()
        seen: Elements = {}
        for task in published.services():
            found, pools = published.lower(task, table)
            assert {f.key for f in published.forwardings(task)} == set(pools)
            mine = {k: v for k, v in found.items() if not k[0].startswith("hairpin")}
            assert seen.keys().isdisjoint(mine)
            seen |= mine
            alone: Elements = {}
            for each in published.forwardings(task):
                alone |= nft.lower(each, table)
            assert alone == mine


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)

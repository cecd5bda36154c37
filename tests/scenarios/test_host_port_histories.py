"""Whatever becomes of services, tasks, ranges and the agent, in whatever order: no host port has
two owners, none leaks, none comes from outside the range, a task has all of its ports or none and
the reason, and keeps what it was told while it has them.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mesh.model import protected
from mesh.model.publish import Protocol
from tests.support.hostports import CLUSTER, Node, port

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.model.publish import PublishedPort
    from mesh.model.view import HostClaim

RANGES: Final = ((32000, 32003), (32002, 32006), (40000, 40001))
BARRED: Final = (("32001/tcp",), ("32003",), ())

SERVICES = st.sampled_from(["a", "b", "c"])
TASKS = st.sampled_from(["x", "y"])
PROTOCOLS = st.sampled_from([Protocol.TCP, Protocol.UDP])
PORTS = st.lists(
    st.builds(
        port,
        st.sampled_from([80, 81]),
        st.sampled_from([None, None, None, 8080, 32000, 32002]),
        protocol=PROTOCOLS,
        host_ip=st.sampled_from([None, None, "192.0.2.1"]),
    )
    | st.builds(port, st.sampled_from([80, 81]), random=st.just(value=True), protocol=PROTOCOLS),
    max_size=3,
    unique_by=lambda one: (one.published or object(), one.protocol),
)


class Told(NamedTuple):
    """What a dynamic port of a task was given."""

    service: str
    task: str
    protocol: Protocol
    target: int
    number: int


class Histories(RuleBasedStateMachine):
    """Steps of users, of failures and of the agent; the invariants are the promises."""

    def __init__(self) -> None:
        super().__init__()
        self.node = Node()
        self.reserved: set[tuple[Protocol, int]] = set()
        self.told: set[Told] = set()
        """What was written down of tasks that live on, and nothing took from them."""

    # ---- what users do

    @rule(service=SERVICES, ports=PORTS)
    def put_service(self, service: str, ports: list[PublishedPort]) -> None:
        self.node.publish(service, *ports)
        self._forget(lambda one: one.service == service)

    @rule(service=SERVICES, task=TASKS)
    def start(self, service: str, task: str) -> None:
        ports, tasks = self.node.services.get(service, ((), []))
        if task not in {one.id for one, _ in tasks}:
            self.node.publish(service, *ports, tasks=[task])

    @rule(service=SERVICES, task=TASKS)
    def end(self, service: str, task: str) -> None:
        if service in self.node.services:
            self.node.end(service, task)
        self._forget(lambda one: (one.service, one.task) == (service, task))

    @rule(service=SERVICES, task=TASKS)
    def drain(self, service: str, task: str) -> None:
        if service in self.node.services:
            self.node.drain(service, task)

    @rule(protocol=PROTOCOLS, number=st.integers(32000, 32003))
    def allocate_ingress(self, protocol: Protocol, number: int) -> None:
        self.reserved.add((protocol, number))
        self.node.ports.reserve(protocol, number, "web")
        self._forget(lambda one: (one.protocol, one.number) == (protocol, number))

    @rule(protocol=PROTOCOLS, number=st.integers(32000, 32003))
    def free_ingress(self, protocol: Protocol, number: int) -> None:
        self.reserved.discard((protocol, number))
        self.node.ports.reserve(protocol, number, None)

    @rule(span=st.sampled_from(RANGES), barred=st.sampled_from(BARRED))
    def change_settings(self, span: tuple[int, int], barred: tuple[str, ...]) -> None:
        self.node.cluster = msgspec.structs.replace(
            CLUSTER, host_ports=span, protected_ports=barred
        )
        self.node.ports.confine(self.node.cluster)
        self._forget(lambda one: not self._is_allowed(one))

    # ---- what the agent does

    @rule()
    def settle(self) -> None:
        self.node.settle()
        self._who_has_none_is_told_why()

    @rule()
    def settle_and_write(self) -> None:
        self.settle()
        self.node.write()
        for service in self.node.services:
            self.told |= self._dynamic(service)

    @rule()
    def restart(self) -> None:
        """However it ended: what it had not written is lost."""
        self.node.restart()
        for protocol, number in self.reserved:
            self.node.ports.reserve(protocol, number, "web")
        self.settle()

    # ---- what must hold

    @invariant()
    def nothing_has_two_owners(self) -> None:
        claims = self._granted()
        for one, other in combinations(claims, 2):
            assert not _answer_together(one, other), (one, other)
        for claim in claims:
            assert (claim.protocol, claim.published) not in self.reserved

    @invariant()
    def dynamic_ports_are_of_the_range(self) -> None:
        for service in self.node.services:
            assert all(map(self._is_allowed, self._dynamic(service)))

    @invariant()
    def tasks_keep_what_they_were_told(self) -> None:
        """While they have anything: who lacks one of its ports may lose the others to somebody."""
        now = {one for service in self.node.services for one in self._dynamic(service)}
        publishing = {(c.service, c.task) for c in self._granted()}
        self._forget(lambda one: (one.service, one.task) not in publishing)
        assert self.told <= now

    @invariant()
    def a_task_has_all_of_its_ports_or_none(self) -> None:
        has = Counter((claim.service, claim.task) for claim in self._granted())
        for service, (ports, tasks) in self.node.services.items():
            for task, _ in tasks:
                assert has[service, task.id] in (0, len(ports))

    def _who_has_none_is_told_why(self) -> None:
        has = {(claim.service, claim.task) for claim in self._granted()}
        lacking = {
            f"task {task.id} of service {service}"
            for service, (ports, tasks) in self.node.services.items()
            for task, _ in tasks
            if ports and (service, task.id) not in has
        }
        assert {problem.about for problem in self.node.ports.problems()} == lacking

    @precondition(lambda self: not self.reserved)
    @rule()
    def nothing_leaks(self) -> None:
        """With everybody gone, the whole range is there for one task."""
        for service in self.node.services:
            self.node.services[service] = (), []
            self.node.tell(service)
        self.told.clear()
        low, high = self.node.cluster.host_ports
        barred = protected.barred(self.node.cluster, Protocol.TCP)
        free = {number for number in range(low, high + 1) if number not in barred}

        self.node.publish("a", *(port(target) for target in range(1, len(free) + 1)), tasks=["x"])
        self.node.settle()
        self.node.write()

        assert set(self.node.numbers("a").values()) == free
        assert self.node.records.keys() == {"x"}
        assert list(self.node.ports.problems()) == []

    def teardown(self) -> None:
        self.settle_and_write()
        assert self.node.records.keys() == {claim.task for claim in self._granted()}
        assert self.node.ports.unwritten() == {}

    # ---- looking

    def _granted(self) -> list[HostClaim]:
        return [c for service in self.node.services for c in self.node.ports.granted(service)]

    def _dynamic(self, service: str) -> set[Told]:
        """The numbers of a service's dynamic ports."""
        ports, tasks = self.node.services[service]
        named = {(p.protocol, p.published) for p in ports}
        dynamic = {(p.protocol, p.target) for p in ports if p.published is None}
        found: set[Told] = set()
        for task, _ in tasks:
            for one in self.node.ports.published(task.id):
                if one.service == service and (one.protocol, one.host_port) not in named:
                    assert (one.protocol, one.container_port) in dynamic
                    place = (one.protocol, one.container_port, one.host_port)
                    found.add(Told(service, task.id, *place))
        return found

    def _is_allowed(self, one: Told) -> bool:
        low, high = self.node.cluster.host_ports
        barred = protected.barred(self.node.cluster, one.protocol)
        return low <= one.number <= high and one.number not in barred

    def _forget(self, lost: Callable[[Told], bool]) -> None:
        self.told = {one for one in self.told if not lost(one)}


def _answer_together(one: HostClaim, other: HostClaim) -> bool:
    if (one.protocol, one.published) != (other.protocol, other.published):
        return False
    return one.address is None or other.address is None or one.address == other.address


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)

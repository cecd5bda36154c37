"""Whatever happens to services, nodes, leaders and the store, in whatever order: nothing is given
twice, nothing leaks, what is given stays, and nobody ever has a part of a range.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from mesh.controller.lead import lead
from mesh.errors import StoreUnavailable
from mesh.model.publish import Protocol, PublishedPort, PublishMode
from mesh.model.service import ServiceSpec
from mesh.store.memory import MemoryStore
from mesh.store.schema import encode
from mesh.vip import allocator
from tests.support.allocations import CLUSTER, KEYS, Allocations, ingress
from tests.support.stores import LIMIT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mesh.store.protocol import Compare, Delete, Part, Put, TransactionResult

NAMES = st.sampled_from(["a", "b", "c", "d", "e", "f", "g", "h"])
PORTS = st.lists(
    st.builds(
        ingress,
        st.sampled_from([None, 8080, 8081, 30000]),
        st.sampled_from([80, 81]),
        st.sampled_from(Protocol),
    )
    | st.just(PublishedPort(target=80, published=9000)),
    max_size=4,
    unique_by=lambda port: (port.published or object(), port.protocol),
)
RANGES = (range(2000, 2200), range(3000, 3150))
"""Each more than a plain transaction takes."""

VIPS = st.sampled_from(["auto", "auto", "auto", "none", "10.1.0.2", "10.1.0.3", "10.9.0.1"])


class FaultyStore(MemoryStore):
    """A store whose transactions take a while, and whose answers may be lost.

    A transaction that gives an allocated place to somebody else is noted in `thefts`, one that
    leaves a service with a part of a range in `torn`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.delay = 0
        self.thefts: list[str] = []
        self.torn: list[str] = []

    async def transact(
        self,
        conditions: Sequence[Compare],
        operations: Sequence[Put | Delete],
        parts: Sequence[Part] = (),
    ) -> TransactionResult:
        for _ in range(self.delay):
            await asyncio.sleep(0)
        fault = self.faults.pop() if self.faults else ""
        if fault == "before":
            raise StoreUnavailable("the request was lost")
        result = await super().transact(conditions, operations, parts)
        for _ in range(self.delay):
            await asyncio.sleep(0)
        if fault == "after":
            raise StoreUnavailable("the answer was lost")
        return result

    def _commit(self, operations: Sequence[Put | Delete]) -> int:
        before = {key: _owner(item.value) for key, item in self._items.items() if _is_held(key)}
        revision = super()._commit(operations)
        after = {key: _owner(item.value) for key, item in self._items.items() if _is_held(key)}
        self.thefts += [key for key in before.keys() & after if before[key] != after[key]]
        for span in RANGES:
            owners = [after.get(KEYS.port_allocation("tcp", number)) for number in span]
            if len(set(owners)) > 1:
                self.torn.append(f"{span} at {revision}")
        return revision


def _is_held(key: str) -> bool:
    return key.startswith(KEYS.under("allocations")) and "/cursors/" not in key


def _owner(value: bytes) -> object:
    record = msgspec.json.decode(value)
    return record.get("service", record.get("node")) if isinstance(record, dict) else None


class Histories(RuleBasedStateMachine):
    """Steps of users, of failures and of time; `settle` checks the promises."""

    @initialize(fenced=st.booleans())
    def begin(self, fenced: bool) -> None:
        self.fenced = fenced
        self.runner = asyncio.Runner()
        self.store = FaultyStore()
        self.world = Allocations(self.store)
        self.leaders: list[asyncio.Task[None]] = []
        self.specs: dict[str, ServiceSpec] = {}
        self.given: dict[str, int] = {}
        self.run(self.store.put(KEYS.cluster, encode(CLUSTER)))
        self.run(self._elect())

    def run(self, work: object) -> object:
        return self.runner.run(work)  # type: ignore[arg-type]

    # ---- what users do

    @rule(name=NAMES, ports=PORTS, vip=VIPS)
    def put_service(self, name: str, ports: list[PublishedPort], vip: str) -> None:
        self._put_service(name, ports, vip)

    @rule(name=NAMES, ports=PORTS, spans=st.sets(st.sampled_from(RANGES), min_size=1))
    def put_service_with_ranges(
        self, name: str, ports: list[PublishedPort], spans: set[range]
    ) -> None:
        ranged = [ingress(number) for span in sorted(spans, key=min) for number in span]
        self._put_service(name, [*ports, *ranged], "auto")

    def _put_service(self, name: str, ports: list[PublishedPort], vip: str) -> None:
        before = self.specs.get(name)
        if before is None or before.vip != vip:
            self.given.pop(name, None)
        self.run(self.world.service(name, *ports, vip=vip))
        self.specs[name] = ServiceSpec(name=name, ports=tuple(ports), vip=vip)

    @rule(name=NAMES)
    def delete_service(self, name: str) -> None:
        self.run(self.store.delete(KEYS.service(name)))
        self.specs.pop(name, None)
        self.given.pop(name, None)

    @rule(name=NAMES)
    def put_node(self, name: str) -> None:
        self.run(self.world.node(name))

    @rule(name=NAMES)
    def delete_node(self, name: str) -> None:
        self.run(self.store.delete(KEYS.node(name)))

    # ---- what goes wrong

    @rule()
    def leader_crashes(self) -> None:
        self.run(self._crash())
        self.run(self._elect())

    @rule()
    def leader_is_deposed_and_does_not_know(self) -> None:
        self.run(self._elect())

    @precondition(lambda self: not self.fenced)
    @rule()
    def leader_has_a_twin(self) -> None:
        """Fencing failed: two leaders, and both may write."""
        self.run(self._lead())

    @rule(fault=st.sampled_from(["before", "after"]), delay=st.integers(0, 3))
    def store_falters(self, fault: str, delay: int) -> None:
        self.store.faults.append(fault)
        self.store.delay = delay

    @rule(steps=st.integers(1, 30))
    def time_passes(self, steps: int) -> None:
        self.run(_steps(steps))

    # ---- what must hold

    @rule()
    def settle(self) -> None:
        self.store.faults.clear()
        self.run(self._settle())

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            try:
                self.settle()
            finally:
                self.run(self._crash())
                self.runner.close()

    async def _elect(self) -> None:
        self.guard = await self.world.elect()
        await self._lead()

    async def _lead(self) -> None:
        self.leaders.append(asyncio.create_task(lead(self.store, KEYS, self.guard)))

    async def _crash(self) -> None:
        for task in self.leaders:
            task.cancel()
        for outcome in await asyncio.gather(*self.leaders, return_exceptions=True):
            assert outcome is None or isinstance(outcome, StoreUnavailable | asyncio.CancelledError)
        self.leaders.clear()

    async def _settle(self) -> None:
        async with asyncio.timeout(LIMIT):
            while (wrong := await self._wrong()) is not None:
                if all(task.done() for task in self.leaders):
                    await self._crash()
                    await self._elect()
                try:
                    await asyncio.sleep(0.002)
                except asyncio.CancelledError:
                    raise AssertionError(wrong) from None
        assert self.store.thefts == []
        assert self.store.torn == [] or not self.fenced
        await self._stays()

    async def _wrong(self) -> str | None:
        """What is not yet as it should be."""
        vips, ports = await self.world.vips(), await self.world.ports()
        problems = await self.world.problems()
        if not set(vips) <= set(self.specs):
            return f"VIPs of services that are gone: {vips}"
        if not {service for service, _ in ports.values()} <= set(self.specs):
            return f"ports of services that are gone: {ports}"
        for name, spec in self.specs.items():
            about = set(problems.pop(f"services/{name}", ()))
            wrong = _wrong_vip(spec, vips, about) or _wrong_ports(spec, ports, about)
            if wrong or about - {"more"}:
                return f"{name}: {wrong}, needless problems {about}, {vips}, {ports}"
        return await self._wrong_nodes(problems)

    async def _wrong_nodes(self, problems: dict[str, tuple[str, ...]]) -> str | None:
        listed = (await self.store.list(KEYS.under("nodes"))).items
        names = {item.key.rpartition("/")[2] for item in listed}
        numbers = await self.world.numbers()
        if len(numbers) != min(len(names), CLUSTER.capacity) or not set(numbers) <= names:
            return f"nodes {names} have {numbers}"
        missing = {f"nodes/{name}": ("number",) for name in names - set(numbers)}
        return None if problems == missing else f"problems {problems}, expected {missing}"

    async def _stays(self) -> None:
        for name, indexes in (await self.world.vips()).items():
            if self.specs[name].vip == "auto":
                known = self.given.setdefault(name, indexes[0])
                assert indexes == (known,), f"the VIP of {name} was {known}, is {indexes}"


async def _steps(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def _told(about: set[str], problem: str) -> bool:
    """Takes a problem out of `about`; whether it is told, by itself or as one of many more."""
    told = problem in about or "more" in about
    about.discard(problem)
    return told


def _wrong_vip(spec: ServiceSpec, vips: dict[str, tuple[int, ...]], about: set[str]) -> str | None:
    """Takes the problem that explains a missing VIP out of `about`."""
    mine = vips.get(spec.name, ())
    taken = {index for indexes in vips.values() for index in indexes}
    if len(mine) > 1:
        return "two VIPs"
    if spec.vip == "none":
        return "a VIP nobody wants" if mine else None
    if spec.vip == "auto":
        full = taken == set(allocator.vip_indexes(CLUSTER))
        excused = not mine and full and "vip" in about
    else:
        try:
            index = allocator.vip_index(CLUSTER, spec.vip)
        except ValueError:
            index = -1
        excused = mine != (index,) and (index in taken or index == -1) and "vip" in about
        if mine and mine != (index,) and not excused:
            return "another VIP than wanted"
    if excused:
        about.discard("vip")
        return None
    return None if mine else "no VIP"


def _wrong_ports(
    spec: ServiceSpec, ports: dict[str, tuple[str, int]], about: set[str]
) -> str | None:
    """Takes the problems that explain missing ports out of `about`."""
    mine = {place: target for place, (service, target) in ports.items() if service == spec.name}
    for port in spec.ports:
        place = f"{port.protocol.value}/{port.published}"
        if port.mode is not PublishMode.INGRESS or port.published is None:
            continue
        if place not in mine:
            issue = f"{port.published}/{port.protocol.value}"
            if place not in ports or not _told(about, issue):
                return f"no {place}"
        elif mine.pop(place) != port.target:
            return f"{place} leads to another target"
    return _wrong_dynamic_ports(spec, ports, mine, about)


def _wrong_dynamic_ports(
    spec: ServiceSpec, ports: dict[str, tuple[str, int]], mine: dict[str, int], about: set[str]
) -> str | None:
    wanted = Counter(
        (port.protocol.value, port.target)
        for port in spec.ports
        if port.mode is PublishMode.INGRESS and port.published is None
    )
    have = Counter((place.partition("/")[0], target) for place, target in mine.items())
    if have - wanted:
        return f"ports nobody wants: {have - wanted}"
    for protocol, target in wanted - have:
        full = all(f"{protocol}/{n}" in ports for n in allocator.dynamic_ports(CLUSTER))
        if not full or not _told(about, f"{target}/{protocol}"):
            return f"no dynamic port for {target}/{protocol}"
    return None


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

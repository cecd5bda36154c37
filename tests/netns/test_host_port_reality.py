"""Whatever becomes of services, tasks, ingress ports, the agent and etcd: after each step the maps
in the kernel, what a client gets to hear, and the records of published ports say the same.

State, planner and reconciler are the agent's own; its loops and etcd are played: events come one by
one, and the agent may be killed before it has written to the kernel, or before the records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from mesh.agent.planner import Plans
from mesh.agent.state import State
from mesh.dataplane import netns
from mesh.delta import Delta
from mesh.engine.desired import Touched
from mesh.engine.reconciler import Reconciler
from mesh.model import address
from mesh.model.address import FAMILIES
from mesh.model.mapping import Cursors, PortMapping
from mesh.model.publish import Protocol
from mesh.rules import elements, marks
from mesh.store import schema
from mesh.store.protocol import Change, Changes, KeyValue, Snapshot
from tests.support import drivers, records, rules
from tests.support.echo import REFUSED, ask
from tests.support.onenode import ADDRESSES, SERVER_PORT, OneNode, one_node
from tests.support.records import KEYS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.rules.elements import Elements

pytestmark = pytest.mark.netns

RANGE: Final = range(32000, 32003)
NAMED: Final = (8080, 32001)
INGRESS: Final = (8080, 32002)
CONTAINERS: Final = {"x": "c1", "y": "c2"}
"""Which container each task is."""

CLUSTER: Final[dict[str, object]] = {
    "id": "test",
    "prefix6": rules.CLUSTER.prefix6,
    "hostPorts": [RANGE[0], RANGE[-1]],
}
SERVICES = st.sampled_from(["a", "b"])
TASKS = st.sampled_from(list(CONTAINERS))
PORTS = st.lists(
    st.fixed_dictionaries(
        {
            "target": st.just(SERVER_PORT),
            "published": st.sampled_from([None, None, *NAMED]),
            "protocol": st.sampled_from(["tcp", "tcp", "udp"]),
            "hostIP": st.sampled_from([None, None, ADDRESSES["node"][0], "::1"]),
        }
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda one: (one["published"] or object(), one["protocol"]),
)
DEATHS = st.sampled_from([None, None, None, "before the kernel", "before the records"])


class Frontend(NamedTuple):
    """One entry of a map: where a client may call, and who answers; "" if nobody does."""

    map: str
    address: str
    protocol: Protocol
    port: int
    answers: str


class Reality(RuleBasedStateMachine):
    """Steps of users, of failures and of the agent; each is checked when the agent has done it."""

    def __init__(self, world: OneNode) -> None:
        super().__init__()
        self.world = world
        self.revision = 1
        self.etcd: dict[str, KeyValue] = {}
        self.cursors = Cursors()
        self.driver = drivers.make(world.driver.name, rules.PARAMETERS)  # to be closed
        web = [{"target": SERVER_PORT, "published": n, "mode": "ingress"} for n in INGRESS]
        for key, record in {
            **records.cluster(1),
            KEYS.cluster: CLUSTER,
            **records.service("web", *web),
            KEYS.task("web", "web-1"): _task("web", "web-1", "x"),
        }.items():
            self._store(key, record)
        self._start()

    # ---- what users do

    @rule(service=SERVICES, ports=PORTS, death=DEATHS)
    def put_service(self, service: str, ports: list[dict[str, Any]], death: str | None) -> None:
        self._put(KEYS.service(service), {"name": service, "ports": ports}, death)

    @rule(service=SERVICES, death=DEATHS)
    def remove_service(self, service: str, death: str | None) -> None:
        self._delete(KEYS.service(service), death)

    @rule(service=SERVICES, task=TASKS, death=DEATHS)
    def start(self, service: str, task: str, death: str | None) -> None:
        self._put(KEYS.task(service, task), _task(service, task, task), death)

    @rule(service=SERVICES, task=TASKS, death=DEATHS)
    def drain(self, service: str, task: str, death: str | None) -> None:
        key = KEYS.task(service, task)
        if key in self.etcd:
            self._put(key, {**_task(service, task, task), "state": "draining"}, death)

    @rule(service=SERVICES, task=TASKS, death=DEATHS)
    def end(self, service: str, task: str, death: str | None) -> None:
        self._delete(KEYS.task(service, task), death)

    # ---- what the controller does

    @rule(number=st.sampled_from(INGRESS), death=DEATHS)
    def allocate(self, number: int, death: str | None) -> None:
        record = {"service": "web", "target": SERVER_PORT}
        self._put(KEYS.port_allocation("tcp", number), record, death)

    @rule(number=st.sampled_from(INGRESS), death=DEATHS)
    def free(self, number: int, death: str | None) -> None:
        self._delete(KEYS.port_allocation("tcp", number), death)

    # ---- what goes wrong

    @rule()
    def restart(self) -> None:
        self._start()

    @rule(order=st.randoms(use_true_random=False))
    def lose_etcd_and_restore_it(self, order: Any) -> None:
        """The agent sees nothing for a while, and does nothing; records come back in any order."""
        kept, before = dict(self.etcd), self._kernel()
        told = self._dynamic()
        self.etcd = {}
        self.state.apply(Snapshot((), self._next()))
        assert self._kernel() == before
        keys = sorted(key for key in kept if not key.startswith(KEYS.published("n1")))
        order.shuffle(keys)
        for key in keys:
            self._store(key, kept[key].value)
        self._do(self.state.apply(Snapshot(tuple(self.etcd.values()), self.revision)), None)
        whole = {(each.service, each.pod_name) for each in self._published()}
        assert {one for one in told if one[:2] in whole} <= self._dynamic()

    # ---- the agent

    def _start(self) -> None:
        """A new agent adopts what there is; what the one before had not written is lost."""
        with netns.entered("/run/netns/node"):
            driver = drivers.make(self.world.driver.name, rules.PARAMETERS)
        self.driver.close()
        self.driver = driver
        self.state = State(KEYS, "n1", loopback=True)
        self.state.hostports.resume(self.cursors)
        self.state.apply(Snapshot(tuple(self.etcd.values()), self.revision))
        self.state.settle(Touched(frozenset(), nodes=False))
        self.reconciler = Reconciler(Plans(self.state), driver, lambda _: None, marks.DEFAULT)
        self.world.node.run(driver.prepare())
        self.world.node.run(self.reconciler.start({}))
        self._write()
        self._check()

    def _do(self, touched: Touched, death: str | None) -> None:
        touched = self.state.settle(touched)
        if death == "before the kernel":
            self._start()
            return
        self.world.node.run(self.reconciler.reconcile(touched))
        if death == "before the records":
            self._start()
            return
        self._write()
        self._check()

    def _write(self) -> None:
        self.cursors = self.state.hostports.cursors
        for task, mappings in self.state.hostports.unwritten().items():
            key = KEYS.published("n1", task)
            item = self._store(key, schema.encode(mappings)) if mappings else None
            if item is None:
                self.etcd.pop(key, None)
            self.state.hostports.recorded(task, mappings)
            self.state.apply(Changes((Change(key, item, self._next()),), self.revision))

    # ---- etcd

    def _next(self) -> int:
        self.revision += 1
        return self.revision

    def _store(self, key: str, record: Any) -> KeyValue:
        there, revision = self.etcd.get(key), self._next()
        created = there.create_revision if there is not None else revision
        self.etcd[key] = records.item(key, record, revision, created)
        return self.etcd[key]

    def _put(self, key: str, record: Any, death: str | None) -> None:
        item = self._store(key, record)
        change = Changes((Change(key, item, self.revision),), self.revision)
        self._do(self.state.apply(change), death)

    def _delete(self, key: str, death: str | None) -> None:
        if self.etcd.pop(key, None) is not None:
            self._do(self.state.apply(records.delete(key, self._next())), death)

    # ---- what must hold

    def _check(self) -> None:
        published = self._published()
        assert _frontends(self._kernel()) == self._promised(published)
        reserved = {number for protocol, number in self._reserved() if protocol is Protocol.TCP}
        for _, _, _, number in self._dynamic():
            assert number in RANGE
        for port in sorted({*NAMED, *INGRESS, *RANGE}):
            family = FAMILIES[(port + self.revision) % 2]
            node = ADDRESSES["node"][FAMILIES.index(family)]
            expected = "c1" if port in reserved else REFUSED
            for one in published:
                meant = (one.host_port, one.protocol) == (port, Protocol.TCP)
                if meant and one.host_ip in ("", node) and self._serves(one):
                    assert expected == REFUSED
                    expected = CONTAINERS[one.pod_name]
            assert ask("client", Protocol.TCP, node, port).split()[0] == expected, port

    def _published(self) -> list[PortMapping]:
        return [
            one
            for key, item in self.etcd.items()
            if key.startswith(KEYS.published("n1"))
            for one in msgspec.json.decode(item.value, type=list[PortMapping])
        ]

    def _reserved(self) -> set[tuple[Protocol, int]]:
        prefix = KEYS.port_allocation("tcp", 1).removesuffix("1")
        return {
            (Protocol.TCP, int(k.rpartition("/")[2])) for k in self.etcd if k.startswith(prefix)
        }

    def _serves(self, one: PortMapping) -> bool:
        record = msgspec.json.decode(self.etcd[KEYS.task(one.service, one.pod_name)].value)
        return bool(record["state"] == "running")

    def _dynamic(self) -> set[tuple[str, str, Protocol, int]]:
        """What was given without being asked for by number."""
        found = set()
        for one in self._published():
            spec = msgspec.json.decode(self.etcd[KEYS.service(one.service)].value)
            named = {(p["protocol"], p["published"]) for p in spec["ports"]}
            if (one.protocol.value, one.host_port) not in named:
                found.add((one.service, one.pod_name, one.protocol, one.host_port))
        return found

    def _promised(self, published: list[PortMapping]) -> set[Frontend]:
        """What the kernel has to hold, as the records tell."""
        found = set()
        for one in published:
            for family in FAMILIES:
                if one.host_ip and address.family_of(one.host_ip) is not family:
                    continue
                there = ADDRESSES[CONTAINERS[one.pod_name]][FAMILIES.index(family)]
                answers = there if self._serves(one) else ""
                kind = f"hostips{family.suffix}" if one.host_ip else f"ports{family.suffix}"
                found.add(Frontend(kind, one.host_ip, one.protocol, one.host_port, answers))
        for protocol, number in self._reserved():
            for family, there in zip(FAMILIES, ADDRESSES["c1"], strict=True):
                found.add(Frontend(f"meshports{family.suffix}", "", protocol, number, there))
        return found

    def _kernel(self) -> Elements:
        return self.world.node.run(self.driver.read())

    def teardown(self) -> None:
        held = self._kernel()
        self.world.node.run(self.driver.apply(Delta(held, {})))
        self.driver.close()


def _task(service: str, name: str, place: str) -> dict[str, Any]:
    where = ADDRESSES[CONTAINERS[place]]
    return {"service": service, "id": name, "node": "n1", "addresses": where, "state": "running"}


def _frontends(found: Elements) -> set[Frontend]:
    """The frontends of a kernel's maps with where they lead, told apart from what leads nowhere."""
    shown, led = set(), set()
    for (name, key), data in found.items():
        if name not in elements.FRONTENDS or name.startswith("vips"):
            continue
        width = len(key) - 8
        number, port = key[width], int.from_bytes(key[width + 4 : width + 6], "big")
        protocol = next(each for each in Protocol if each.number == number)
        slots = marks.DEFAULT.slots_of(elements.mark_of(data))
        assert slots <= 1
        answers = ""
        if slots:
            target = found[f"targets{name[-1]}", data + elements.SLOT_BYTES[0]]
            assert int.from_bytes(target[-4:-2], "big") == SERVER_PORT
            answers = address.unpacked(target[:-4])
            led.add((f"targets{name[-1]}", data + elements.SLOT_BYTES[0]))
        host = address.unpacked(key[:width]) if width else ""
        shown.add(Frontend(name, host, protocol, port, answers))
    assert {key for key in found if key[0] in elements.TARGETS} == led
    return shown


@pytest.fixture(scope="module", params=drivers.KERNEL)
def world(request: pytest.FixtureRequest) -> Iterator[OneNode]:
    with one_node(request.param) as made:
        yield made


def test_the_kernel_the_client_and_the_records_agree(world: OneNode) -> None:
    run_state_machine_as_test(
        lambda: Reality(world),  # type: ignore[arg-type]
        settings=settings(
            max_examples=10,
            stateful_step_count=15,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],  # to shrink takes minutes here
            suppress_health_check=list(HealthCheck),
        ),
    )

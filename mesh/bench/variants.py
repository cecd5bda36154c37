"""What the node may be given to do: nothing, a single rule, our program, kube-proxy's rules."""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mesh.agent.planner import Plans
from mesh.agent.state import State
from mesh.bench import backends, kubeproxy, names, records, topology
from mesh.bench.names import KUBE_PROXY
from mesh.engine.reconciler import Reconciler
from mesh.model import address
from mesh.model.address import FAMILIES, Family
from mesh.rules import marks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mesh.bench.connections import Target
    from mesh.model.publish import Protocol

DIRECT: Final = "direct"
AGAIN: Final = "direct again"
"""The same as direct: how far two equal things differ in this run."""

CONNTRACK: Final = "conntrack only"
ONE_RULE: Final = "one DNAT rule"
BASELINES: Final = (DIRECT, AGAIN, CONNTRACK, ONE_RULE)

TARGETS: Final = 64
"""So many services are called in turn, evenly spread over all: some are early in a list, some late.
"""

_ANY: Final = 1000
"""Baselines have no services; they call the replicas of so many."""

_TABLE: Final = {
    CONNTRACK: "chain c {{ type filter hook prerouting priority 0; ct state invalid drop; }}",
    ONE_RULE: (
        "chain c {{ type nat hook prerouting priority -100; "
        "{ip} daddr {node} tcp dport 1024-65535 dnat {ip} to {backend}; "
        "{ip} daddr {node} udp dport 1024-65535 dnat {ip} to {backend}; }}"
    ),
}
"""A rule for each protocol; TCP never comes to the second."""

_PODS: Final = {
    Family.V4: records.CLUSTER.containers4,
    Family.V6: address.nth_subnet(records.CLUSTER.prefix6, 49, 0),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One rule set; `services` is None where there are none."""

    backend: str
    services: int | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """How a client gets to a replica."""
        if self.services is not None:
            return ("port", "vip")
        return ("port",) if self.backend == ONE_RULE else ("routed",)

    def __str__(self) -> str:
        return names.case(self.backend, self.services)

    def load(self, family: Family) -> float:
        """Load the rules into the thread's namespace; the seconds it took.

        Raises CommandFailed.
        """
        if self.services is not None and not self.backend.startswith(KUBE_PROXY):
            return asyncio.run(_install(self.backend, self.services))
        argv, text = self._rules(family)
        began = time.perf_counter()
        if text:
            topology.run(*argv, input=text)
        return time.perf_counter() - began

    def _rules(self, family: Family) -> tuple[tuple[str, ...], str]:
        """The program that loads the rules, and what it reads."""
        if self.services is None:
            return ("nft", "-f", "-"), _baseline(self.backend, family)
        node = _node(family)
        services = kube_services(self.services, family)
        flavour = self.backend.removeprefix(KUBE_PROXY)
        if flavour == "nftables":
            return ("nft", "-f", "-"), kubeproxy.nftables(node, services)
        tool = f"{_XTABLES[family]}-{flavour.removeprefix('iptables-')}-restore"
        return (tool, "--noflush", "-w"), kubeproxy.iptables(node, services)

    def targets(self, path: str, protocol: Protocol, family: Family) -> Sequence[Target]:
        """What is called, in turn."""
        count = _ANY if self.services is None else self.services
        chosen = [
            index for index in range(count) if records.protocol_of(index, records.LOCAL) is protocol
        ]
        spread = [chosen[n * len(chosen) // TARGETS] for n in range(TARGETS)] if chosen else []
        match path:
            case "port":
                return [(topology.NODE[family], records.published(index)) for index in spread]
            case "vip":
                return [(_of(records.vips(index), family), records.TARGET) for index in spread]
            case _:
                return [(_endpoints(index, family)[0], records.TARGET) for index in spread]


_XTABLES: Final = {Family.V4: "iptables", Family.V6: "ip6tables"}


async def _install(backend: str, services: int) -> float:
    """Bring the kernel in line the way an agent that starts does."""
    driver = backends.driver(backend)
    try:
        state = State(records.KEYS, "n1")
        reconciler = Reconciler(Plans(state), driver, lambda _delta: None, marks.DEFAULT)
        state.apply(records.everything(services, records.LOCAL))
        began = time.perf_counter()
        await driver.prepare()
        await reconciler.start({})
        return time.perf_counter() - began
    finally:
        driver.close()
        gc.collect()


def _baseline(name: str, family: Family) -> str:
    chain = _TABLE.get(name, "")
    if not chain:
        return ""
    ip = "ip" if family is Family.V4 else "ip6"
    backend = kubeproxy.socket_text(_endpoints(0, family)[0], records.TARGET)
    words = {"ip": ip, "node": topology.NODE[family], "backend": backend}
    return f"table inet bench {{\n {chain.format(**words)}\n}}\n"


def _node(family: Family) -> kubeproxy.Node:
    return kubeproxy.Node(
        family=family,
        address=topology.NODE[family],
        pods=_PODS[family],
        vips=records.CLUSTER.vips(family),
    )


def kube_services(services: int, family: Family) -> Iterator[kubeproxy.Service]:
    """The services of the synthetic cluster, as kube-proxy would be told of them."""
    for index in range(services):
        yield kubeproxy.Service(
            name=records.service_name(index),
            protocol=records.protocol_of(index, records.LOCAL).value,
            vip=_of(records.vips(index), family),
            port=records.TARGET,
            node_port=records.published(index),
            target=records.TARGET,
            endpoints=tuple(_endpoints(index, family)),
        )


def _endpoints(index: int, family: Family) -> list[str]:
    tasks = (records.task(index, r, shape=records.LOCAL) for r in range(records.REPLICAS))
    return [_of(task.addresses, family) for task in tasks]


def _of(addresses: tuple[str, ...], family: Family) -> str:
    return addresses[FAMILIES.index(family)]

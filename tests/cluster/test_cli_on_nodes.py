"""The command line on the nodes of a real mesh, whatever drives their rules."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import drivers
from tests.support.cluster import Cluster, cluster, ingress, until
from tests.support.requests import Answer, Ask, ask
from tests.support.verbs import document, on_node

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cluster

PUBLISHED: Final = 8080
AFFINE: Final = 8081


@pytest.fixture(scope="module", params=drivers.KERNEL)
def mesh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    containers = (("r1", "n1"), ("r2", "n2"))
    with cluster(f"cli-{request.param}", 2, *containers, backend=request.param) as made:
        made.service("web", *ingress(PUBLISHED))
        made.service("affine", *ingress(AFFINE), affinity="client-ip")
        for service in ("web", "affine"):
            for name, _ in containers:
                made.task(service, name)
        asyncio.run(made.allocated("web", "affine"))
        yield made


def backend_of(mesh: Cluster) -> str:
    return mesh.lab.name.removeprefix("cli-")


def test_the_backend_that_drives_a_node_is_shown_and_holds_what_it_should(mesh: Cluster) -> None:
    for node in ("n1", "n2"):
        found = document(mesh, node, "rules", "diff")

        assert (found["backend"], found["equal"]) == (backend_of(mesh), True), found
        shown = on_node(mesh, node, "rules", "show")
        held = on_node(mesh, node, "rules", "show", "--kernel")
        assert shown.startswith(f"# {backend_of(mesh)} of node {node}, ")
        assert _commands(held) == _commands(shown)


def _commands(shown: str) -> set[str]:
    """What two services share stands with each of them, or with one."""
    return {line for line in shown.splitlines() if line[:1] != "#"}


async def test_an_affine_client_is_answered_by_whom_the_trace_names(mesh: Cluster) -> None:
    """Clients keep their replica on every node, and the trace at any node tells which."""
    told, real = {}, {}

    for client, entry in (("c1", "n1"), ("c1", "n2"), ("c2", "n1"), ("c2", "n2")):
        source, _ = mesh.addresses(client)
        there, _ = mesh.addresses(entry)
        found = document(mesh, entry, "trace", source, f"{there}:{AFFINE}")
        assert found["agrees"] is True
        (backend,) = found["desired"]["backends"]
        addresses = {one.addresses[0]: one.id for one in mesh.containers.values()}
        told[client, entry] = addresses[backend["address"]]
        (each,) = (a for a in mesh.asks((client,), (there,), AFFINE) if a.protocol.value == "tcp")
        real[client, entry] = await _replica(each)

    assert told == real


async def _replica(each: Ask) -> str:
    """Who answers; the first connection after a start may take its time."""
    answers: list[Answer] = []

    async def answered() -> bool:
        found = await ask(each)
        if isinstance(found, Answer):
            answers.append(found)
        return bool(answers)

    await until(answered, f"{each} is answered")
    return answers[0].replica


def test_the_doctor_finds_no_problem_on_a_node(mesh: Cluster) -> None:
    found = document(mesh, "n1", "doctor")

    states = {each["name"]: each["status"] for each in found["checks"]}
    assert found["ok"] is True
    for name in ("etcd", "cluster", "node", "program", "rules", "leftovers", "wireguard", "udp"):
        assert states[name] == "ok", found
    (rules,) = (each for each in found["checks"] if each["name"] == "rules")
    assert backend_of(mesh) in rules["evidence"]

"""A node's program to load, elements for every set, and a network namespace to load them in."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from mesh.dataplane import netns
from mesh.model.cluster import Cluster
from mesh.model.publish import Protocol
from mesh.rules import elements, marks
from mesh.rules.program import Devices, Parameters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.rules.elements import Elements, Part, SetSpec
    from mesh.rules.marks import Layout

CLUSTER: Final = Cluster(id="test", prefix6="fd11:2233:4455::/48")
DEVICES: Final = Devices("warren0", "warren-x0", "warren-br0", "02:4d:42:52:00:01")
PARAMETERS: Final = Parameters.of(CLUSTER, 1, DEVICES)


@contextmanager
def namespace() -> Iterator[None]:
    """A network namespace without a name, for the calling thread; gone with its last socket."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        netns.unshare(netns.CLONE_NEWNET)
        try:
            yield
        finally:
            netns.setns(before, netns.CLONE_NEWNET)
    finally:
        os.close(before)


def nft(*words: str) -> str:
    """Run nft as another administrator would."""
    done = subprocess.run(["nft", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _field(part: Part, number: int) -> bytes:
    """The `number`th value of a field, below 65536."""
    if part is elements.PROTO:
        return elements.proto_bytes((6, 17)[number % 2])
    if part is elements.PORT:
        return elements.port_bytes(number + 1)
    if part in (elements.MARK, elements.SLOT, elements.GUARD):
        return elements.mark_bytes(number)
    if part is elements.ZONE:
        return elements.zone_bytes(number)
    return number.to_bytes(part.width, "big")


def _fields(parts: tuple[Part, ...], number: int) -> bytes:
    return b"".join(_field(part, number) for part in parts)


def _of_policies(spec: SetSpec, number: int) -> Elements:
    """Guards, doors and grants are numbers above a length."""
    data = elements.mark_bytes(number << elements.ID_SHIFT)
    if spec.name == "doors":
        bits = elements.PORT_BITS[number % len(elements.PORT_BITS)]
        port = number << 12 & 0xFFFF0000 >> bits & 0xFFFF
        return {elements.door_key(number, tuple(Protocol)[number % 3], port, bits): data}
    if spec.name.startswith("grants"):
        host = f"10.{number % 256}.0.0" if spec.name.endswith("4") else f"fd00:{number}::"
        return {elements.grant_key(number, host, 16 if ":" not in host else 32): b""}
    return {(spec.name, _fields(spec.key, number)): data}


def samples(spec: SetSpec, count: int, layout: Layout = marks.DEFAULT) -> Elements:
    """`count` different elements of a set."""
    found: Elements = {}
    for number in range(1, count + 1):
        if spec.name.startswith("allow"):
            subnet = f"10.{number}.0.0/16" if spec.name.endswith("4") else f"fd00:{number}::/32"
            found[elements.allow_key(layout.id_bits(1), subnet, layout)] = b""
            continue
        if spec.name == "connlimits":
            found[elements.connlimit_key(layout.id_bits(number), 10 * number)] = b""
            continue
        if spec.name in elements.POLICIES:
            found |= _of_policies(spec, number)
            continue
        found[spec.name, _fields(spec.key, 4 * number)] = _fields(spec.data, number)
    return found

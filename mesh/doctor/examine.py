"""All checks of a host, in the order in which they are worth reading.  Only reads it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mesh.dataplane import foreign as others
from mesh.dataplane.link import LinkDriver
from mesh.doctor import check, foreign, host, rules
from mesh.engine import backend
from mesh.errors import HostNotReady, MeshError
from mesh.model.link import Device
from mesh.wg import device

if TYPE_CHECKING:
    from mesh.doctor.check import Check
    from mesh.doctor.subject import Subject


async def of_host(subject: Subject) -> list[Check]:
    """What can be told of this host, with or without what etcd knows of it."""
    name, found = await _of_backend(subject)
    devices, network = await _of_network(subject)
    running, layout = subject.names.steering in devices, subject.config.marks.layout
    return [
        *host.of_rights(),
        *found,
        *await host.of_wireguard(subject.names),
        *network,
        *await host.of_settings(subject, name, running=running),
        *await foreign.of_firewalls(subject, name, running=running),
        *await foreign.of_marks(layout),
        *foreign.of_routing(layout, await others.routing_rules(), await device.fwmarks()),
        *foreign.of_ports(subject, devices),
    ]


async def _of_backend(subject: Subject) -> tuple[str, list[Check]]:
    """Which backend drives the host or would, and how it is."""
    try:
        holding = await backend.holding(subject.parameters)
        name, why = await rules.chosen(subject, holding)
    except MeshError as error:
        fix = "install what is missing; run `mesh doctor` as root"
        return subject.config.backend, [check.fail("backend", str(error), fix)]
    needs = await rules.of_backend(subject, name, why)
    return name, [*needs, *await rules.of_rules(subject, name, holding)]


async def _of_network(subject: Subject) -> tuple[set[str], list[Check]]:
    """Which of our devices there are; whether others have their names, or our addresses."""
    links = LinkDriver(subject.names)
    there = set[str]()
    try:
        there |= {key.name for key in await links.read() if isinstance(key, Device)}
        (await links.underlay()).check(subject.cluster)
        shown = f"{', '.join(sorted(there))} of the mesh" if there else "no device of the mesh yet"
        found = [check.ok("addresses", f"{shown}; no route overlaps its prefixes")]
        if subject.names.overlay in there:
            found += await host.of_peers(subject, links, time.time())
    except HostNotReady as error:
        reason, _, fix = str(error).partition(": ")
        return there, [check.fail("addresses", reason, fix)]
    finally:
        await links.close()
    return there, found

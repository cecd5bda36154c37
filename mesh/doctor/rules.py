"""Checks of the rule backend: what it needs, what it holds, what another one left behind."""

from __future__ import annotations

import contextlib
from contextlib import closing
from typing import TYPE_CHECKING, Final

from mesh.dataplane import features, host, nfmessages, sockdiag, witness
from mesh.dataplane.nfnetlink import BRIDGE, Socket
from mesh.delta import Delta
from mesh.doctor import check
from mesh.doctor.check import AS_ROOT
from mesh.engine import backend
from mesh.errors import CommandFailed, HostNotReady, MeshError, NotFound
from mesh.model.publish import Protocol
from mesh.model.service import Affinity
from mesh.rules import guards, nft
from mesh.rules.forwarding import Backend, Forwarding, Frontend, Scope
from mesh.rules.guards import Door, Grant, Guard, Guards, Numbers
from mesh.rules.ids import Ids

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from mesh.dataplane.protocol import Examined
    from mesh.doctor.check import Check
    from mesh.doctor.subject import Subject
    from mesh.rules.elements import Elements
    from mesh.rules.program import Parameters

_MOST: Final = 3
"""Disagreements told; the first ones say what is wrong."""


async def chosen(subject: Subject, holding: Collection[str]) -> tuple[str, str]:
    """The backend that drives this host or would, and why it is that.  Raises CommandFailed."""
    reported = subject.reported
    told = reported.backend if reported is not None else None
    configured = subject.config.backend
    found = backend.in_force(told, configured, holding)
    if found is None:
        found = await backend.expected(configured)
    elif reported is not None and found == told:
        return found, f"as the agent reports ({reported.reason})"
    elif found in holding:
        return found, "which holds the rules"
    return found, f'by backend = "{configured}"'


async def of_backend(subject: Subject, name: str, why: str) -> list[Check]:
    """What the chosen backend needs of the kernel and of programs, tried."""
    if name == "nftables":
        program = await check.program("nft", "nftables", "nft", "--version")
        found = [_of_nf_tables(), program]
    else:
        found = [
            await check.program("iptables", "iptables", name, "--version"),
            await check.program("ipset", "ipset", "ipset", "version"),
        ]
    trial = await _of_trial(name, subject.parameters)
    return [check.ok("backend", f"{name}, {why}"), *found, trial]


def _of_nf_tables() -> Check:
    try:
        with closing(Socket()) as netlink:
            nfmessages.generation(netlink)
    except PermissionError:
        return check.warn("nf_tables", "not asked: needs root", AS_ROOT)
    except OSError as error:
        fix = 'load the module nf_tables, or set backend = "iptables"'
        return check.fail("nf_tables", f"the kernel has none ({error.strerror})", fix)
    return check.ok("nf_tables", "the kernel has it")


async def _of_trial(name: str, parameters: Parameters) -> Check:
    """The very program of the backend, and a service, in a scratch namespace."""
    try:
        has_bridge = await features.in_scratch(lambda: _rehearse(name, parameters))
    except MeshError as error:
        if isinstance(error, HostNotReady):
            return check.warn("program", f"not tried: {error}", AS_ROOT)
        return check.fail("program", str(error), await _remedy(name))
    if not has_bridge:
        fix = "install nft, and load the module nf_tables with its bridge family"
        text = "loads but for `table bridge mesh`: replicas on one bridge miss each other's replies"
        return check.warn("program", text, fix)
    return check.ok("program", f"loads and takes services by {name} (tried in a namespace)")


async def _rehearse(name: str, parameters: Parameters) -> bool:
    """Do what an agent does; whether replies on the bridge are led through the node."""
    driver = backend.driver(name, parameters)
    try:
        await driver.prepare()
        await driver.apply(Delta(add=_sample(parameters)))
        await driver.read()
    finally:
        driver.close()
    with closing(Socket()) as netlink, contextlib.suppress(OSError):
        return (BRIDGE, nfmessages.TABLE) in nfmessages.tables(netlink)
    return False


def _sample(parameters: Parameters) -> Elements:
    """Something that uses every part of the program."""
    replicas = (Backend("192.0.2.1", 80), Backend("192.0.2.2", 80), Backend("2001:db8::1", 80))
    port = (Frontend(Scope.INGRESS, None, Protocol.TCP, 80),)
    other = (Frontend(Scope.NODE, None, Protocol.UDP, 80),)
    ids = Ids(parameters.layout)
    found = nft.lower(Forwarding("random", port, replicas, allow=("192.0.2.0/24",)), ids)
    found |= nft.lower(Forwarding("affine", other, replicas, Affinity.CLIENT_IP), ids)
    door = Door(Protocol.TCP, 80, 95, "grant")
    guard, grant = Guard("guard", ("10.0.1.2",), (door,)), Grant("grant", ("192.0.2.0/24",), ())
    found |= guards.lower(Guards((guard,), (grant,)), Numbers())
    return (
        found
        | nft.lower_peer(parameters.network, parameters.layout)
        | nft.lower_nodes(["192.0.2.1"])
    )


async def _remedy(name: str) -> str:
    """What to do, by which extensions are missing."""
    if name == "nftables":
        return 'upgrade the kernel or nft (1.0.6 is known to work), or set backend = "iptables"'
    flavour = name.removeprefix("iptables-")
    with contextlib.suppress(MeshError):
        missing = await features.in_scratch(lambda: features.lacking(flavour))
        if missing:
            names = ", ".join(missing)
            return f'load the modules of {names} (xt_…, ip_set_…), or set backend = "nftables"'
    return f"see that iptables-{flavour} and ipset of one distribution are installed"


async def of_rules(subject: Subject, name: str, holding: Collection[str]) -> list[Check]:
    """What the backend holds on this host, and who else has rules of ours."""
    if not _may_look():
        return [check.warn("rules", "not read", AS_ROOT)]
    if name in holding:
        found = await _of_loaded(subject, name)
    elif subject.known is not None and subject.known.alive:
        found = [check.fail("rules", f"no rules of the mesh in {name}", "see the agent's log")]
    else:
        found = [check.ok("rules", "none yet: no agent has run here")]
    others = [other for other in holding if other != name]
    if others:
        fix = "start the agent again: it removes them; or `mesh agent --cleanup` with no agent"
        text = f"{', '.join(others)} holds rules of the mesh, too"
        found.append(check.warn("leftovers", text, fix))
    else:
        found.append(check.ok("leftovers", "no rules of another backend"))
    return [*found, await _of_witness(subject.parameters, holding)]


def _may_look() -> bool:
    try:
        host.check_rights()
    except HostNotReady:
        return False
    return True


async def _of_loaded(subject: Subject, name: str) -> list[Check]:
    try:
        examined = await backend.examine(name, subject.parameters)
    except (CommandFailed, HostNotReady, NotFound) as error:
        fix = "run `mesh doctor` as root; see the agent's log"
        return [check.fail("rules", str(error), fix)]
    return [_of_program(subject, name, examined), *_of_listeners(examined.elements)]


def _of_program(subject: Subject, name: str, examined: Examined) -> Check:
    count = f"{len(examined.elements)} elements in {name}"
    if not subject.numbered:
        return check.ok("rules", f"{count}; the program was not compared, for want of etcd")
    if not examined.differences:
        return check.ok("rules", f"{count}, the program is whole")
    first, more = examined.differences[0], len(examined.differences) - 1
    text = f"{first.about}: {first.message}{f' (and {more} more)' if more else ''}"
    return check.fail("rules", text, "see `mesh rules diff`; is the agent running?")


def _of_listeners(held: Elements) -> Iterator[Check]:
    """Published ports that a process of this host listens on, too: it hears nothing from there."""
    published = set(_published(held))
    sockets = {
        one
        for one in sockdiag.listening()
        if (one.protocol.number, one.port) in published and sockdiag.listener(one).meets(None)
    }
    if sockets:
        owners = sockdiag.owners({one.inode for one in sockets})
        taken = sorted(
            f"{one.port}/{one.protocol.value} ({sockdiag.listener(one, owners[one.inode]).owner})"
            for one in sockets
        )
        fix = "move the process or the service to another port"
        text = f"a process of this host listens on published ports: {', '.join(taken)}"
        yield check.warn("listeners", text, fix)
    else:
        yield check.ok("listeners", f"no process listens on a published port ({len(published)})")


def _published(held: Elements) -> Iterator[tuple[int, int]]:
    for name, key in held:
        if name.rstrip("46") in ("meshports", "ports"):
            yield key[0], int.from_bytes(key[4:6], "big")


async def _of_witness(parameters: Parameters, holding: Collection[str]) -> Check:
    """Whether python-iptables sees the same legacy tables; it sees no others."""
    asked = "iptables-legacy" in holding
    if not witness.is_installed():
        text, fix = "python-iptables is not installed", "pip install 'warren-mesh[witness]'"
        return check.warn("witness", text, fix) if asked else check.ok("witness", text)
    if not asked:
        return check.ok("witness", "no legacy tables of the mesh for python-iptables to read")
    try:
        compared = await witness.compare(parameters)
    except CommandFailed as error:
        fix = "see that python-iptables fits the installed libxtables"
        return check.warn("witness", f"python-iptables could not look: {error}", fix)
    if compared.disagreements:
        return check.fail("witness", *_told(compared.disagreements))
    return check.ok("witness", f"python-iptables sees the same {compared.rules} rules of ours")


def _told(lines: tuple[str, ...]) -> Iterator[str]:
    more = f" (and {len(lines) - _MOST} more)" if len(lines) > _MOST else ""
    yield f"{'; '.join(lines[:_MOST])}{more}"
    yield "compare iptables-legacy-save with `mesh rules show`; are there two iptables here?"

"""Which rule backend drives this host, and why; reading it; taking off what another one left.

`auto` takes nftables where the kernel and the tools have what the program needs, else the flavour
of iptables that the host already uses.
"""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, get_args

from mesh.dataplane import command, host, nfloaded, nfmessages, nfretire
from mesh.dataplane.iptables import IptablesDriver
from mesh.dataplane.nfnetlink import INET, Socket
from mesh.dataplane.nftables import NftablesDriver
from mesh.errors import CommandFailed, HostNotReady, NotFound
from mesh.model.cluster import Cluster
from mesh.rules.program import Parameters

if TYPE_CHECKING:
    from collections.abc import Collection, Container

    from mesh.dataplane.protocol import Driver, Examined
    from mesh.rules.elements import Elements
    from mesh.rules.marks import Layout
    from mesh.rules.program import Devices

log = logging.getLogger(__name__)

_LEGACY_TABLES: Final = Path("/proc/thread-self/net/ip_tables_names")
_IP: Final = 2

Flavour = Literal["legacy", "nft"]

NAMES: Final = (NftablesDriver.name, *(f"iptables-{flavour}" for flavour in get_args(Flavour)))
"""Every backend that can drive a host."""


class Chosen(NamedTuple):
    """A driver whose program is loaded, and why it is this one."""

    driver: Driver
    reason: str
    loaded: bool = False
    """Whether its program was not there, or not as it should be."""


def check(wanted: str) -> None:
    """Raise HostNotReady where only a program is missing: to install it beats falling back."""
    if wanted in ("auto", "nftables") and _has_nf_tables():
        host.check_program("nft", "nftables")


async def choose(wanted: str, parameters: Parameters) -> Chosen:
    """Load the program of the backend that `wanted` asks for.  Raises HostNotReady, CommandFailed.

    Only `auto` falls back, and says what was missing.
    """
    if wanted in ("auto", "nftables"):
        driver = None
        try:
            host.check_program("nft", "nftables")
            driver = NftablesDriver(parameters)
            loaded = await driver.prepare()
        except (CommandFailed, HostNotReady, OSError) as error:
            if driver is not None:
                driver.close()
            if wanted == "nftables":
                raise
            log.warning("backend=nftables cannot be used: %s", error)
            return await _iptables(await _used(), parameters, f"nftables cannot be used: {error}")
        reason = "configured" if wanted == "nftables" else "this kernel has nftables"
        return Chosen(driver, reason, loaded)
    if wanted == "iptables":
        return await _iptables(await _used(), parameters, "configured, in the host's flavour")
    flavour: Flavour = "legacy" if wanted == "iptables-legacy" else "nft"
    return await _iptables(flavour, parameters, "configured")


def in_force(reported: str | None, configured: str, holding: Collection[str]) -> str | None:
    """The backend that forwards, of what the agent reports, the configuration asks for, and the
    host's kernel holds rules of; None if nothing tells.  Pure.
    """
    told = [name for name in (reported, configured) if name in NAMES]
    held = [name for name in NAMES if name in holding]
    wanted = [name for name in held if name.startswith(configured)]
    return next((name for name in (*told, *wanted, *held) if name in held), next(iter(told), None))


async def expected(wanted: str) -> str:
    """The backend that `choose` would begin with.  Looks only.  Raises CommandFailed."""
    if wanted in NAMES:
        return wanted
    if wanted == "auto" and _has_nf_tables() and host.has_program("nft"):
        return NftablesDriver.name
    return f"iptables-{await _used()}"


async def holding(parameters: Parameters) -> tuple[str, ...]:
    """The backends that have rules of ours on this host; looks only."""
    with closing(Socket()) as netlink:
        found = [NftablesDriver.name] if (INET, nfmessages.TABLE) in _tables(netlink) else []
    return (*found, *(driver.name for driver in await _iptables_present(parameters)))


async def examine(name: str, parameters: Parameters) -> Examined:
    """What a backend holds on this host, and what of it somebody changed.

    Raises NotFound where there is nothing, HostNotReady or CommandFailed where it cannot be read.
    """
    made = driver(name, parameters)
    try:
        return await made.examine()
    finally:
        made.close()


def driver(name: str, parameters: Parameters) -> Driver:
    """The driver of that name, for the network namespace of the calling thread."""
    if name == NftablesDriver.name:
        return NftablesDriver(parameters)
    return IptablesDriver(parameters, "legacy" if name == "iptables-legacy" else "nft")


async def _iptables(flavour: Flavour, parameters: Parameters, reason: str) -> Chosen:
    for program, package in ((f"iptables-{flavour}-restore", "iptables"), ("ipset", "ipset")):
        host.check_program(program, package)
    driver = IptablesDriver(parameters, flavour)
    try:
        loaded = await driver.prepare()
    except BaseException:
        driver.close()
        raise
    return Chosen(driver, reason, loaded)


async def _used() -> Flavour:
    """The flavour whose tables exist; on a host without any, what `iptables` stands for."""
    if _has_legacy():
        return "legacy"
    with closing(Socket()) as netlink:
        if any(family == _IP and name in ("nat", "filter") for family, name in _tables(netlink)):
            return "nft"
    return "nft" if "nf_tables" in await command.run("iptables", "--version") else "legacy"


async def layout(parameters: Parameters) -> Layout | None:
    """How the rules that are on this host keep marks; None if there are none, or it cannot be
    told.  Whose rules they are does not matter to `parameters`.  Raises CommandFailed.
    """
    with closing(Socket()) as netlink:
        found = nfloaded.layout(netlink)
    for driver in await _iptables_present(parameters) if found is None else ():
        found = found or await driver.layout()
    return found


async def read_present(parameters: Parameters) -> Elements:
    """What all backends hold on this host; of one that is damaged, nothing."""
    return await _read(parameters, frozenset())


async def read_others(kept: Driver, parameters: Parameters) -> Elements:
    """What backends other than `kept` hold on this host, or its own program before this one; of
    one that is damaged, nothing.
    """
    found = await _read(parameters, frozenset((kept.name,)))
    return found | kept.predecessor() if isinstance(kept, NftablesDriver) else found


async def _read(parameters: Parameters, kept: Container[str]) -> Elements:
    found: Elements = {}
    drivers: list[Driver] = [*await _iptables_present(parameters)]
    with closing(Socket()) as netlink:
        if (INET, nfmessages.TABLE) in _tables(netlink):
            drivers.append(NftablesDriver(parameters))
    for driver in drivers:
        try:
            if driver.name not in kept:
                found |= await driver.read()
        except (CommandFailed, HostNotReady, NotFound) as error:
            log.warning("backend=%s cannot be read: %s", driver.name, error)
        finally:
            driver.close()
    return found


async def retire_others(kept: Driver, parameters: Parameters) -> None:
    """Remove what backends other than `kept` left on this host, once `kept` forwards.

    Both may be there at once: the first to translate a connection settles it.
    """
    with closing(Socket()) as netlink:
        ours = {(INET, nfmessages.TABLE), (INET, nfretire.STAND_IN)}
        for _, name in ours & set(_tables(netlink)) if kept.name != NftablesDriver.name else ():
            await nfretire.retire(netlink, name)
            log.info("backend=nftables table=%s removed, %s forwards", name, kept.name)
    for driver in await _iptables_present(parameters):
        if driver.name == kept.name:
            continue
        if isinstance(kept, IptablesDriver):
            await driver.remove_chains()
            await kept.prepare()  # what only the other flavour's chains used can go now
        else:
            await driver.remove()
        log.info("backend=%s removed, %s forwards", driver.name, kept.name)


async def remove_all(devices: Devices) -> None:
    """Take the rules of every backend off this host.  Raises CommandFailed or HostNotReady."""
    with closing(Socket()) as netlink:
        nfretire.remove(netlink)
    await remove_iptables(anybody(devices))


async def remove_iptables(parameters: Parameters) -> None:
    """Take the chains and sets of every flavour off this host.  Raises CommandFailed."""
    drivers = await _iptables_present(parameters)
    for driver in drivers:
        await driver.remove_chains()
    for driver in drivers[:1]:
        await driver.remove()


def anybody(devices: Devices) -> Parameters:
    """What serves to find and to remove: names of chains and sets are the same for every node."""
    return Parameters.of(Cluster(id="any", prefix6="fd00::/48"), 1, devices)


async def _iptables_present(parameters: Parameters) -> list[IptablesDriver]:
    """The flavours that have chains of ours.  Without its programs nobody made any."""
    with closing(Socket()) as netlink:
        has_nft = (_IP, "mangle") in _tables(netlink)
    flavours: tuple[tuple[Flavour, bool], ...] = (("legacy", _has_legacy()), ("nft", has_nft))
    there = (f for f, used in flavours if used and host.has_program(f"iptables-{f}-save"))
    drivers = [IptablesDriver(parameters, flavour) for flavour in there]
    return [driver for driver in drivers if await driver.exists()]


def _has_nf_tables() -> bool:
    try:
        with closing(Socket()) as netlink:
            nfmessages.tables(netlink)
    except PermissionError:
        return True  # who may not ask is not told; most kernels have it
    except OSError:
        return False
    return True


def _has_legacy() -> bool:
    """Looks only: to ask iptables-legacy for a table would create it."""
    try:
        return bool(_LEGACY_TABLES.read_text(encoding="ascii").split())
    except OSError:
        return False


def _tables(netlink: Socket) -> list[tuple[int, str]]:
    try:
        return nfmessages.tables(netlink)
    except OSError:  # a kernel without nf_tables
        return []

"""Every driver that makes this kernel forward, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mesh.dataplane.iptables import IptablesDriver
from mesh.dataplane.nftables import NftablesDriver

if TYPE_CHECKING:
    from mesh.dataplane.protocol import Driver, ElementDelta
    from mesh.rules.program import Parameters

KERNEL: Final = ("nftables", "iptables-legacy", "iptables-nft")


def make(name: str, parameters: Parameters) -> Driver:
    """A driver for the network namespace of the calling thread."""
    match name:
        case "nftables":
            return NftablesDriver(parameters)
        case "iptables-legacy":
            return IptablesDriver(parameters, "legacy")
        case "iptables-nft":
            return IptablesDriver(parameters, "nft")
    raise AssertionError(name)


async def load(driver: Driver, change: ElementDelta) -> None:
    """Have packets meet a program with these elements, as an agent's start does."""
    await driver.prepare()
    await driver.apply(change)
    await driver.attach()

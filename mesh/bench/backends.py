"""The drivers that are measured, on node 1 of the synthetic cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mesh.bench import records
from mesh.dataplane.iptables import IptablesDriver
from mesh.dataplane.nftables import NftablesDriver
from mesh.rules.program import Devices, Parameters

if TYPE_CHECKING:
    from mesh.dataplane.protocol import Driver

DEVICES: Final = Devices(
    "warren0", "warren-x0", "warren-br0", records.CLUSTER.network(1).bridge_mac
)


def parameters() -> Parameters:
    """What node 1 of the synthetic cluster says in its program."""
    return Parameters.of(records.CLUSTER, 1, DEVICES)


def driver(name: str) -> Driver:
    """A driver for the network namespace of the calling thread."""
    match name:
        case "nftables":
            return NftablesDriver(parameters())
        case "iptables-legacy":
            return IptablesDriver(parameters(), "legacy")
        case "iptables-nft":
            return IptablesDriver(parameters(), "nft")
    raise AssertionError(name)

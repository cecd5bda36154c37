"""The drivers that are measured, on nodes of the synthetic cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mesh.bench import records
from mesh.dataplane.iptables import IptablesDriver
from mesh.dataplane.nftables import NftablesDriver
from mesh.rules.program import Devices, Parameters

if TYPE_CHECKING:
    from mesh.dataplane.protocol import Driver


def devices(number: int = 1) -> Devices:
    """The devices of a node of the synthetic cluster."""
    mac = records.CLUSTER.network(number).bridge_mac
    return Devices("warren0", "warren-x0", "warren-br0", mac)


DEVICES: Final = devices()


def parameters(number: int = 1) -> Parameters:
    """What a node of the synthetic cluster says in its program."""
    return Parameters.of(records.CLUSTER, number, devices(number))


def driver(name: str, number: int = 1) -> Driver:
    """A driver for the network namespace of the calling thread, on that node."""
    said = parameters(number)
    match name:
        case "nftables":
            return NftablesDriver(said)
        case "iptables-legacy":
            return IptablesDriver(said, "legacy")
        case "iptables-nft":
            return IptablesDriver(said, "nft")
    raise AssertionError(name)

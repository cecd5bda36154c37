"""A node: its identity in the cluster and what operators want of it."""

from __future__ import annotations

import enum

import msgspec

from mesh.model.address import parse_address
from mesh.model.names import check_name


class Role(enum.Enum):
    """Managers may be elected to allocate; every node forwards."""

    MANAGER = "manager"
    WORKER = "worker"


class Node(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a node's agent tells the others.

    `endpoints` are "address:port" where WireGuard answers, best first; `addresses` are all
    addresses of the host, on which published ports answer.
    """

    name: str
    role: Role
    public_key: str
    endpoints: tuple[str, ...]
    addresses: tuple[str, ...]
    labels: dict[str, str] = {}

    def __post_init__(self) -> None:
        check_name(self.name, "node")
        if len(self.public_key) != 44 or not self.public_key.endswith("="):
            raise ValueError("publicKey is not a WireGuard key (44 characters of base64)")
        for endpoint in self.endpoints:
            split_endpoint(endpoint)
        for address in self.addresses:
            if parse_address(address) != address:
                raise ValueError(f"address {address!r}: write {parse_address(address)!r}")


def split_endpoint(text: str) -> tuple[str, int]:
    """Address and port of "192.0.2.1:51820" or "[2001:db8::1]:51820".  Raises ValueError."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"endpoint {text!r} does not end in a port")
    if host.startswith("[") != host.endswith("]") or (":" in host) != host.startswith("["):
        raise ValueError(f"endpoint {text!r}: write an IPv6 address in brackets")
    return parse_address(host.strip("[]")), int(port)

"""What is measured, by name; imports nothing, for the command line needs it to print its help."""

from __future__ import annotations

from typing import Final

BACKENDS: Final = ("nftables", "iptables-legacy", "iptables-nft")
"""The rule backends, as the agent's configuration calls them."""

MOST: Final = 60000
"""Services, at most: each has an ingress port of its own."""

LIMIT: Final = 10000
"""Services up to which iptables, and rules that are a list, are measured unless asked for more:
what costs seconds there costs many minutes at 50 000."""


def is_slow(backend: str, services: int) -> bool:
    """Whether so many services take minutes with this backend, or with kube-proxy's rules."""
    return backend != "nftables" and services > LIMIT

"""What is measured, by name; imports nothing, for the command line needs it to print its help."""

from __future__ import annotations

from typing import Final

BACKENDS: Final = ("nftables", "iptables-legacy", "iptables-nft")
"""The rule backends, as the agent's configuration calls them."""

CHECKS: Final = ("tcp", "http", "exec")
"""Types of health checks."""

MOST: Final = 60000
"""Services, at most: each has an ingress port of its own."""

KUBE_PROXY: Final = "kube-proxy "
"""Before the name of a backend: kube-proxy's rules for it."""

LIMIT: Final = 10000
"""Services up to which rules that take long to load are measured, unless asked for more: what
takes seconds with them takes many minutes with 50 000."""

_LIMITS: Final = {f"{KUBE_PROXY}iptables-nft": 1000}
"""iptables-restore of the nft flavour is quadratic: six minutes with 10 000 services."""


def is_slow(rules: str, services: int) -> bool:
    """Whether so many services take minutes with this backend, or with kube-proxy's rules."""
    return rules != "nftables" and services > _LIMITS.get(rules, LIMIT)


def case(rules: str, services: int | None) -> str:
    """As progress and errors call it."""
    return rules if services is None else f"{rules}, {services} services"

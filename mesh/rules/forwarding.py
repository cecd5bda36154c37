"""Forwardings: the only thing the rule engine knows.  A frontend, a pool, and their policies.

Frontends and backends are structs: made four times as fast as named tuples, ten for each change.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import msgspec

from mesh.model.publish import Protocol
from mesh.model.service import WHOLE_ADDRESS, Affinity, AffinityPrefix, Source


class Scope(enum.Enum):
    """Where a frontend answers."""

    __hash__ = object.__hash__  # a member is one object; Enum's own hash is a Python call

    VIP = "vip"
    """On one virtual address that no host has."""
    HOST_IP = "host-ip"
    """On one local address; beats INGRESS and NODE there."""
    INGRESS = "ingress"
    """On every local address of every node; the same meaning cluster-wide."""
    NODE = "node"
    """On every local address of this node only."""


class Frontend(msgspec.Struct, frozen=True, gc=False):
    """What a packet is matched on.  `address` is None for INGRESS and NODE, in both families."""

    scope: Scope
    address: str | None
    protocol: Protocol
    port: int


class Backend(msgspec.Struct, frozen=True, order=True, gc=False):
    """One address and port that may be chosen, `weight` times as often as one of weight 1."""

    address: str
    port: int
    weight: int = 1


class Forwarding(NamedTuple):
    """Frontends that share one pool.

    `key` is stable for the life of the pool ("service/target/protocol"); the engine derives the
    frontend id in conntrack marks from it.  No backend of a family: refused at once there.
    `prefix` is how much of a client's address its affinity goes by.
    `limit` is how many connections at a time a client may have here; 0: as many as it likes.
    """

    key: str
    frontends: tuple[Frontend, ...]
    backends: tuple[Backend, ...]
    affinity: Affinity = Affinity.NONE
    source: Source = Source.PRESERVE
    allow: tuple[str, ...] = ()
    prefix: AffinityPrefix = WHOLE_ADDRESS
    limit: int = 0

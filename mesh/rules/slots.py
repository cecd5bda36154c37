"""Which backend sits in which slot of a pool.  Pure: same backends, same slots, on every node."""

from __future__ import annotations

import hashlib
from functools import reduce
from math import gcd
from typing import TYPE_CHECKING, Final

from mesh.rules.marks import MAX_SLOTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mesh.rules.forwarding import Backend

HASH_SIZES: Final = (61, 251, 1021)
"""Slot counts of client-affine pools: primes, so that jhash spreads evenly (program.md 2)."""


def weighted(backends: Sequence[Backend]) -> list[Backend]:
    """Slots for a random draw: each backend as often as its weight, exactly.

    Weights are divided by their common divisor.  Where that still leaves more than 1023 slots,
    they are scaled down to fit, and no backend of positive weight is left out.
    """
    live = sorted(b for b in backends if b.weight > 0)
    if not live:
        return []
    divisor = reduce(gcd, (b.weight for b in live))
    counts = [b.weight // divisor for b in live]
    if sum(counts) > MAX_SLOTS:
        live = live[:MAX_SLOTS]
        counts = _scaled([b.weight for b in live])
    return [b for b, count in zip(live, counts, strict=True) for _ in range(count)]


def _scaled(weights: list[int]) -> list[int]:
    """Counts in proportion to `weights`, each at least 1, that sum to at most MAX_SLOTS."""
    room, total = MAX_SLOTS - len(weights), sum(weights)
    return [1 + weight * room // total for weight in weights]


def hashed(backends: Sequence[Backend]) -> list[Backend]:
    """Slots for a draw by client address: filled by weighted rendezvous, so that losing one of n
    backends moves only its own clients (Thaler and Ravishankar, 1998).
    """
    live = sorted(b for b in backends if b.weight > 0)[:MAX_SLOTS]
    if not live:
        return []
    size = next((s for s in HASH_SIZES if s >= 20 * len(live)), HASH_SIZES[-1])
    seeds = [(b, f"{b.address}/{b.port}/".encode()) for b in live]
    return [max(seeds, key=lambda pair: _score(pair, slot))[0] for slot in range(size)]


def _score(pair: tuple[Backend, bytes], slot: int) -> float:
    backend, seed = pair
    digest = hashlib.blake2b(seed + slot.to_bytes(2, "big"), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
    # Highest uniform ** (1 / weight) wins with probability proportional to weight.
    return float(uniform ** (1.0 / backend.weight))

"""Which backend sits in which slot of a pool.  Pure: same backends, same slots, on every node."""

from __future__ import annotations

import hashlib
import struct
from array import array
from functools import lru_cache, reduce
from math import gcd
from typing import TYPE_CHECKING, Final

from mesh.model.address import Family
from mesh.rules.marks import MAX_SLOTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mesh.rules.forwarding import Backend

HASH_SIZES: Final = (251, 1021)
"""Slot counts of client-affine pools, less how many steps the prefix that counts is shorter than an
address: the count tells that, too, wherever a packet is, and a hash is spread evenly over any."""

_STEPS: Final = 32
_STEP: Final = {Family.V4: 1, Family.V6: 4}
"""Bits of a step in each family."""

_SLOTS_EACH: Final = 20
"""A backend's share of clients then strays from the fair one by a fifth at most, typically."""


def weighted(backends: Sequence[Backend]) -> list[Backend]:
    """Slots for a random draw: each backend as often as its weight, exactly.

    Weights are divided by their common divisor.  Where that still leaves more than 1023 slots,
    they are scaled down to fit, and no backend of positive weight is left out.
    """
    live = sorted([b for b in backends if b.weight > 0])
    weights = {b.weight for b in live}
    if len(weights) <= 1:
        return live[:MAX_SLOTS]
    divisor = reduce(gcd, weights)
    counts = [b.weight // divisor for b in live]
    if sum(counts) > MAX_SLOTS:
        live = live[:MAX_SLOTS]
        counts = _scaled([b.weight for b in live])
    return [b for b, count in zip(live, counts, strict=True) for _ in range(count)]


def _scaled(weights: list[int]) -> list[int]:
    """Counts in proportion to `weights`, each at least 1, that sum to at most MAX_SLOTS."""
    room, total = MAX_SLOTS - len(weights), sum(weights)
    return [1 + weight * room // total for weight in weights]


def steps(length: int, family: Family) -> int:
    """How many slots a pool has less, where a prefix of this length ties a client to a backend."""
    return (family.bits - length) // _STEP[family]


def prefix_length(count: int, family: Family) -> int:
    """How much of a client's address counts where a client-affine pool has `count` slots."""
    less = next((size - count for size in HASH_SIZES if 0 <= size - count < _STEPS), 0)
    return family.bits - less * _STEP[family]


def hashed(backends: Sequence[Backend], less: int = 0) -> list[Backend]:
    """Slots for a draw by client address: filled by weighted rendezvous, so that losing one of n
    backends moves only its own clients (Thaler and Ravishankar, 1998).

    Between 12 and 13 backends the number of slots changes, and with it most clients' backend.
    There are so many `less` as `steps` says.
    """
    live = sorted(b for b in backends if b.weight > 0)[:MAX_SLOTS]
    if not live:
        return []
    size = next((s for s in HASH_SIZES if s >= _SLOTS_EACH * len(live)), HASH_SIZES[-1])
    size -= less
    best, *others = live
    chosen, highest = [best] * size, list(_scores(best)[:size])
    for backend in others:
        for slot, score in enumerate(_scores(backend)[:size]):
            if score > highest[slot]:
                chosen[slot], highest[slot] = backend, score
    return chosen


@lru_cache(maxsize=2048)  # 8 kB each; the backends of a pool are scored again at each change
def _scores(backend: Backend) -> array[float]:
    """How strongly a backend claims each slot: uniform ** (1 / weight), of which the highest wins
    with probability proportional to weight.
    """
    count = HASH_SIZES[-1]
    seed = f"{backend.address}/{backend.port}".encode()
    draws = struct.unpack(f">{count}Q", hashlib.shake_128(seed).digest(8 * count))
    return array("d", ((draw / 2**64) ** (1.0 / backend.weight) for draw in draws))

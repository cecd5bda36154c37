"""Which slot `jhash` draws for a client.  Pure: the kernel's arithmetic, for the tracer.

Bob Jenkins' lookup3 as in linux/jhash.h, on a little-endian machine, and the scaling of
net/netfilter/nft_hash.c.
"""

from __future__ import annotations

import struct
from typing import Final

_INITIAL: Final = 0xDEADBEEF
_WORD: Final = 0xFFFFFFFF
_MIX: Final = ((0, 2, 4), (1, 0, 6), (2, 1, 8), (0, 2, 16), (1, 0, 19), (2, 1, 4))
_FINAL: Final = (
    (2, 1, 14),
    (0, 2, 11),
    (1, 0, 25),
    (2, 1, 16),
    (0, 2, 4),
    (1, 0, 14),
    (2, 1, 24),
)


def slot(key: bytes, seed: int, slots: int) -> int:
    """The slot among `slots` that the kernel draws for `key`, an address of 4 or 16 bytes."""
    return jhash(key, seed) * slots >> 32


def jhash(key: bytes, seed: int) -> int:
    """The kernel's 32-bit hash of `key`, which is not empty and of whole words."""
    state = [(_INITIAL + len(key) + seed) & _WORD] * 3
    words = struct.unpack(f"<{len(key) // 4}I", key)
    while len(words) > 3:
        _add(state, words[:3])
        for target, other, bits in _MIX:
            # mix: a -= c; a ^= rol(c, 4); c += b
            state[target] = ((state[target] - state[other]) & _WORD) ^ _rotated(state[other], bits)
            third = 3 - target - other
            state[other] = (state[other] + state[third]) & _WORD
        words = words[3:]
    _add(state, words)
    for target, other, bits in _FINAL:
        # final: c ^= b; c -= rol(b, 14)
        state[target] = ((state[target] ^ state[other]) - _rotated(state[other], bits)) & _WORD
    return state[2]


def _add(state: list[int], words: tuple[int, ...]) -> None:
    for index, word in enumerate(words):
        state[index] = (state[index] + word) & _WORD


def _rotated(word: int, bits: int) -> int:
    return (word << bits | word >> 32 - bits) & _WORD

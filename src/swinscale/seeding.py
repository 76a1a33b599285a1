"""Random numbers that depend on what they are for, never on when they are drawn.

Each random choice takes its seed from names and counters: a sample's augmentation from (seed, epoch, index), a step's
stochastic depth from (seed, step, rank). A run that is killed and resumed therefore repeats itself bit for bit, with any
number of loader workers, and nothing about random states has to be stored.
"""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part and its place."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

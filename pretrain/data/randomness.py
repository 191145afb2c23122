"""Random numbers that depend on nothing but their key.

Every draw for a sample is a pure function of (seed, set, epoch, position, repeat, purpose), so that it is the same on
any rank, in any worker, and after any restart. Numbers are raw words of Philox (Salmon et al., 2011, "Parallel random
numbers: as easy as 1, 2, 3"): numpy guarantees the words of a bit generator for ever, but not the methods of
`numpy.random.Generator`.
"""

import hashlib
from typing import Literal

import numpy as np

Purpose = Literal[
    "time", "crop", "flip", "augment", "mask", "decoder_mask", "drop", "substitute", "shards", "lane", "window"
]


def key_for(*parts: int | str) -> int:
    """Returns a 128-bit Philox key for a tuple of integers and strings, alike on every machine."""
    content = "\x1f".join(f"str:{part}" if isinstance(part, str) else f"int:{int(part)}" for part in parts)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=16).digest(), "little")


def sample_key(seed: int, set_number: int, epoch: int, position: int, repeat: int, purpose: Purpose) -> int:
    """Returns the key of one purpose of one clip; repeats that share frames pass `repeat=0` for `time`."""
    return key_for(seed, set_number, epoch, position, repeat, purpose)


def seed_of_set(seed: int, set_number: int) -> int:
    """Returns the seed of the order of one set of a mixture; the first has the run's."""
    return key_for(seed, set_number, "set") % 2**63 if set_number else seed


def raw_words(key: int, count: int) -> np.ndarray:
    """Returns `count` unsigned 64-bit words of the Philox stream of `key`."""
    return np.random.Philox(key=key).random_raw(count)


def uniform(key: int, count: int = 1) -> np.ndarray:
    """Returns `count` doubles in [0, 1), with 53 random bits each."""
    return (raw_words(key, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(key: int, count: int) -> np.ndarray:
    """Returns a random order of 0 .. count - 1: the positions that sort `count` raw words, the first of equals first.

    Each position stands in the low bits of its word, since numpy takes half the time to sort numbers that it takes to
    argsort them; where words differ in these bits alone, they are sorted whole.
    """
    words = raw_words(key, count)
    low_bits = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    packed = (words & ~low_bits) | np.arange(count, dtype=np.uint64)
    packed.sort()
    positions = (packed & low_bits).view(np.int64)
    packed &= ~low_bits
    return np.argsort(words, kind="stable") if np.any(packed[1:] == packed[:-1]) else positions


def torch_seed(key: int) -> int:
    """Returns the part of a key that fits `torch.Generator.manual_seed` and `random.seed`."""
    return key % 2**63

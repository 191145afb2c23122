"""A part of a shard set as a set of its own: a split that packing noted, the samples of a list of keys, or any others.

The shards stay as they are, so that videos are packed once for all splits and folds. Samples are numbered anew, in the
order of the set; reading, the order of a run and resuming know no difference.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.class_names import read_lines
from pretrain.data.shards import ShardSet
from pretrain.errors import Refused
from pretrain.files import write_text


class Subset(ShardSet):
    """Some samples of a shard set.

    Its fingerprint is a hash of the set's and of the keys, so that a run goes on with the same samples only.

    Args:
        whole: The set; it must not be a subset itself.
        numbers: Sample numbers in it, in any order.
        split: What part of the set this is, for logs and records.
    """

    def __init__(self, whole: ShardSet, numbers: Iterable[int], split: str) -> None:
        """Reads the keys from the set's `.idx` files; opens no shard."""
        self.__setstate__(whole.__getstate__())
        self.whole = whole
        self.numbers = np.unique(np.fromiter(numbers, dtype=np.int64))
        self.split = split
        ends = np.searchsorted(self.numbers, np.cumsum([0, *whole.samples_per_shard]))
        self.samples_per_shard = tuple(np.diff(ends).tolist())
        self.samples = len(self.numbers)
        digest = hashlib.sha256(whole.fingerprint.encode())
        for key in self.keys():
            digest.update(f"\0{key}".encode(errors="surrogatepass"))
        self.fingerprint = digest.hexdigest()

    def locate(self, number: int) -> tuple[int, int]:
        """Returns the shard of a sample and the sample's row in its index, both counted from zero.

        Raises:
            IndexError: There is no sample of that number.
        """
        if not 0 <= number < self.samples:
            raise IndexError(f"sample {number} of {self.samples} in {self.split} of {self.folder}")
        return self.whole.locate(int(self.numbers[number]))

    def keys(self) -> list[str]:
        """Returns the key of every sample, in order of sample number."""
        return self._chosen(super().keys())

    def splits(self) -> list[str]:
        """Returns for every sample the names of the splits that it is in, with spaces between."""
        return self._chosen(super().splits())

    def labels(self) -> list[int]:
        """Returns the label of every sample, in order of sample number; raises `Refused` if there are none."""
        return self._chosen(super().labels())

    def label_lists(self) -> list[tuple[int, ...]]:
        """Returns the labels of every sample, one or any number; raises `Refused` if there are none."""
        return self._chosen(super().label_lists()) if self.multi_label else super().label_lists()

    def _chosen(self, values: list[Any]) -> list[Any]:
        return [values[number] for number in self.numbers.tolist()]


def split_of(shards: ShardSet, split: str) -> Subset:
    """Returns a split of a set.

    Args:
        shards: The set.
        split: The name of a split that packing noted, or a file with one key a line.

    Raises:
        Refused: There is no such split and no such file, or the file names samples that the set does not hold, or none.
    """
    splits = [names.split() for names in shards.splits()]
    numbers = [number for number, names in enumerate(splits) if split in names]
    if numbers:
        return Subset(shards, numbers, split)
    if os.path.isfile(split):
        return Subset(shards, _listed(shards, Path(split)), split)
    held = sorted({name for names in splits for name in names})
    remedy = f"use one of {', '.join(held)}" if held else "pack with --split all, which notes the splits of a data set"
    raise Refused(f"{split} is no split of {shards.folder} and no file; {remedy}, or give a file with one key a line")


def common_samples(one: ShardSet, other: ShardSet) -> int:
    """Returns how many samples two parts of one set, or the set and a part of it, have in common; 0 of two sets."""
    (whole, numbers), (other_whole, other_numbers) = whole_and_numbers(one), whole_and_numbers(other)
    return len(np.intersect1d(numbers, other_numbers)) if whole.fingerprint == other_whole.fingerprint else 0


def whole_and_numbers(shards: ShardSet) -> tuple[ShardSet, np.ndarray]:
    """Returns the set that a set is, or is a part of, and the numbers of its samples there."""
    return (shards.whole, shards.numbers) if isinstance(shards, Subset) else (shards, np.arange(shards.samples))


def write_keys(path: Path, shards: ShardSet) -> None:
    """Writes the keys of a set, one a line, as `split_of` reads them."""
    keys = shards.keys()
    write_text(path, "".join(f"{key}\n" for key in keys))


def _listed(shards: ShardSet, path: Path) -> list[int]:
    keys = [key for line in read_lines(path) if (key := line.strip())]
    if not keys:
        raise Refused(f"{path}: names no sample; write one key a line")
    numbers = {key: number for number, key in enumerate(shards.keys())}
    strange = [key for key in keys if key not in numbers]
    if strange:
        raise Refused(
            f"{path}: {len(strange)} of its {len(keys)} keys are not in {shards.folder}, such as {strange[0][:80]}; "
            "give a list of this set's keys"
        )
    return [numbers[key] for key in keys]

"""Parts of a pack: which shards each takes, so that several nodes pack one set at the same time."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from pretrain.errors import Refused

Shard = TypeVar("Shard")


@dataclasses.dataclass(frozen=True)
class Part:
    """Part `number` of `parts`, counted from 0: every `parts`-th shard of the plan, from shard `number` on."""

    number: int
    parts: int

    def share(self, shards: Sequence[Shard]) -> Sequence[Shard]:
        """Returns the shards of this part; none for some parts if there are more parts than shards."""
        return shards[self.number :: self.parts]

    def __str__(self) -> str:
        return f"{self.number}/{self.parts}"


def parse_part(text: str) -> Part:
    """Reads `I/N`.

    Raises:
        Refused: It is no part.
    """
    numbers = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text, re.ASCII)
    if numbers is None:
        raise Refused(f"part: {text} does not do; use I/N, such as 0/16 for the first of 16 parts")
    part = Part(int(numbers[1]), int(numbers[2]))
    if part.number >= part.parts:
        last = f"0/{part.parts} to {part.parts - 1}/{part.parts}" if part.parts else "at least one part"
        raise Refused(f"part: {text} does not do; parts count from 0, so use {last}")
    return part


def listed(numbers: Iterable[int]) -> str:
    """Returns numbers as SLURM's `--array` takes them: `0,3-5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)

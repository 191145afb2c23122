"""Segments: the stretches of time that are cut out of a video, each a sample of its own."""

import dataclasses
from fractions import Fraction

SHORTEST_REMAINDER = Fraction(1, 4)
"""Share of a segment's length below which what is left at the end of a video is dropped."""


@dataclasses.dataclass(frozen=True, order=True)
class Segment:
    """A stretch of a video in milliseconds from its first frame; the end is not part of it."""

    start_ms: int
    end_ms: int

    @property
    def start_s(self) -> Fraction:
        """The start in seconds."""
        return Fraction(self.start_ms, 1000)

    @property
    def end_s(self) -> Fraction:
        """The end in seconds."""
        return Fraction(self.end_ms, 1000)

    def __str__(self) -> str:
        return f"{self.start_ms / 1000:g} to {self.end_ms / 1000:g} s"


def consecutive_segments(whole: Segment, longest_ms: int) -> list[Segment]:
    """Cuts a stretch into consecutive segments of `longest_ms` milliseconds.

    What is left at its end is a shorter segment, and is dropped if it is shorter than a quarter of the others. A
    stretch no longer than `longest_ms` stays as it is.
    """
    starts = range(whole.start_ms, whole.end_ms, longest_ms)
    segments = [Segment(start_ms, min(start_ms + longest_ms, whole.end_ms)) for start_ms in starts]
    last = segments[-1]
    too_short = last.end_ms - last.start_ms < SHORTEST_REMAINDER * longest_ms
    return segments[:-1] if too_short and len(segments) > 1 else segments

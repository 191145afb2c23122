"""Whether this node can decode, and can read samples of a set: a look before a job, where `check` reads everything."""

from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

from pretrain.data.mp4_encoder import Mp4Encoder
from pretrain.data.remote import RemoteFolder
from pretrain.data.shards import ShardSet
from pretrain.data.video import DecoderName, open_video
from pretrain.errors import BadSample, TubeletError

FRAMES = 4
SIDE = 32
TOLERANCE = 8
"""How far the mean of a decoded grey frame may lie from what was encoded, of 255."""


def check_decoder(decoder: DecoderName) -> None:
    """Encodes a small video and decodes it again.

    Raises:
        TubeletError: The decoder fails or gives other frames.
        Refused: The decoder is not installed.
    """
    greys = [40 * (number + 1) for number in range(FRAMES)]
    encoder = Mp4Encoder((SIDE, SIDE), Fraction(8), gop=2)
    for grey in greys:
        encoder.write(av.VideoFrame.from_ndarray(np.full((SIDE, SIDE, 3), grey, np.uint8), format="rgb24"))
    remedy = "install PyAV, decord2 or torchcodec again, or name another data.decoder"
    try:
        frames = open_video(encoder.finish().video, decoder).read(np.arange(FRAMES))
    except BadSample as error:
        raise TubeletError(f"data.decoder: {decoder} fails on a video made just now ({error}); {remedy}") from None
    if np.abs(frames.mean((1, 2, 3)) - greys).max() > TOLERANCE:
        raise TubeletError(f"data.decoder: {decoder} gives other frames than were encoded; {remedy}")


def read_one_sample(shards: ShardSet, decoder: DecoderName, place: int, places: int) -> str:
    """Reads and decodes one sample of a set; of a set behind a URL, only the index of the shard that holds it.

    Args:
        shards: The set.
        decoder: Who decodes.
        place: Which of `places` samples, spread over the set, so that ranks read different shards.
        places: How many ranks read one.

    Returns:
        What was done, for a person.

    Raises:
        Refused: An index is missing or was changed.
        TubeletError: The sample cannot be read or decoded.
    """
    number = shards.samples * place // places
    shard, row = shards.locate(number)
    name = shards.shards[shard].name
    if isinstance(shards.folder, RemoteFolder):
        shards.shard_index(shard)
        return f"the index of {name} was read"
    try:
        open_video(shards.read(number).video, decoder).read(np.arange(1))
    except BadSample as error:
        key = shards.shard_index(shard).keys[row]
        raise TubeletError(
            f"{shards.folder / name}: sample {key}: {error}; `tubelet check {shards.folder}` lists all that is damaged"
        ) from None
    return f"a sample of {name} was decoded"


def describe_sets(sets: Sequence[ShardSet]) -> str:
    """Returns how much a run reads."""
    samples, size_bytes = sum(one.samples for one in sets), sum(shard.bytes for one in sets for shard in one.shards)
    return f"{samples} samples in {sum(len(one.shards) for one in sets)} shards, {size_bytes / 2**30:.1f} GiB"

"""The two indexes of a shard set as they lie on the disk: an entry per shard in `index.json`, and `SHARD.idx`."""

import dataclasses
import json
import posixpath
from collections.abc import Sequence
from pathlib import Path

FORMAT_VERSION = 1
INDEX_NAME = "index.json"


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """What `index.json` says of one shard: its file name, size in bytes, samples, and both hashes."""

    name: str
    bytes: int
    sha256: str
    samples: int
    index_sha256: str

    @property
    def index_name(self) -> str:
        """The file name of the shard's own index: `shard-000000.idx` for `shard-000000.tar`."""
        return str(Path(self.name).with_suffix(".idx"))


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """What `SHARD.idx` says of the samples of one shard, column by column; offsets and sizes in bytes.

    `checksums` are CRC-32s over the stretch of the tar that a read takes: from where the JSON's bytes start to where
    the video's end. `heights` and `widths` are those of the stored frames, in pixels; None in an index that was written
    before it told them.
    """

    keys: Sequence[str]
    labels: Sequence[int] | None
    frames: Sequence[int]
    frame_rates: Sequence[float]
    metadata_offsets: Sequence[int]
    metadata_sizes: Sequence[int]
    video_offsets: Sequence[int]
    video_sizes: Sequence[int]
    checksums: Sequence[int]
    heights: Sequence[int] | None = None
    widths: Sequence[int] | None = None

    def to_bytes(self) -> bytes:
        """Returns the content of the `.idx` file; equal indexes give equal bytes."""
        return (json.dumps(dataclasses.asdict(self), separators=(",", ":")) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "ShardIndex":
        """Reads what `to_bytes` wrote."""
        return cls(**json.loads(content))


def key_and_suffix(name: str) -> tuple[str, str]:
    """Splits the name of a tar's member as webdataset does: at the first dot of its last part; suffix in lower case."""
    folder, base = posixpath.split(name)
    key, _, suffix = base.partition(".")
    return posixpath.join(folder, key), suffix.lower()

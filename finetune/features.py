"""Frozen features, computed once and kept: a second call reads them and computes nothing.

    FOLDER/KEY/key.json             what the features are of, as a person reads it
    FOLDER/KEY/part-00003.safetensors   the features of videos 600 to 799

The key is a hash of all that the features depend on: the encoder's weights and architecture, the set's fingerprint, the
clips and their views. A part is written aside and renamed, and carries the hash of what it holds; one that is damaged
is computed again. So an interrupted call loses at most the part that each process was computing. Of several processes
each computes some of the missing parts, into a folder that they share. A part with videos that could not be decoded is
computed again too, since what kept them from it may be mended.

Mean-pooled features take 4 bytes a channel, tokens 2: a view of 16 x 224 x 224 through ViT-B takes 3 kB or 2.4 MB.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from finetune.config import ViewsConfig
from pretrain.data.clips import ClipConfig
from pretrain.data.decode_client import DECODE_LIMIT_S
from pretrain.data.shards import ShardSet
from pretrain.data.video import DecoderName
from pretrain.data.views import EvaluationViews, Views
from pretrain.engine.distributed import Processes
from pretrain.errors import DiskFull, Refused, StoppedByRule
from pretrain.features import VideoFeatures, encode_videos, joined_features, mean_features_by
from pretrain.files import is_out_of_space, write_bytes, write_json
from pretrain.model.encoder import Encoder
from pretrain.weights import encoder_from, find_encoder, fit_to_clips, load_encoder, load_encoder_weights

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
VIDEOS_IN_PART = 200
ABANDONED_AFTER_S = 3600
"""Age of a file half written by a call that was killed; a younger one may be another call's, which is writing it."""
GIB = 2**30

FeatureKind = Literal["mean", "tokens"]
"""Mean-pooled features, `(views, D)` of a video, or all tokens, `(views, N, D)`."""


class FrozenEncoder(NamedTuple):
    """An encoder that is not trained any more.

    Attributes:
        encoder: The encoder, in evaluation mode.
        clip: The clips that it sees.
        folder: Where it comes from.
        sha256: The hash of its weights.
    """

    encoder: Encoder
    clip: ClipConfig
    folder: Path
    sha256: str


def open_encoder(path: str, untrained: bool, seed: int) -> FrozenEncoder:
    """Opens an encoder to take features of.

    Args:
        path: Its folder, or a run's.
        untrained: Whether it has fresh weights in place of its own.
        seed: Draws fresh weights.

    Raises:
        Refused: There is no encoder, it is damaged, or it sees clips of no single size and has learned their positions.
    """
    folder = find_encoder(path)
    pretrained = load_encoder(folder)
    torch.manual_seed(seed)
    encoder = encoder_from(pretrained.architecture, pretrained.clip)
    if not untrained:
        load_encoder_weights(encoder, fit_to_clips(pretrained, folder, pretrained.clip), folder)
    hashed = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        hashed.update(name.encode() + value.contiguous().numpy().tobytes())
    return FrozenEncoder(encoder.eval(), pretrained.clip, folder, hashed.hexdigest())


@dataclasses.dataclass(frozen=True)
class Reading:
    """How videos are read.

    Attributes:
        micro_batch: Videos that one process sends through the encoder at once.
        workers: Loader processes of each.
        decoder: Who decodes.
        decode_limit_s: Seconds that a decode may take; None or 0 decodes without limit or protection.
    """

    micro_batch: int = 16
    workers: int = 0
    decoder: DecoderName = "auto"
    decode_limit_s: float | None = DECODE_LIMIT_S


class KeptFeatures:
    """The features of one set, in one folder.

    Args:
        folder: The folder of all features.
        frozen: The encoder.
        shards: The set.
        views: Views of each video.
        kind: What is kept.
    """

    def __init__(
        self, folder: Path, frozen: FrozenEncoder, shards: ShardSet, views: ViewsConfig, kind: FeatureKind
    ) -> None:
        """Looks at nothing yet."""
        self.frozen = frozen
        self.shards = shards
        self.views = views
        self.kind = kind
        self.key: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "kind": kind,
            "encoder": frozen.sha256,
            "architecture": dataclasses.asdict(frozen.encoder.config),
            "clip": dataclasses.asdict(frozen.clip),
            "shards": shards.fingerprint,
            "views": dataclasses.asdict(views),
            "videos_in_part": VIDEOS_IN_PART,
        }
        name = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / f"{kind}-{name}"

    @property
    def size_gib(self) -> float:
        """What they take on the disk."""
        views = self.views.temporal * self.views.spatial
        config, grid = self.frozen.encoder.config, self.frozen.encoder.grid
        tokens = grid.slots if config.name == "factorised_encoder" else grid.slots * grid.positions
        size_bytes = 4 if self.kind == "mean" else 2 * tokens
        return self.shards.samples * views * self.frozen.encoder.width * size_bytes / GIB

    def read_or_compute(self, processes: Processes, reading: Reading) -> VideoFeatures | None:
        """Returns the features of all videos in their order, on rank 0; computes those that are missing.

        Every rank calls it.

        Raises:
            Refused: The folder cannot be written, or is not the same on all nodes.
            DiskFull: There is no space left.
            StoppedByRule: The encoder returns features that are not finite.
        """
        parts = -(-self.shards.samples // VIDEOS_IN_PART)
        missing = processes.on_main(lambda: [number for number in range(parts) if not self._is_kept(number)])
        if missing:
            processes.on_main_only(self._describe)
            logger.info("computing %s of %d videos of %s", self._told, self.shards.samples, self.shards.folder)
            encoder = self.frozen.encoder.to(processes.device)
            for number in missing[processes.rank :: processes.world]:
                self._compute(number, encoder, processes.device, reading)
            processes.barrier()
        else:
            logger.info("%s of %s: read from %s", self._told, self.shards.folder, self.folder)
        return processes.on_main_only(self._read_all)

    def _is_kept(self, number: int) -> bool:
        part = self._read(number)
        return part is not None and not any(part.errors)

    @property
    def _told(self) -> str:
        return "mean features" if self.kind == "mean" else "tokens"

    def _read_all(self) -> VideoFeatures:
        found = [self._read(number) for number in range(-(-self.shards.samples // VIDEOS_IN_PART))]
        whole = [part for part in found if part is not None]
        if len(whole) < len(found):
            raise Refused(f"features: {self.folder} is not the same folder on all nodes; give one that they share")
        return joined_features(whole)

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"

    def _describe(self) -> None:
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "key.json", self.key)
            for leftover in self.folder.glob("*.tmp-*"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - leftover.stat().st_mtime > ABANDONED_AFTER_S:
                        leftover.unlink()

    def _compute(self, number: int, encoder: Encoder, device: torch.device, reading: Reading) -> None:
        first = number * VIDEOS_IN_PART
        numbers = np.arange(first, min(first + VIDEOS_IN_PART, self.shards.samples))
        views = EvaluationViews(
            self.shards,
            self.frozen.clip,
            self.views.temporal,
            self.views.spatial,
            reading.decoder,
            reading.decode_limit_s,
        )
        encode = mean_features_by(encoder, device)
        if self.kind == "tokens":

            def encode(group: list[Views]) -> Tensor:
                return encoder(torch.cat([one.clips for one in group]).to(device)).last().half()

        counted = np.full(len(numbers), True)
        part = encode_videos(encode, views, numbers, counted, reading.micro_batch, reading.workers)
        if not part.values.isfinite().all():
            raise StoppedByRule(f"{self.frozen.folder}: the encoder's features are not finite; pretrain again")
        with _writing(self.folder):
            write_bytes(self._path(number), save(_tensors(part), _metadata(part)))

    def _read(self, number: int) -> VideoFeatures | None:
        """Returns a part, or None where it has to be computed."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata()
                part = VideoFeatures(
                    file.get_tensor("values"),
                    file.get_tensor("labels"),
                    json.loads(told["keys"]),
                    json.loads(told["errors"]),
                )
            if _metadata(part) == told:
                return part
            reason = "its content has another hash"
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
        logger.warning("%s: is damaged (%s) and computed again", path, reason)
        return None


def _tensors(part: VideoFeatures) -> dict[str, Tensor]:
    return {"values": part.values.contiguous(), "labels": part.labels}


def _metadata(part: VideoFeatures) -> dict[str, str]:
    hashed = hashlib.sha256()
    for value in _tensors(part).values():
        hashed.update(value.numpy().tobytes())
    return {"keys": json.dumps(part.keys), "errors": json.dumps(part.errors), "sha256": hashed.hexdigest()}


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_out_of_space(error):
            raise DiskFull(f"{folder}: no space left on the disk; free some or give another --features") from None
        raise Refused(f"{folder}: cannot be written ({error.strerror}); give another --features") from None

"""Prediction: the most probable classes of video files, in any format that FFmpeg reads.

A file goes the way of the training videos: transcoded as packing does, decoded, cut into views.

    model = finetune.load("runs/b")
    for prediction in model.predict(["clip.mp4", "videos/"]):
        print(prediction.file, prediction.classes or prediction.error)
"""

import contextlib
import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.classifier import Classifier, ModelDescription, load
from finetune.config import ViewsConfig
from finetune.explain import explanation_paths, name_of_view, rate_of, write_explanation
from finetune.explanation_video import Caption
from pretrain.data.pack_worker import VideoTask, transcode_task
from pretrain.data.packed_views import packed_views_of
from pretrain.data.pool import Died, WorkerPool, refuse_pool_options
from pretrain.data.shards import Sample
from pretrain.data.sources import find_sources
from pretrain.data.transcode import Transcoded, transcode
from pretrain.data.video import DecoderName
from pretrain.data.views import views_of
from pretrain.errors import BadSample, Refused, StoppedByRule, reason_of_failure
from pretrain.model.packing import PackedTokens
from pretrain.packing import visible_tokens

TOP = 5
VIEWS = ViewsConfig(temporal=3)
GOP = 16
STALL_S = 60.0


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The classes of one file.

    Attributes:
        file: The file.
        classes: (name, probability) of the most probable classes, best first; none where there is an error. The
            probabilities of a multi-label model are each class's own.
        error: Why the file has no classes, with the remedy, or None.
        explanation: The video that shows where the model looked, or None.
    """

    file: str
    classes: list[tuple[str, float]]
    error: str | None = None
    explanation: str | None = None


@dataclasses.dataclass(frozen=True)
class PredictionOptions:
    """How videos are predicted."""

    views: ViewsConfig = VIEWS
    """Views of each video, whose logits are averaged."""
    top: int = TOP
    """Classes told of each video; no more than there are."""
    decoder: DecoderName = "auto"
    """Who decodes the transcoded videos."""
    jobs: int = 0
    """Processes that transcode ahead and outlive videos that crash or stall them; 0 transcodes in this one."""
    stall_s: float = STALL_S
    """Seconds without progress after which such a process gives a video up."""
    micro_batch: int = 1
    """Videos that go through the model at once; packed clips go one video at a time."""
    explain: str | None = None
    """Folder that takes for each video another one, which shows where the model looked; None writes none."""

    def validate(self) -> None:
        """Raises `Refused` for numbers that cannot be."""
        self.views.validate()
        refuse_pool_options(self.jobs, self.stall_s)
        for name in ("top", "micro_batch"):
            if getattr(self, name) < 1:
                raise Refused(f"{name}: {getattr(self, name)} must be at least 1")


class Cut(NamedTuple):
    """A file whose views wait for the model.

    Attributes:
        file: The file.
        clips: Its views, or the reason why it has none.
        rate: How many frames of a clip are a second.
        explanation: Where its explanation goes, or None.
    """

    file: str
    clips: Tensor | PackedTokens | str
    rate: float
    explanation: Path | None


class Scores(NamedTuple):
    """The logits of a video.

    Attributes:
        mean: `(classes,)`, over its views.
        views: `(views, classes)`.
    """

    mean: Tensor
    views: Tensor


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A classifier with all that it needs to read video files.

    Attributes:
        model: The classifier, in evaluation mode; it takes clips `(B, T, H, W, 3)` uint8 and returns logits.
        description: What it is.
        name: Where it was loaded from.
    """

    model: Classifier
    description: ModelDescription
    name: str

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes, in the order of the logits."""
        return self.description.classes

    def predict(
        self, paths: str | Path | Iterable[str | Path], options: PredictionOptions | None = None
    ) -> Iterator[Prediction]:
        """Predicts the classes of video files, in their order.

        Args:
            paths: A video file, or a folder whose videos are meant, at any depth; or several of them.
            options: How; by default three time windows, in this process.

        Yields:
            The prediction of each file in turn; that of a file that cannot be read says so, and the next ones go on.

        Raises:
            Refused: A folder holds no video, an option cannot be, or an explanation would replace a file.
            DiskFull: There is no space for an explanation.
            StoppedByRule: The model returns logits that are not finite.
        """
        options = options or PredictionOptions()
        options.validate()
        if self.description.packing:
            options.views.refuse_crops(f"{self.name} was trained on packed clips, of which each")
            options = dataclasses.replace(options, micro_batch=1)
        yield from self._predicted(video_files([paths] if isinstance(paths, str | Path) else paths), options)

    def _predicted(self, files: list[str], options: PredictionOptions) -> Iterator[Prediction]:
        paths: Sequence[Path | None] = [None] * len(files)
        if options.explain is not None:
            paths = explanation_paths(Path(options.explain), files)
        waiting: list[Cut] = []
        with contextlib.closing(stored_videos(files, self.description, options)) as stored:
            for file, video, path in zip(files, stored, paths, strict=True):
                waiting.append(self._cut(file, video, path, options))
                if len(waiting) == options.micro_batch:
                    yield from self._named(waiting, options)
                    waiting = []
            yield from self._named(waiting, options)

    def _cut(self, file: str, video: Transcoded | str, path: Path | None, options: PredictionOptions) -> Cut:
        if isinstance(video, str):
            return Cut(file, video, 0, None)
        try:
            clips = clips_of(video, self.description, options.views, options.decoder)
        except BadSample as error:
            return Cut(file, undecodable(str(error)), 0, None)
        return Cut(file, clips, rate_of(self.description.clip, video.frame_rate), path)

    def _named(self, group: list[Cut], options: PredictionOptions) -> Iterator[Prediction]:
        """Returns the predictions of files with their clips, or with the reason why they have none."""
        logits = iter(self._logits([one.clips for one in group if not isinstance(one.clips, str)]))
        for one in group:
            if isinstance(one.clips, str):
                yield Prediction(one.file, [], one.clips)
                continue
            scores = next(logits)
            if not scores.mean.isfinite().all():
                raise StoppedByRule(f"{one.file}: the logits of {self.name} are not finite; finetune again")
            probabilities = scores.mean.sigmoid() if self.description.multi_label else scores.mean.softmax(0)
            best = probabilities.topk(min(options.top, len(self.classes)))
            names = [self.classes[number] for number in best.indices.tolist()]
            classes = list(zip(names, best.values.tolist(), strict=True))
            shown = None
            if one.explanation is not None:
                view = int(scores.views[:, best.indices[0]].argmax())
                caption = Caption(
                    *classes[0], Path(one.file).name, name_of_view(view, options.views, self.description.clip)
                )
                write_explanation(one.explanation, self.model, one.clips, view, caption, one.rate)
                shown = str(one.explanation)
            yield Prediction(one.file, classes, explanation=shown)

    @torch.no_grad()
    def _logits(self, clips: list[Tensor | PackedTokens]) -> list[Scores]:
        if not clips:
            return []
        device = next(self.model.parameters()).device
        if isinstance(clips[0], PackedTokens):
            alone = (self.model(PackedTokens(*(part.to(device) for part in one))).float() for one in clips)
            return [Scores(logits.mean(0).flatten().cpu(), logits.flatten(0, 1).cpu()) for logits in alone]
        together = torch.cat([one for one in clips if isinstance(one, Tensor)])
        logits = self.model(together.to(device)).float().unflatten(0, (len(clips), -1))
        return [Scores(*both) for both in zip(logits.mean(1).cpu(), logits.cpu(), strict=True)]


def load_predictor(folder: str | Path) -> Predictor:
    """Loads a model folder, or the model of a finetuning run, onto the GPU where there is one.

    Raises:
        Refused: The folder holds no classifier, or one that is damaged.
    """
    model, description = load(folder)
    return Predictor(model.to("cuda" if torch.cuda.is_available() else "cpu"), description, str(folder))


def video_files(paths: Iterable[str | Path]) -> list[str]:
    """Returns files as they are named, and in place of each folder its videos, sorted; of one without, its pictures.

    Raises:
        Refused: A folder holds neither videos nor images.
    """
    found: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            found += [str(Path(path) / source.path) for source in find_sources(path, unlabelled=True).videos]
        else:
            found.append(str(path))
    return found


def stored_videos(
    files: list[str], description: ModelDescription, options: PredictionOptions
) -> Generator[Transcoded | str, None, None]:
    """Yields each file in the form that shards store, or the reason why it has none, with the remedy."""
    tasks = (
        VideoTask(Path(file), description.short_side, GOP, description.frame_rate, options.stall_s) for file in files
    )
    if not options.jobs:
        yield from map(_transcoded_here, tasks)
        return
    died = f"crashes its decoder, or makes no progress for {options.stall_s:g} s"
    with WorkerPool(transcode_task, min(options.jobs, len(files))) as pool:
        for file, result in zip(files, pool.map(tasks), strict=True):
            video = died if isinstance(result, Died) else result
            yield video if isinstance(video, Transcoded) else _reason(Path(file), video)


def _transcoded_here(task: VideoTask) -> Transcoded | str:
    try:
        return transcode(task.path, short_side=task.short_side, gop=task.gop, frame_rate=task.frame_rate)
    except Exception as error:  # whatever a library throws at a strange file, as in packing
        return _reason(task.path, reason_of_failure(error))


def _reason(path: Path, why: str) -> str:
    return undecodable(why) if path.is_file() else "no such file; give video files or their folder"


def undecodable(why: str) -> str:
    """Returns what is said of a file that is there and has no classes."""
    return f"cannot be decoded ({why}); give a video that plays"


def clips_of(
    stored: Transcoded, description: ModelDescription, views: ViewsConfig, decoder: DecoderName = "auto"
) -> Tensor | PackedTokens:
    """Returns the views of a transcoded video, upright, whichever decoder reads them.

    Returns:
        `(views, T, H, W, C)`, or for a model of packed clips a sequence for each view.

    Raises:
        BadSample: It has none; the message is the reason alone.
    """
    if description.packed:
        grid = description.packed.sizing.grid(stored.frames, stored.frame_rate, stored.height, stored.width)
        packed = packed_views_of(stored.video, grid, stored.frame_rate, description.packed, views.temporal, decoder)
        return visible_tokens(packed)
    sample = Sample("", stored.video, None, stored.frames, stored.frame_rate, {})
    return views_of(sample, description.clip, views.temporal, views.spatial, decoder)

"""Explanations: for each predicted video one that shows where the model looked in the view that decided most.

That is the view in which the class that the video is taken for has its largest logit; the caption names it.
"""

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from finetune.classifier import Classifier
from finetune.config import ViewsConfig
from finetune.explanation_video import Caption, encode_explanation
from finetune.heat_map import heat_map
from finetune.output import make_writable, writing_to
from pretrain.data.clips import ClipConfig
from pretrain.errors import Refused
from pretrain.files import write_bytes
from pretrain.model.packing import PackedTokens

OPTION = "--explain"
STEM_BYTES = 200
"""How much of a file's name its explanation keeps: file systems take 255 bytes."""
SEGMENTS_RATE = 4.0
"""Frames per second of clips of segments, which have no frame rate."""


def explanation_paths(folder: Path, files: Iterable[str]) -> list[Path]:
    """Returns for each of the predicted files where its explanation goes, no two the same.

    That is NAME.mp4 in the folder, which is made; where several files have one name, NAME-2.mp4 and so on.

    Raises:
        Refused: The folder cannot be written, or has such a file already: it may be one of those that are predicted.
    """
    make_writable(folder, OPTION)
    taken: dict[str, int] = {}  # names, and the number that was tried last for each
    paths = []
    for file in files:
        stem = name = os.fsencode(Path(file).stem)[:STEM_BYTES].decode(errors="ignore")
        while _same(name) in taken:
            taken[_same(stem)] += 1
            name = f"{stem}-{taken[_same(stem)]}"
        taken[_same(name)] = 1
        paths.append(folder / f"{name}.mp4")
    for path in paths:
        if os.path.lexists(path):
            raise _is_there(path)
    return paths


def _same(name: str) -> str:
    """Returns what two names share that are one file on some file system."""
    return unicodedata.normalize("NFC", name).casefold()


def _is_there(path: Path) -> Refused:
    return Refused(f"{OPTION}: {path} is there already; name another folder, or remove it")


def write_explanation(
    path: Path, model: Classifier, clips: Tensor | PackedTokens, view: int, caption: Caption, rate: float
) -> None:
    """Writes the explanation of one view of a video.

    Args:
        path: Where it goes; its folder is there.
        model: The classifier, in evaluation mode.
        clips: All views, `(views, T, H, W, 3)` uint8, or a packed sequence for each.
        view: Which one.
        caption: What stands above it.
        rate: Frames per second.

    Raises:
        DiskFull: There is no space for it.
        Refused: The folder takes no more files, or another process has written this one meanwhile.
    """
    only = slice(view, view + 1)
    alone = PackedTokens(*(part[only] for part in clips)) if isinstance(clips, PackedTokens) else clips[only]
    video = encode_explanation(heat_map(model, alone), caption, rate)
    with writing_to(path.parent, OPTION):
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            raise _is_there(path) from None
        try:
            write_bytes(path, video)
        except BaseException:  # also Ctrl-C: what stands there empty would be taken for an explanation
            path.unlink(missing_ok=True)
            raise


def rate_of(clip: ClipConfig, stored_rate: float) -> float:
    """Returns how many frames a second a model sees of a video that is stored with `stored_rate`."""
    if clip.sampling == "segments":
        return SEGMENTS_RATE
    return stored_rate / clip.step(stored_rate)


def name_of_view(view: int, views: ViewsConfig, clip: ClipConfig) -> str:
    """Returns which time window and which crop the view of a number is; empty where there is one only."""
    window, crop = divmod(view, views.spatial)
    kind = "shift" if clip.sampling == "segments" else "time window"
    names = [f"{kind} {window + 1} of {views.temporal}"] if views.temporal > 1 else []
    names += [f"crop {crop + 1} of {views.spatial}"] if views.spatial > 1 else []
    return ", ".join(names)

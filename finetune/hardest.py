"""The videos whose true class a model finds least probable, with the frames that it saw of them."""

import math

import numpy as np

from finetune.figures import Evaluation
from pretrain.data.packed_views import PackedEvaluationViews
from pretrain.data.views import EvaluationViews
from pretrain.errors import BadSample
from pretrain.pictures import frame_sheet
from pretrain.report import Figure

HARDEST = 12
Cutter = EvaluationViews | PackedEvaluationViews


def hardest_videos(evaluation: Evaluation, cutter: Cutter, count: int = HARDEST) -> list[Figure]:
    """Draws the wrongly classified videos with the highest losses, highest first, each with its middle view.

    Args:
        evaluation: What was found.
        cutter: What cut the views of its videos.
        count: How many videos at most.
    """
    wrong = [
        place
        for place, one in enumerate(evaluation.predictions)
        if "predicted" in one and one["predicted"] != one["label"]
    ]
    wrong.sort(key=lambda place: evaluation.predictions[place]["label_probability"])
    figures = []
    for place in wrong[:count]:
        try:
            frames = middle_view(cutter, evaluation.samples[place])
        except BadSample:  # its shard can no longer be reached
            continue
        figures.append(Figure(frame_sheet(frames), _caption(evaluation.predictions[place])))
    return figures


def middle_view(cutter: Cutter, sample: int) -> np.ndarray:
    """Returns the clip `(T, H, W, 3)` of a video in the middle of its time windows and crops; raises `BadSample`."""
    if isinstance(cutter, PackedEvaluationViews):
        _, clips = cutter.clips(sample)
        return clips[len(clips) // 2].numpy()
    views = cutter[sample, True]
    if views.error:
        raise BadSample(views.error)
    return views.clips[cutter.temporal // 2 * cutter.spatial + cutter.spatial // 2].numpy()


def _caption(one: dict) -> str:
    loss = -math.log(max(one["label_probability"], 1e-300))
    return (
        f"{one['label']} ({100 * one['label_probability']:.2g} %), taken for {one['predicted']} "
        f"({100 * one['probability']:.0f} %). Loss {loss:.2f}. {one['key']}"
    )

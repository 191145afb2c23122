"""The hardest videos: those that are wrong with the highest loss, drawn as the model saw them."""

import shutil

import numpy as np

from finetune.figures import VideoLogits, figures_of
from finetune.hardest import hardest_videos
from pretrain.data.clips import ClipConfig
from pretrain.data.config import DataConfig
from pretrain.data.packed_views import PackedEvaluationViews
from pretrain.data.sequence_plan import PackingConfig
from pretrain.data.shards import ShardSet
from pretrain.data.views import EvaluationViews
from pretrain.packing import packing_of
from pretrain.pictures import frame_sheet

CLIP = ClipConfig(frames=4, stride=1, size=16)
SURE_OF_THE_FIRST = {2: 1.0, 5: 4.0, 7: 2.5, 3: 9.0}
"""Sample numbers, and how much more probable the first class is; the last of these is of that class."""


def evaluation(shards: ShardSet):
    seen = [
        VideoLogits(sample, shards.key(sample), int(sample != 3), np.array([margin, 0], dtype=np.float32), None)
        for sample, margin in SURE_OF_THE_FIRST.items()
    ]
    seen.append(VideoLogits(9, shards.key(9), 1, None, "cut short"))
    return figures_of(seen, ("run", "jump"))


def test_wrong_videos_are_drawn_by_falling_loss_from_their_middle_view(packed_shards):
    shards = ShardSet.open(packed_shards)
    cutter = EvaluationViews(shards, CLIP, 3, 3, decode_limit_s=None)
    figures = hardest_videos(evaluation(shards), cutter, count=2)
    assert len(figures) == 2
    for figure, sample in zip(figures, (5, 7), strict=True):
        middle = cutter[sample, True].clips[4].numpy()
        assert np.array_equal(np.asarray(figure.content), np.asarray(frame_sheet(middle)))
        assert figure.caption.startswith("jump (")
        assert "taken for run" in figure.caption
        assert figure.caption.endswith(shards.key(sample))
    assert len(hardest_videos(evaluation(shards), cutter)) == 3, "neither the right video nor the broken one"


def test_packed_clips_are_drawn_whole(packed_shards):
    shards = ShardSet.open(packed_shards)
    packing = packing_of(DataConfig(clip=CLIP, packing=PackingConfig()), (2, 8, 8))
    cutter = PackedEvaluationViews(shards, packing, decode_limit_s=None)
    (figure, *_) = hardest_videos(evaluation(shards), cutter)
    _, (clip,) = cutter.clips(5)
    assert clip.shape[2] > clip.shape[1], "the videos are wider than high"
    assert np.array_equal(np.asarray(figure.content), np.asarray(frame_sheet(clip.numpy())))


def test_a_video_that_can_no_longer_be_decoded_is_left_out(packed_shards, tmp_path):
    folder = shutil.copytree(packed_shards, tmp_path / "shards")
    shards = ShardSet.open(folder)
    shard, row = shards.locate(5)
    with open(folder / shards.shards[shard].name, "r+b") as file:
        file.seek(shards.shard_index(shard).video_offsets[row] + 40)
        file.write(b"damage")
    figures = hardest_videos(evaluation(shards), EvaluationViews(shards, CLIP, decode_limit_s=None))
    assert [figure.caption.split()[-1] for figure in figures] == [shards.key(7), shards.key(2)]

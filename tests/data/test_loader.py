"""Batches from real shards: the same clips for any workers and any world, past damaged samples, in one error line."""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.clips import ClipConfig, frame_indices
from pretrain.data.config import DataConfig
from pretrain.data.loader import Batch, MicroBatches, NoSubstitute, collate, load_batches, training_batches
from pretrain.data.order import Order, evaluation_slice
from pretrain.data.shard_writer import PackedSample, write_shard
from pretrain.data.shards import Sample, ShardSet
from pretrain.data.training_clips import QUARANTINED, SUBSTITUTES, Request, TrainingClips, clip_frames
from pretrain.data.transcode import Transcoded
from pretrain.data.video import open_video
from pretrain.data.views import EvaluationViews, evaluation_batches, views_of
from pretrain.errors import EXIT_STOPPED, Refused, TubeletError
from pretrain.model.masking import MaskConfig, draw_mask
from pretrain.model.tubelets import Grid

CLIP = ClipConfig(frames=4, frame_rate=3.0, size=32)
CONFIG = DataConfig(clip=CLIP, global_batch=4, micro_batch=2, lanes=2, shards_per_window=2, workers=0)
STEPS = range(1, 5)  # over the end of the first epoch
DRAW_MASK = functools.partial(draw_mask, MaskConfig(ratio=0.75, decoded=0.5), Grid(2, 4, 4))


class Clip(NamedTuple):
    """One clip of a batch, as bytes that compare."""

    key: str
    label: int
    clip: bytes
    visible: tuple[int, ...]
    masked: tuple[int, ...]


def rebuilt(source: Path, folder: Path, change: Callable[[int, Sample], bytes]) -> Path:
    """Writes a shard set anew, each video replaced by what `change` makes of its number and sample."""
    shards = ShardSet.open(source)
    folder.mkdir()
    entries, first = [], 0
    for shard in shards.shards:
        packed = []
        for number in range(first, first + shard.samples):
            sample = shards.read(number)
            fields = [sample.metadata[name] for name in ("frames", "frame_rate", "height", "width")]
            video = Transcoded(change(number, sample), *fields)
            packed.append(PackedSample(sample.key, sample.metadata["source"], sample.label, video))
        first += shard.samples
        entries.append(dataclasses.asdict(write_shard(folder / shard.name, packed)))
    index = json.loads((source / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "shards": entries}))
    return folder


@pytest.fixture(scope="module")
def shards(packed_shards) -> ShardSet:
    return ShardSet.open(packed_shards)


def order_of(shards: ShardSet) -> Order:
    return Order(shards.samples_per_shard, 3, CONFIG.lanes, CONFIG.shards_per_window, CONFIG.global_batch)


def read(
    shards: ShardSet, workers: int = 0, world: int = 1, rank: int = 0, repeats: int = 1
) -> Iterator[tuple[list[Request], Batch]]:
    """Yields what each micro-batch of a rank asks for and what comes."""
    config = dataclasses.replace(CONFIG, workers=workers, repeats=repeats)
    requests = MicroBatches(order_of(shards), STEPS, config.micro_batch, world, rank)
    batches = training_batches(TrainingClips(shards, config, seed=3, draw_mask=DRAW_MASK), requests)
    yield from zip(requests, batches, strict=True)


def clips_of(batches: Iterator[tuple[list[Request], Batch]]) -> dict[Request, Clip]:
    clips = {}
    for requests, batch in batches:
        rows = zip(batch.keys, batch.labels, batch.clips, batch.visible, batch.masked, strict=True)
        for request, (key, label, clip, visible, masked) in zip(requests, rows, strict=True):
            clips[request] = Clip(
                key, int(label), clip.numpy().tobytes(), tuple(visible.tolist()), tuple(masked.tolist())
            )
    return clips


@pytest.fixture(scope="module")
def clips(shards) -> dict[Request, Clip]:
    """What one process without workers reads."""
    return clips_of(read(shards))


def test_a_batch_holds_what_the_order_asks_for(shards, clips):
    assert len(clips) == len(STEPS) * CONFIG.global_batch
    assert {request.epoch for request in clips} == {0, 1, 2}
    for request, clip in clips.items():
        sample = shards.read(request.sample)
        assert (clip.key, clip.label) == (sample.key, sample.label)
        assert (len(clip.visible), len(clip.masked)) == (8, 12)
        assert not set(clip.visible) & set(clip.masked)
    assert len({clip.clip for clip in clips.values()}) == len(clips), "another crop in every epoch"
    assert len({clip.visible for clip in clips.values()}) > 10


def test_a_batch_is_bytes_as_the_model_takes_them(shards):
    _, batch = next(read(shards))
    assert (batch.clips.dtype, batch.clips.shape) == (torch.uint8, (2, 4, 32, 32, 3))
    assert batch.clips.is_contiguous()
    assert (batch.visible.dtype, batch.masked.dtype, batch.labels.dtype) == (torch.int64,) * 3
    assert batch.skipped == []


def test_workers_and_world_change_no_clip(shards, clips):
    assert clips_of(read(shards, workers=1)) == clips
    halves = [clips_of(read(shards, workers=2, world=2, rank=0)), clips_of(read(shards, world=2, rank=1))]
    assert not halves[0].keys() & halves[1].keys()
    assert halves[0] | halves[1] == clips


def test_a_run_that_starts_later_reads_the_same_clips(shards, clips):
    requests = MicroBatches(order_of(shards), STEPS[2:], CONFIG.micro_batch, 1, 0)
    later = clips_of(
        zip(requests, training_batches(TrainingClips(shards, CONFIG, 3, DRAW_MASK), requests), strict=True)
    )
    assert later.items() <= clips.items()
    assert len(later) == 2 * CONFIG.global_batch


def test_another_seed_reads_other_clips(shards):
    request = Request(0, 0, 0)
    first, second = (TrainingClips(shards, CONFIG, seed, DRAW_MASK)[request] for seed in (3, 4))
    assert first.key == second.key
    assert not torch.equal(first.clips[0], second.clips[0]) or not np.array_equal(first.visible, second.visible)
    assert not np.array_equal(first.visible, second.visible)


def test_repeats_share_their_frames_and_differ_in_crop_and_mask(shards, clips):
    """Whole frames, so that a clip tells which frames it shows: the packed square stands elsewhere in each."""
    requests, batch = next(read(shards, repeats=3))
    assert (batch.clips.shape[0], len(batch.keys), len(batch.labels)) == (6, 2, 6)
    for number, request in enumerate(requests):
        own = slice(3 * number, 3 * number + 3)
        assert set(batch.labels[own].tolist()) == {clips[request].label}
        assert batch.clips[3 * number].numpy().tobytes() == clips[request].clip, "the first repeat is the single clip"
        assert len({clip.numpy().tobytes() for clip in batch.clips[own]}) == 3
        assert len({tuple(mask.tolist()) for mask in batch.visible[own]}) == 3
        assert len({tuple(mask.tolist()) for mask in batch.masked[own]}) == 3
    uncropped = dataclasses.replace(CONFIG, repeats=3, clip=dataclasses.replace(CLIP, crop="center"))
    for request in requests:
        first, *others = TrainingClips(shards, uncropped, 3)[request].clips
        assert all(torch.equal(first, other) for other in others)


def test_a_clip_shows_the_frames_that_its_configuration_names(shards):
    whole = dataclasses.replace(CLIP, crop="center", size=48)
    number = max(range(len(shards)), key=lambda number: shards.read(number).frames)
    loaded = TrainingClips(shards, dataclasses.replace(CONFIG, clip=whole), 3)[Request(number, 0, 5)]
    sample = shards.read(number)
    frames = torch.from_numpy(open_video(sample.video).read(np.arange(sample.frames)))[:, :, 8:56]
    starts = [n for n in range(sample.frames - 12) if torch.equal(loaded.clips[0], frames[n : n + 13 : 4])]
    assert len(starts) == 1, "4 frames a third of a second apart, at 12 stored frames a second"
    assert not loaded.padded


def test_repeats_may_have_time_windows_of_their_own(shards):
    """Whole frames, so that a clip tells which frames it shows."""
    whole = dataclasses.replace(CLIP, crop="center", size=48)
    config = dataclasses.replace(CONFIG, repeats=4, time_windows="own", clip=whole)
    number = max(range(len(shards)), key=lambda number: shards.read(number).frames)
    sample, request = shards.read(number), Request(number, 0, 5)
    frames = torch.from_numpy(open_video(sample.video).read(np.arange(sample.frames)))[:, :, 8:56]
    clips = TrainingClips(shards, config, 3)[request].clips
    windows = [clip_frames(config, 3, request, repeat, sample.frames, sample.frame_rate)[0] for repeat in range(4)]
    assert all(torch.equal(clip, frames[window]) for clip, window in zip(clips, windows, strict=True))
    assert len({int(window[0]) for window in windows}) > 2
    shared = TrainingClips(shards, dataclasses.replace(config, time_windows="shared"), 3)[request].clips
    assert all(torch.equal(clip, clips[0]) for clip in shared), "the first repeat's"


def test_a_batch_tells_what_its_loading_cost(shards):
    started = time.perf_counter()
    _, batch = next(read(shards))
    costs = batch.costs
    assert min(costs.read_s, costs.decode_s, costs.cut_s) > 0
    assert costs.read_s + costs.decode_s + costs.cut_s < time.perf_counter() - started
    assert (costs.cache_hits, costs.cache_misses) == (0, 0), "nothing remote was read"


def test_samples_too_short_for_their_time_window_are_counted(shards):
    long = dataclasses.replace(CONFIG, clip=dataclasses.replace(CLIP, frames=8))
    loaded = [TrainingClips(shards, long, 3)[Request(number, 0, number)] for number in range(len(shards))]
    short = [shards.read(number).frames < 29 for number in range(len(shards))]
    assert [one.padded for one in loaded] == short
    assert collate(loaded).padded == sum(short) == 10


def test_clips_of_a_sample_stand_together_with_its_label(shards):
    labels = shards.labels()
    numbers = [labels.index(0), labels.index(1)]
    twice = dataclasses.replace(CONFIG, repeats=2)
    batch = collate([TrainingClips(shards, twice, 3)[Request(number, 0, number)] for number in numbers])
    assert batch.labels.tolist() == [0, 0, 1, 1]
    assert batch.keys == [shards.key(number) for number in numbers]


def test_without_masks_none_are_drawn(shards):
    batch = collate([TrainingClips(shards, CONFIG, 3)[Request(number, 0, number)] for number in range(2)])
    assert batch.visible.shape == batch.masked.shape == (2, 0)


@pytest.fixture(params=["junk in the shard", "bytes that changed"])
def damaged(request, packed_shards, tmp_path) -> tuple[ShardSet, int]:
    """A set in which one sample cannot be decoded, and its number."""
    folder, number = tmp_path / "damaged", 5
    if request.param == "junk in the shard":
        rebuilt(packed_shards, folder, lambda n, sample: b"no video" * 9 if n == number else sample.video)
        return ShardSet.open(folder), number
    shutil.copytree(packed_shards, folder)
    shards = ShardSet.open(folder)
    shard, row = shards.locate(number)
    path, index = folder / shards.shards[shard].name, shards.shard_index(shard)
    content = bytearray(path.read_bytes())
    content[index.video_offsets[row] + index.video_sizes[row] // 2] ^= 255
    path.write_bytes(content)
    return shards, number


def test_a_damaged_sample_is_replaced_and_no_other_moves(damaged, clips):
    shards, number = damaged
    read_batches = list(read(shards))
    hit = {request for request in clips if request.sample == number}
    assert hit, "the steps of this test meet the damaged sample"
    after = clips_of(read_batches)
    assert after.keys() == clips.keys()
    assert {request: clip for request, clip in after.items() if clip != clips[request]}.keys() == hit
    for request in hit:
        assert after[request].key != clips[request].key
        assert (after[request].visible, after[request].masked) == (clips[request].visible, clips[request].masked)
    reports = [report for _, batch in read_batches for report in batch.skipped]
    assert {(report["key"], report["epoch"], report["position"]) for report in reports} == {
        (shards.key(number), request.epoch, request.position) for request in hit
    }
    assert all("cannot open it" in one["reason"] or "is damaged" in one["reason"] for one in reports)
    assert clips_of(iter(read_batches)) == clips_of(read(shards)), "the same substitute every time"


def quarantined(shards: ShardSet, file: Path) -> list[Batch]:
    config = dataclasses.replace(CONFIG, quarantine=str(file))
    config.validate()
    requests = MicroBatches(order_of(shards), STEPS, CONFIG.micro_batch, 1, 0)
    return list(training_batches(TrainingClips(shards, config, 3, DRAW_MASK), requests))


def test_a_quarantined_sample_is_not_attempted_and_has_the_substitute_of_a_bad_one(damaged, packed_shards, tmp_path):
    shards, number = damaged
    attempted = [batch for _, batch in read(shards)]
    reports = [report for batch in attempted for report in batch.skipped]
    file = tmp_path / "skipped.jsonl"
    file.write_text("".join(json.dumps({"step": 1} | report) + "\n" for report in reports))
    for sound in (shards, ShardSet.open(packed_shards)):  # in the second nothing is bad, and nothing is tried
        passed_over = quarantined(sound, file)
        assert [batch.keys for batch in passed_over] == [batch.keys for batch in attempted]
        assert all(one.clips.equal(other.clips) for one, other in zip(passed_over, attempted, strict=True))
        said = [report for batch in passed_over for report in batch.skipped]
        assert said == [report | {"reason": QUARANTINED, "quarantined": True} for report in reports]
    views = EvaluationViews(ShardSet.open(packed_shards), CLIP)
    assert views[number, True].error is None, "evaluation knows no quarantine"


def test_a_long_quarantine_stops_a_run_only_where_it_leaves_nothing_to_read(shards, tmp_path):
    file = tmp_path / "list.jsonl"
    keys = [shards.key(number) for number in range(len(shards))]
    file.write_text("".join(json.dumps({"key": key}) + "\n" for key in keys[1:]))
    assert {key for batch in quarantined(shards, file) for key in batch.keys} == {keys[0]}
    file.write_text("".join(json.dumps({"key": key}) + "\n" for key in keys))
    with pytest.raises(
        NoSubstitute, match=rf"^data\.quarantine: names a sample of {shards.folder} and all of its 1000"
    ):
        quarantined(shards, file)


@pytest.mark.parametrize(("decoder", "says"), [("decord", "decord cannot"), ("pyav", "PyAV cannot")])
def test_the_decoder_that_was_chosen_reads(packed_shards, tmp_path, decoder, says):
    folder = rebuilt(packed_shards, tmp_path / "junk", lambda n, sample: b"no video" if n == 5 else sample.video)
    shards = ShardSet.open(folder)
    loaded = TrainingClips(shards, dataclasses.replace(CONFIG, decoder=decoder), 3)[Request(5, 0, 0)]
    assert loaded.skipped[0]["reason"].startswith(says)
    assert EvaluationViews(shards, CLIP, decoder=decoder)[5, True].error.startswith(says)


def test_substitutes_are_spread_over_the_set(damaged):
    shards, number = damaged
    clips = TrainingClips(shards, CONFIG, 3)
    used = [clips[Request(number, 0, position)].key for position in range(12)]
    assert shards.key(number) not in used
    assert len(set(used)) > 4


def test_evaluation_lists_a_damaged_sample_as_an_error_and_goes_on(damaged):
    shards, number = damaged
    views = EvaluationViews(shards, CLIP, temporal=2, spatial=3)
    seen = [one for batch in evaluation_batches(views, *evaluation_slice(len(shards), 1, 0), 4, 0) for one in batch]
    assert [one.sample for one in seen] == list(range(len(shards)))
    assert [one.key for one in seen] == [shards.key(n) for n in range(len(shards))]
    assert [one.label for one in seen] == shards.labels()
    assert [one.sample for one in seen if one.error is not None] == [number]
    assert "cannot open it" in seen[number].error or "is damaged" in seen[number].error
    assert all(one.clips.shape == (6, 4, 32, 32, 3) for one in seen)
    assert not seen[number].clips.any()
    assert all(one.clips.any() for one in seen if one.error is None)


def test_views_are_every_time_window_in_every_crop(shards):
    sample = shards.read(len(shards) - 1)
    config = dataclasses.replace(CLIP, size=48)
    views = views_of(sample, config, temporal=3, spatial=2)
    frames = torch.from_numpy(open_video(sample.video).read(np.arange(sample.frames)))
    time_windows = [frame_indices(config, sample.frames, sample.frame_rate, moment)[0] for moment in (0, 0.5, 1)]
    assert time_windows[0][0] == 0
    assert time_windows[2][-1] == sample.frames - 1
    shown = [frames[torch.from_numpy(time_window)] for time_window in time_windows]
    assert torch.equal(views, torch.stack([one[:, :, left : left + 48] for one in shown for left in (0, 16)]))
    assert torch.equal(views, EvaluationViews(shards, config, temporal=3, spatial=2)[len(shards) - 1, True].clips)


def test_fillers_of_an_uneven_evaluation_do_not_count(shards):
    views = EvaluationViews(shards, CLIP)
    numbers, counted = evaluation_slice(len(shards), 2, 1)
    seen = [one for batch in evaluation_batches(views, numbers, counted, 4, 0) for one in batch]
    assert [(one.sample, one.counted) for one in seen] == [(n, True) for n in range(6, 11)] + [(10, False)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_without_a_good_substitute_stops_the_run_in_one_line_that_names_all(
    packed_shards, tmp_path, caplog, workers
):
    shards = ShardSet.open(rebuilt(packed_shards, tmp_path / "junk", lambda number, sample: b"no video" * 9))
    with pytest.raises(NoSubstitute) as caught:
        list(read(shards, workers=workers))
    said = str(caught.value)
    assert said.startswith(f"{shards.folder}: a sample and its {SUBSTITUTES} substitutes cannot be decoded; bad are")
    assert said.endswith("pack the videos anew")
    assert "\n" not in said
    assert caught.value.exit_code == EXIT_STOPPED
    requests = next(iter(MicroBatches(order_of(shards), STEPS, CONFIG.micro_batch, 1, 0)))
    named = {message.partition(": ")[0] for message in caplog.messages}
    assert {shards.key(request.sample) for request in requests} <= named, "both samples of the micro-batch"
    assert all(key in said for key in named)
    assert all("PyAV cannot open it" in message for message in caplog.messages)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), RuntimeError("CUDA")])
def test_a_batch_that_died_with_its_worker_is_told_as_such_and_no_other_error_is(monkeypatch, error):
    class Dying:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __iter__(self) -> Iterator[None]:
            raise error

    monkeypatch.setattr("pretrain.data.loader.DataLoader", Dying)
    for workers in (0, 1):
        told = workers and not isinstance(error, RuntimeError)
        with pytest.raises(TubeletError if told else type(error), match="a loader worker died" if told else None):
            list(load_batches([], [], workers, list, pin_memory=False))


def test_a_refusal_inside_a_worker_stays_a_refusal_in_one_line(packed_shards, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(packed_shards, folder)
    shards = ShardSet.open(folder)
    for index in folder.glob("*.idx"):
        index.unlink()
    with pytest.raises(Refused, match=r"^\S+\.idx: missing; copy the whole folder again or repack it$"):
        list(read(shards, workers=1))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5), st.integers(0, 5))
def test_micro_batches_divide_a_rank_s_part_of_each_step(micro_batch, accumulation, world, first, count):
    order = Order((40, 31), 1, 1, 1, micro_batch * accumulation * world)
    for rank in range(world):
        batches = MicroBatches(order, range(first, first + count), micro_batch, world, rank)
        listed = list(batches)
        assert len(batches) == len(listed) == count * accumulation
        assert {len(requests) for requests in listed} <= {micro_batch}
        flat = [request for requests in listed for request in requests]
        parts = [order.step(step, world, rank) for step in range(first, first + count)]
        assert [request.sample for request in flat] == [n for part in parts for n in part.samples.tolist()]
        assert [request.position for request in flat] == [n for part in parts for n in part.positions.tolist()]

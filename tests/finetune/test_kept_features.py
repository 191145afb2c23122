"""Frozen features on disk: computed once, and again only where they are damaged or of something else."""

import json
import os
from pathlib import Path

import pytest
import torch

from finetune import features
from finetune.config import ViewsConfig
from finetune.features import KeptFeatures, Reading, open_encoder
from pretrain.data.shards import ShardSet
from pretrain.engine.distributed import Processes
from pretrain.errors import Refused
from pretrain.features import VideoFeatures

READING = Reading(micro_batch=4, decode_limit_s=0)


@pytest.fixture(autouse=True)
def in_parts(monkeypatch):
    monkeypatch.setattr(features, "VIDEOS_IN_PART", 4)


@pytest.fixture
def kept(pretrained, packed_shards, tmp_path) -> KeptFeatures:
    encoder = open_encoder(str(pretrained), untrained=False, seed=0)
    return KeptFeatures(tmp_path / "features", encoder, ShardSet.open(packed_shards), ViewsConfig(2, 1), "mean")


@pytest.fixture
def told(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(features.logger, "warning", lambda text, *values: lines.append(text % values))
    return lines


def read(kept: KeptFeatures) -> VideoFeatures:
    with Processes() as processes:
        found = kept.read_or_compute(processes, READING)
    assert found is not None
    return found


def same(one: VideoFeatures, other: VideoFeatures) -> bool:
    return torch.equal(one.values, other.values) and torch.equal(one.labels, other.labels) and one[2:] == other[2:]


def test_a_second_call_reads_what_the_first_computed(kept, packed_shards, monkeypatch):
    first = read(kept)
    assert first.values.shape == (11, 2, 32)
    assert first.labels.tolist() == ShardSet.open(packed_shards).labels()
    assert len(list(kept.folder.glob("part-*.safetensors"))) == 3
    assert json.loads((kept.folder / "key.json").read_text())["shards"] == kept.shards.fingerprint
    monkeypatch.setattr(features, "encode_videos", lambda *_: pytest.fail("computed again"))
    assert same(read(kept), first)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def turn_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_off, turn_a_bit, Path.unlink], ids=["cut off", "one bit", "gone"])
def test_a_damaged_part_alone_is_computed_again_and_one_line_says_so(kept, told, damage):
    first = read(kept)
    paths = sorted(kept.folder.glob("part-*.safetensors"))
    before = [path.stat().st_mtime_ns for path in paths]
    damage(paths[1])
    assert same(read(kept), first)
    after = [path.stat().st_mtime_ns for path in paths]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert [line.startswith(f"{paths[1]}: is damaged (") for line in told] == [True] * (damage is not Path.unlink)


def test_what_a_killed_call_left_half_written_is_removed_once_nobody_can_be_writing_it(kept):
    kept.folder.mkdir(parents=True)
    old, young = (kept.folder / f"part-00000.safetensors.tmp-{number}" for number in (1, 2))
    old.touch()
    young.touch()
    os.utime(old, (1, 1))
    read(kept)
    assert not old.exists()
    assert young.exists()


def test_videos_that_could_not_be_decoded_are_tried_again(kept, packed_shards):
    path = packed_shards / kept.shards.shards[0].name
    sound = path.read_bytes()
    shard, place = kept.shards.locate(1)
    start = kept.shards.shard_index(shard).video_offsets[place] + 60
    path.write_bytes(sound[:start] + b"damage" + sound[start + 6 :])
    try:
        broken = read(kept)
    finally:
        path.write_bytes(sound)
    assert [error is None for error in broken.errors] == [number != 1 for number in range(11)]
    assert read(kept).errors == [None] * 11


def test_other_weights_views_and_kinds_have_folders_of_their_own(kept, pretrained, packed_shards, tmp_path):
    folder = tmp_path / "features"
    fresh = [open_encoder(str(pretrained), untrained=True, seed=seed) for seed in (0, 0, 1)]
    assert fresh[0].sha256 == fresh[1].sha256 != fresh[2].sha256
    shards = ShardSet.open(packed_shards)
    others = [KeptFeatures(folder, one, shards, ViewsConfig(2, 1), "mean") for one in fresh[1:]]
    others.append(KeptFeatures(folder, kept.frozen, shards, ViewsConfig(1, 1), "mean"))
    others.append(KeptFeatures(folder, kept.frozen, shards, ViewsConfig(2, 1), "tokens"))
    assert len({one.folder for one in [kept, *others]}) == 5
    again = KeptFeatures(folder, open_encoder(str(pretrained), False, 3), shards, ViewsConfig(2, 1), "mean")
    assert again.folder == kept.folder


def test_tokens_are_kept_in_half_precision_and_take_what_was_told(kept, packed_shards, tmp_path):
    tokens = KeptFeatures(tmp_path / "features", kept.frozen, kept.shards, ViewsConfig(1, 1), "tokens")
    found = read(tokens)
    assert found.values.dtype == torch.float16
    assert found.values.shape == (11, 1, 8, 32)
    assert tokens.size_gib * 2**30 == found.values.nbytes
    mean = KeptFeatures(tmp_path / "features", kept.frozen, kept.shards, ViewsConfig(1, 1), "mean")
    assert torch.allclose(read(mean).values, found.values.float().mean(2), atol=2e-3)
    assert mean.size_gib * 2**30 == read(mean).values.nbytes


def test_a_folder_that_takes_no_files_is_refused(kept, tmp_path):
    (tmp_path / "features").write_text("a file")
    with pytest.raises(Refused, match=r"cannot be written .* give another --features"):
        read(kept)

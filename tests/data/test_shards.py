"""Reading shards by sample number: the right bytes, few open files, pickling, and every mismatch refused by name."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain.data import shards as shards_module
from pretrain.data.shard_writer import PackedSample, index_tar, write_shard
from pretrain.data.shards import ShardSet
from pretrain.data.transcode import Transcoded
from pretrain.errors import BadSample, Refused, TubeletError

SAMPLES = 10


def write_set(folder: Path, per_shard: int = 3, samples: int = SAMPLES) -> Path:
    """A set of shards whose videos are plain bytes: the reader never looks into them."""
    folder.mkdir()
    entries = []
    for shard, start in enumerate(range(0, samples, per_shard)):
        packed = [
            PackedSample(
                f"key-{n}", f"folder/{n}.mp4", n % 4, Transcoded(bytes([n]) * (1000 + n), 10 + n, 12.5, 48, 64)
            )
            for n in range(start, min(samples, start + per_shard))
        ]
        entries.append(dataclasses.asdict(write_shard(folder / f"shard-{shard:06d}.tar", packed)))
    index = {"format_version": 1, "classes": ["a", "b", "c", "d"], "frame_rate": 12.5, "short_side": 48}
    (folder / "index.json").write_text(json.dumps({**index, "resampled": True, "shards": entries}))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_set(tmp_path / "shards")


def check_all(shards: ShardSet) -> None:
    for number in range(shards.samples):
        sample = shards.read(number)
        assert (sample.key, sample.video) == (f"key-{number}", bytes([number]) * (1000 + number))
        assert (sample.label, sample.frames, sample.frame_rate) == (number % 4, 10 + number, 12.5)
        assert sample.metadata["source"] == f"folder/{number}.mp4"


def test_every_sample_is_read_by_its_number(folder):
    shards = ShardSet.open(folder)
    assert (shards.samples, shards.samples_per_shard) == (SAMPLES, (3, 3, 3, 1))
    check_all(shards)
    assert [shards.key(number) for number in range(SAMPLES)] == [f"key-{number}" for number in range(SAMPLES)]
    assert shards.labels() == [number % 4 for number in range(SAMPLES)]
    assert shards.fingerprint == hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()
    for number in (-1, SAMPLES):
        with pytest.raises(IndexError):
            shards.read(number)


def test_the_offsets_are_those_of_the_standard_library(folder):
    shards = ShardSet.open(folder)
    for number in range(SAMPLES):
        shard, place = shards.locate(number)
        index = shards.shard_index(shard)
        with tarfile.open(folder / shards.shards[shard].name) as tar:
            member = tar.getmember(f"key-{number}.mp4")
            assert (member.offset_data, member.size) == (index.video_offsets[place], index.video_sizes[place])


def test_a_sample_takes_one_read_and_no_tar_parsing(folder, monkeypatch):
    reads = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: reads.append(arguments) or real(*arguments))
    monkeypatch.setattr(tarfile, "open", None)
    ShardSet.open(folder).read(4)
    assert len(reads) == 1


def test_few_files_stay_open_and_none_after_the_set_is_gone(folder, monkeypatch):
    def open_files():
        paths = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return sum(os.readlink(path).endswith(".tar") for path in paths if os.path.islink(path))

    monkeypatch.setattr(shards_module, "MAX_OPEN_FILES", 2)
    shards = ShardSet.open(folder)
    assert open_files() == 0
    check_all(shards)
    assert open_files() == 2
    del shards
    assert open_files() == 0


def test_threads_share_a_set(folder, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN_FILES", 1)
    shards = ShardSet.open(folder)
    with ThreadPoolExecutor(8) as pool:
        samples = list(pool.map(shards.read, list(range(SAMPLES)) * 50))
    assert [sample.key for sample in samples] == [f"key-{number}" for number in range(SAMPLES)] * 50


def test_a_set_that_was_used_can_be_pickled_and_read_in_another_process(folder):
    shards = ShardSet.open(folder)
    check_all(shards)
    check_all(pickle.loads(pickle.dumps(shards)))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(shards.read, (7,)) == shards.read(7)


def edit_index(folder: Path, **changes) -> None:
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**content, **changes}))


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "index.json").unlink(), r"holds no index\.json"),
        (lambda folder: (folder / "index.json").write_text("{"), r"index\.json: not a shard index"),
        (lambda folder: (folder / "index.json").write_text("[]"), r"index\.json: not a shard index"),
        (lambda folder: edit_index(folder, shards=[{"name": "a.tar"}]), r"index\.json: not a shard index"),
        (lambda folder: edit_index(folder, format_version=2), "format version 2 is newer than 1"),
        (lambda folder: (folder / "shard-000001.tar").unlink(), r"shard-000001\.tar: missing"),
        (lambda folder: (folder / "shard-000001.idx").unlink(), r"shard-000001\.idx: missing"),
        (lambda folder: lengthen(folder / "shard-000002.tar"), r"shard-000002\.tar: \d+ bytes, but index\.json says"),
    ],
)
def test_a_folder_that_does_not_match_its_index_is_refused(folder, damage, words):
    damage(folder)
    with pytest.raises(Refused, match=words):
        ShardSet.open(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(Refused, match="no such folder; make it with `tubelet pack"):
        ShardSet.open(tmp_path / "nowhere")


def test_a_changed_shard_index_is_refused_when_it_is_needed(folder):
    path = folder / "shard-000001.idx"
    path.write_bytes(path.read_bytes().replace(b"key-4", b"key-9"))
    shards = ShardSet.open(folder)
    assert shards.read(0).key == "key-0"
    with pytest.raises(Refused, match=r"shard-000001\.idx: not the file"):
        shards.read(4)


def test_a_flipped_byte_makes_its_own_sample_bad_and_no_other(folder):
    path = folder / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[ShardSet.open(folder).shard_index(1).video_offsets[1] + 5] ^= 1
    path.write_bytes(content)
    shards = ShardSet.open(folder)
    with pytest.raises(BadSample, match=r"shard-000001\.tar: sample key-4 is damaged"):
        shards.read(4)
    assert [shards.read(number).key for number in (3, 5)] == ["key-3", "key-5"]


def test_a_shard_cut_after_opening_is_an_error_that_names_it(folder):
    shards = ShardSet.open(folder)
    os.truncate(folder / "shard-000002.tar", 100)
    with pytest.raises(TubeletError, match=r"shard-000002\.tar: shorter than its index says"):
        shards.read(6)


def test_a_compressed_tar_is_refused_with_the_remedy(folder, tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(folder / "index.json")
    with pytest.raises(Refused, match="decompress it"):
        index_tar(tmp_path / "a.tar.gz")

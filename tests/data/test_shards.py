"""Reading shards by sample number: the right bytes, few open files, pickling, and every mismatch refused by name."""

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import tarfile
import time
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
        shard, row = shards.locate(number)
        index = shards.shard_index(shard)
        with tarfile.open(folder / shards.shards[shard].name) as tar:
            member = tar.getmember(f"key-{number}.mp4")
            assert (member.offset_data, member.size) == (index.video_offsets[row], index.video_sizes[row])


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
        return sum(os.readlink(path).startswith(str(folder)) for path in paths if os.path.islink(path))

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


def edit_entry(folder: Path, **changes) -> None:
    content = json.loads((folder / "index.json").read_text())
    content["shards"][1] |= changes
    (folder / "index.json").write_text(json.dumps(content))


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "index.json").unlink(), r"holds no index\.json"),
        (lambda folder: (folder / "index.json").write_text("{"), r"index\.json: not a shard index"),
        (lambda folder: (folder / "index.json").write_text("[]"), r"index\.json: not a shard index"),
        (lambda folder: edit_index(folder, shards=[{"name": "a.tar"}]), r"index\.json: not a shard index"),
        (lambda folder: edit_index(folder, format_version=3), "format version 3 is newer than 2"),
        (lambda folder: (folder / "index.json").write_text("[" * 99_999), "its lists lie too deep in each other"),
        (lambda folder: edit_index(folder, format_version="1"), "format_version is '1', not a format version"),
        (lambda folder: edit_index(folder, classes=[1]), r"classes is \[1\], not a list of names"),
        (lambda folder: edit_index(folder, frame_rate=float("nan")), "frame_rate is nan, not frames per second"),
        (lambda folder: edit_index(folder, short_side=10**30), "short_side is 10+, not a number of pixels"),
        (lambda folder: edit_index(folder, shards=[]), r"shards is \[\], not a list of shards"),
        (lambda folder: edit_index(folder, shards=[3]), r"shards\[0\] is 3, not an object"),
        (lambda folder: edit_entry(folder, name="../a.tar"), r"shards\[1\]\.name is '\.\./a\.tar', not the name of a"),
        (lambda folder: edit_entry(folder, name="a\0.tar"), r"shards\[1\]\.name is .*, not the name of a file"),
        (lambda folder: edit_entry(folder, name="a" * 300), r"shards\[1\]\.name is .*, not the name of a file"),
        (lambda folder: edit_entry(folder, bytes=-1), r"shards\[1\]\.bytes is -1, not a number of bytes"),
        (lambda folder: edit_entry(folder, samples=True), r"shards\[1\]\.samples is True, not a number of samples"),
        (lambda folder: edit_entry(folder, samples=10**9), r"shards\[1\]\.samples is 1000000000, too many for its"),
        (lambda folder: edit_entry(folder, sha256="abc"), r"shards\[1\]\.sha256 is 'abc', not a SHA-256"),
        (lambda folder: edit_entry(folder, more=1), r"shards\[1\] holds an unknown field 'more'"),
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


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("keys", [1, 2, 3], "keys holds 1"),
        ("labels", [0, 4, 1], "sample key-4 has label 4, but the classes are 0 to 3"),
        ("labels", None, "it has no labels, but the set has classes"),
        ("frames", [0, 1, 1], "sample key-3 has 0 frames at 12.5 frames per second"),
        ("frames", [1, 1], "its columns hold 2, 3 samples where index.json says 3"),
        ("frames", "three", "frames is 'three', not a list"),
        ("frame_rates", [12.5, float("nan"), 1], "frame_rates holds nan"),
        ("frame_rates", [12.5, 1e300, 1], "frame_rates holds 1e+300"),
        ("frame_rates", [12.5, 1e-300, 1], "sample key-4 has 14 frames at 1e-300 frames per second"),
        ("video_offsets", [-1, 0, 0], "video_offsets holds -1"),
        ("video_sizes", [10**9, 10, 10], "sample key-3 lies beyond the end of its tar"),
        ("metadata_offsets", [512, 10**6, 10**6], "sample key-4 has its JSON behind its video"),
        ("frame_rates", [float("nan"), 10**400, 1], "frame_rates holds nan"),
        ("frames", [1, 10**17, 1], "frames holds 100000000000000000"),
        ("checksums", [1.5, 2, 3], "checksums holds 1.5"),
        ("others", [1, 2, 3], "'others' is no column of it"),
    ],
)
def test_a_shard_index_of_impossible_values_is_refused_though_its_hash_fits(folder, column, value, words):
    path = folder / "shard-000001.idx"
    path.write_text(json.dumps({**json.loads(path.read_text()), column: value}))
    edit_entry(folder, index_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    shards = ShardSet.open(folder)
    assert shards.read(0).key == "key-0"
    with pytest.raises(Refused) as caught:
        shards.read(4)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith(f"{words}; make the set again")


def test_a_sample_whose_json_cannot_be_read_is_bad_and_no_other(folder):
    path = folder / "shard-000001.idx"
    index = json.loads(path.read_text())
    index["metadata_sizes"][1] -= 1
    path.write_text(json.dumps(index))
    edit_entry(folder, index_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    shards = ShardSet.open(folder)
    with pytest.raises(BadSample, match=r"shard-000001\.tar: sample key-4 has a JSON that cannot be read \(no JSON: "):
        shards.read(4)
    assert [shards.read(number).key for number in (3, 5)] == ["key-3", "key-5"]


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


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The seconds that a reader asked to sleep, which take no time here."""
    asked: list[float] = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


def test_a_file_handle_that_went_bad_is_replaced_by_a_new_one(folder, pauses, caplog):
    """Reading a folder fails as a stale handle on a network file system does: until the file is opened anew."""
    shards = ShardSet.open(folder)
    shards.read(0)
    of_folder = os.open(folder, os.O_RDONLY)
    for name in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{name}") == str(folder / "shard-000000.tar"):
            os.dup2(of_folder, int(name))
    os.close(of_folder)
    assert shards.read(1).key == "key-1"
    assert len(pauses) == 1
    (said,) = caplog.messages
    assert "shard-000000.tar: cannot be read (Is a directory); trying again in" in said
    check_all(shards)


@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_a_file_that_comes_back_within_the_pauses_is_read(folder, monkeypatch, suffix):
    shards = ShardSet.open(folder)
    path, away = folder / f"shard-000001.{suffix}", folder / "away"
    path.rename(away)
    path.mkdir()
    pauses = []

    def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 3:
            path.rmdir()
            away.rename(path)

    monkeypatch.setattr(time, "sleep", sleep)
    assert shards.read(4).key == "key-4"
    assert pauses == sorted(set(pauses)), "longer each time"


@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_a_file_that_stays_unreadable_is_told_in_one_line_that_names_it(folder, pauses, suffix):
    shards = ShardSet.open(folder)
    path = folder / f"shard-000001.{suffix}"
    path.unlink()
    path.mkdir()
    with pytest.raises(
        TubeletError, match=r"cannot be read \(Is a directory\), .*; check the disk or network"
    ) as caught:
        shards.read(4)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(pauses) == 3
    assert shards.read(0).key == "key-0", "the other shards are not concerned"


def write_tar(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for suffix, content in members.items():
            member = tarfile.TarInfo(f"key.{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


METADATA = b'{"frames": 1, "frame_rate": 1}'


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({}, "holds no sample"),
        ({"json": METADATA}, "sample key lacks its mp4"),
        ({"json": b"{", "mp4": b"video"}, "the json or cls of sample key is damaged"),
        ({"json": b"[]", "mp4": b"video"}, "the json or cls of sample key is damaged"),
        ({"json": b"{}", "mp4": b"video"}, "the json or cls of sample key is damaged"),
        ({"mp4": b"video", "json": METADATA}, "the json or cls of sample key is damaged"),
        ({"json": METADATA, "mp4": b"video", "cls": b"run"}, "the json or cls of sample key is damaged"),
    ],
    ids=["empty", "no video", "cut json", "a list", "no frames", "video first", "no class number"],
)
def test_a_tar_that_is_no_shard_is_refused_by_name(tmp_path, members, words):
    path = write_tar(tmp_path / "shard.tar", **members)
    with pytest.raises(Refused, match=words) as caught:
        index_tar(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("; pack the videos again")


def test_a_compressed_tar_is_refused_with_the_remedy(folder, tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(folder / "index.json")
    with pytest.raises(Refused, match="decompress it"):
        index_tar(tmp_path / "a.tar.gz")

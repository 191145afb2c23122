"""Shards that a disk, a copy or a person damaged: what opening, reading for training and `tubelet check` make of it.

Each damage is met twice: by a set that is opened after it, and by one that was open before, as in a run under way.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from launch.cli import main
from pretrain.data import local_files
from pretrain.data.clips import ClipConfig
from pretrain.data.config import DataConfig
from pretrain.data.loader import MicroBatches, training_batches
from pretrain.data.order import Mixture, Order
from pretrain.data.pack import PackConfig, pack
from pretrain.data.shards import ShardSet
from pretrain.data.training_clips import Request, TrainingClips
from pretrain.errors import Refused, TubeletError
from tests.videos import make_video

CONFIG = DataConfig(
    clip=ClipConfig(frames=2, stride=1, size=16), global_batch=4, micro_batch=4, lanes=2, shards_per_window=2, workers=0
)


def pack_set(folder: Path, first_seed: int) -> Path:
    """Six shards of two samples each, in two classes."""
    for number in range(12):
        name = f"{'jump' if number % 2 else 'run'}/{number}.mp4"
        make_video(folder / "videos" / name, frames=8, height=32, width=32, seed=first_seed + number)
    pack(PackConfig(source=str(folder / "videos"), out=str(folder / "shards"), samples_per_shard=2, jobs=1))
    return folder / "shards"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return pack_set(tmp_path_factory.mktemp("set"), 0)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """A set whose videos, and so its shards, have the same names as those of `packed`, and other content."""
    return pack_set(tmp_path_factory.mktemp("others"), 100)


@pytest.fixture
def folder(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def equally_large(folder: Path) -> tuple[Path, Path]:
    """The first two tars of one size: opening, which looks at sizes, cannot tell them apart."""
    by_size: dict[int, Path] = {}
    for tar in sorted(folder.glob("*.tar")):
        other = by_size.setdefault(tar.stat().st_size, tar)
        if other != tar:
            return other, tar
    raise AssertionError("no two shards are equally large")


def swap_tars(folder: Path, others: Path) -> None:
    swap(*equally_large(folder))


def swap_tars_and_indexes(folder: Path, others: Path) -> None:
    one, other = equally_large(folder)
    swap(one, other)
    swap(one.with_suffix(".idx"), other.with_suffix(".idx"))


def truncate(folder: Path, others: Path) -> None:
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:2000])


def flip_a_bit(folder: Path, others: Path) -> None:
    path = folder / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[ShardSet.open(folder).shard_index(1).video_offsets[0] + 50] ^= 4
    path.write_bytes(content)


def remove(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, others: (folder / name).unlink()


def empty(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, others: (folder / name).write_bytes(b"")


def replace(name: str) -> Callable[[Path, Path], None]:
    """Puts the file of that name from the other set there."""
    return lambda folder, others: shutil.copyfile(others / name, folder / name)


class Drill(NamedTuple):
    """A damage, and what comes of it; None where nothing does."""

    damage: Callable[[Path, Path], object]
    opening: str | None
    """What opening says."""
    reading: str | int | None
    """What reading says with which it ends, or how many samples are bad and have substitutes."""
    check: str
    """What `tubelet check` says."""


TAR, IDX = "shard-000001.tar", "shard-000001.idx"
OTHER_IDX = f"{IDX}: not the file that index.json names"
DRILLS = {
    "truncated": Drill(truncate, f"{TAR}: 2000 bytes, but", f"{TAR}: shorter than", f"{TAR}: 2000 bytes where"),
    "flipped bit": Drill(flip_a_bit, None, 1, f"{TAR}: its SHA-256 is not the one in index.json"),
    "swapped": Drill(swap_tars, None, 4, ".tar: its SHA-256 is not the one in index.json"),
    "swapped with indexes": Drill(
        swap_tars_and_indexes, None, "not the file that index.json names", ".idx: not the file that index.json names"
    ),
    "missing": Drill(remove(TAR), f"{TAR}: missing", f"{TAR}: cannot be read (No such file", f"{TAR}: missing"),
    "empty": Drill(empty(TAR), f"{TAR}: 0 bytes, but", f"{TAR}: shorter than its index", f"{TAR}: 0 bytes where"),
    "index missing": Drill(remove(IDX), f"{IDX}: missing", f"{IDX}: missing", f"{IDX}: missing"),
    "index empty": Drill(empty(IDX), None, OTHER_IDX, OTHER_IDX),
    "index of other data": Drill(replace(IDX), None, OTHER_IDX, OTHER_IDX),
    "index.json missing": Drill(remove("index.json"), "holds no index.json", None, "holds no index.json"),
    "index.json empty": Drill(empty("index.json"), "index.json: not a shard index", None, "not a shard index"),
}


def read_all(shards: ShardSet) -> str | set[str]:
    """Reads every sample as training does; returns the keys of those passed over, or what it ends with."""
    clips = TrainingClips(shards, CONFIG, seed=0)
    skipped: set[str] = set()
    try:
        for number in range(shards.samples):
            loaded = clips[Request(number, 0, number)]
            assert loaded.clips[0].shape == (2, 16, 16, 3)
            skipped |= {report["key"] for report in loaded.skipped}
    except TubeletError as error:
        return str(error)
    return skipped


def assert_reads(shards: ShardSet, expected: str | int | None) -> None:
    outcome = read_all(shards)
    if isinstance(expected, str):
        assert isinstance(outcome, str)
        assert expected in outcome
        assert outcome.startswith(f"{shards.folder}/"), "it names the file"
        assert "\n" not in outcome
    else:
        assert isinstance(outcome, set), outcome
        assert len(outcome) == (expected or 0)


@pytest.mark.parametrize("drill", DRILLS.values(), ids=DRILLS.keys())
def test_a_damaged_set_is_refused_or_read_around_and_the_file_is_named(
    folder, others, capsys, monkeypatch, drill: Drill
):
    monkeypatch.setattr(local_files, "RETRY_AFTER_S", (0.01,))
    open_before = ShardSet.open(folder)
    drill.damage(folder, others)
    assert_reads(open_before, drill.reading)
    if drill.opening is None:
        assert_reads(ShardSet.open(folder), drill.reading)
    else:
        with pytest.raises(Refused) as caught:
            ShardSet.open(folder)
        assert drill.opening in str(caught.value)
    capsys.readouterr()
    assert main(["check", str(folder), "--jobs", "1", "--decode", "none"]) in (1, 2)
    said = capsys.readouterr().err
    assert drill.check in said.replace("\n", "")
    assert "Traceback" not in said


def test_an_index_json_of_other_data_is_refused_even_if_names_and_sizes_are_the_same(folder, others, capsys):
    content = json.loads((others / "index.json").read_text())
    for entry in content["shards"]:
        entry["bytes"] = (folder / entry["name"]).stat().st_size
    (folder / "index.json").write_text(json.dumps(content))
    assert_reads(ShardSet.open(folder), "shard-000000.idx: not the file that index.json names")
    assert main(["check", str(folder), "--jobs", "1", "--decode", "none"]) == 1
    said = capsys.readouterr().err
    assert all(f"shard-{number:06d}.idx: not the file that index.json names" in said for number in range(6))


def test_a_mixture_of_sets_whose_shards_have_the_same_names_never_mixes_them_up(packed, others):
    sets = [ShardSet.open(packed), ShardSet.open(others)]
    assert [shard.name for shard in sets[0].shards] == [shard.name for shard in sets[1].shards]
    keys = [[shards.key(number) for number in range(12)] for shards in sets]
    assert set(keys[0]) == set(keys[1]), "not even the keys tell the sets apart"
    order = Mixture(tuple(Order(shards.samples_per_shard, number, 1, 2, 2) for number, shards in enumerate(sets)))
    requests = MicroBatches(order, range(6), 4, 1, 0)
    asked = [request for batch in requests for request in batch]
    assert {request.set_number for request in asked} == {0, 1}
    batches = list(training_batches(TrainingClips(sets, CONFIG, seed=0), requests))
    read = [clip.numpy() for batch in batches for clip in batch.clips]
    alone = [TrainingClips([one, one], CONFIG, seed=0) for one in sets]  # the keys of draws hold the set's number
    for clip, request in zip(read, asked, strict=True):
        right, wrong = alone[request.set_number], alone[1 - request.set_number]
        assert np.array_equal(clip, right[request].clips[0].numpy())
        assert not np.array_equal(clip, wrong[request].clips[0].numpy())

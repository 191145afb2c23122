"""`tubelet check` on real shards: nothing to say of a good set, and each kind of damage named by shard and sample."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from launch.cli import main
from pretrain.data.check import CheckConfig, CheckReport, check
from pretrain.data.pack import PackConfig, pack
from pretrain.data.shard_writer import index_tar
from pretrain.data.shards import ShardSet
from tests.conftest import PACKED_VIDEOS
from tests.videos import make_video


@pytest.fixture
def folder(packed_shards, tmp_path) -> Path:
    return Path(shutil.copytree(packed_shards, tmp_path / "shards"))


def check_folder(folder: Path, **options) -> CheckReport:
    return check(CheckConfig(str(folder), jobs=1, **options))


def lines(report: CheckReport) -> list[str]:
    return [str(problem) for problem in report.problems]


def edit(folder: Path, shard: int = 0, **columns) -> None:
    """Changes columns of a shard's index, and index.json with it, so that all hashes fit."""
    content = json.loads((folder / "index.json").read_text())
    entry = content["shards"][shard]
    path = folder / entry["name"].replace(".tar", ".idx")
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, **{name: change(index[name]) for name, change in columns.items()}}))
    entry["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(content))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("decode", ["three", "all"])
def test_a_good_set_has_no_problem(folder, capsys, decode):
    assert main(["check", str(folder), "--decode", decode, "--jobs", "1"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "all is well" in said.err
    assert ShardSet.open(folder).fingerprint in said.err.replace("\n", "")


def test_a_flipped_bit_is_found_in_its_sample_and_in_the_tar(folder, capsys):
    shards = ShardSet.open(folder)
    index = shards.shard_index(1)
    flip(folder / "shard-000001.tar", index.video_offsets[2] + 100)
    assert main(["check", str(folder), "--jobs", "1"]) == 1
    said = capsys.readouterr().err
    assert "shard-000001.tar: its SHA-256 is not the one in index.json; restore it from a copy" in said
    assert f"shard-000001.tar: sample {index.keys[2]}: its checksum differs, so its bytes were changed; " in said
    assert "2 │ listed above" in said


def test_a_bit_between_the_samples_is_found_in_the_tar_alone(folder):
    index = ShardSet.open(folder).shard_index(1)
    flip(folder / "shard-000001.tar", index.metadata_offsets[1] - 600)  # in a header or padding before the JSON
    assert lines(check_folder(folder))[0].startswith("shard-000001.tar: ")


def test_a_truncated_tar_loses_the_samples_at_its_end_only(folder):
    index = ShardSet.open(folder).shard_index(0)
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[: index.video_offsets[2] + 10])
    report = check_folder(folder)
    said = lines(report)
    assert said[0].startswith(f"shard-000000.tar: {index.video_offsets[2] + 10} bytes where index.json says ")
    beyond = [f"shard-000000.tar: sample {key}: lies beyond the end of the tar" for key in index.keys[2:]]
    assert [line.split(";")[0] for line in said[1:]] == beyond
    assert report.reached == PACKED_VIDEOS - len(beyond)


def test_missing_files_are_named_and_their_samples_are_not_reached(folder):
    (folder / "shard-000000.tar").unlink()
    (folder / "shard-000001.idx").unlink()
    flip(folder / "shard-000002.idx", 30)
    report = check_folder(folder)
    assert [line.split(";")[0] for line in lines(report)] == [
        "shard-000000.tar: missing",
        "shard-000001.idx: missing",
        "shard-000002.idx: not the file that index.json names (its hash differs)",
    ]
    assert report.reached == 0


def test_an_index_that_does_not_tell_the_truth_is_found_though_all_hashes_fit(folder):
    keys = ShardSet.open(folder).shard_index(0).keys
    edit(
        folder,
        0,
        frames=lambda frames: [frames[0] + 1, *frames[1:]],
        labels=lambda labels: [labels[0], 7, *labels[2:]],
        frame_rates=lambda rates: [*rates[:2], 0, *rates[3:]],
        widths=lambda widths: [*widths[:3], 66],
    )
    edit(folder, 1, keys=lambda others: [keys[3], *others[1:]], video_sizes=lambda sizes: [*sizes[:3], sizes[3] - 1])
    edit(folder, 2, keys=lambda keys: keys[1:])
    moved = ShardSet.open(folder).shard_index(1).keys[3]
    said = lines(check_folder(folder))
    frames = ShardSet.open(folder, check_files=False).shard_index(0).frames[0]
    for line in (
        f"shard-000000.tar: sample {keys[0]}: holds {frames - 1} frames where the index says {frames}; make the set",
        f"shard-000000.tar: sample {keys[1]}: has label 7, but the classes are 0 to 1; make the set again",
        f"shard-000000.tar: sample {keys[2]}: its JSON gives other frames, another frame rate or another size than",
        f"shard-000000.tar: sample {keys[3]}: its frames are 64 x 48 pixels where the index says 66 x 48; make the",
        f"shard-000001.tar: sample {keys[3]}: its key stands twice in the set; make the set again",
        f"shard-000001.tar: sample {keys[3]}: no video of that key lies in the tar where the index says; restore it",
        f"shard-000001.tar: sample {moved}: no video of that key lies in the tar where the index says; restore it",
        "shard-000002.idx: not the index of its shard: its columns hold 2, 3 samples where index.json says 3; restore",
    ):
        assert any(one.startswith(line) for one in said), (line, said)
    assert any(one.startswith(f"shard-000000.tar: sample {keys[2]}: has ") for one in said)


def test_an_index_without_the_labels_of_its_set_and_a_wrong_count_are_found(folder):
    edit(folder, 0, labels=lambda labels: None)
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**content, "samples": 12}))
    said = lines(check_folder(folder, decode="none"))
    assert len(said) == 2
    assert said[0].startswith("index.json: states 12 samples, but its shards hold 11; ")
    assert said[1].startswith("shard-000000.tar: has no labels, but the set has classes; make the set again with")


def test_a_video_that_does_not_decode_is_found_though_all_checksums_fit(tmp_path):
    """The set is indexed anew over a tar in which a video is damaged, as by a broken packer."""
    for number in range(3):
        make_video(tmp_path / f"videos/{number}.mp4", frames=30, seed=number)
    folder = tmp_path / "shards"
    pack(PackConfig(source=str(tmp_path / "videos"), out=str(folder), jobs=1))
    path = folder / "shard-000000.tar"
    before = ShardSet.open(folder).shard_index(0)
    content = bytearray(path.read_bytes())
    start = before.video_offsets[1]
    content[start : start + 40] = bytes(40)
    path.write_bytes(content)
    index = index_tar(path)
    (folder / "shard-000000.idx").write_bytes(index.to_bytes())
    described = json.loads((folder / "index.json").read_text())
    described["shards"][0] |= {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "index_sha256": hashlib.sha256(index.to_bytes()).hexdigest(),
    }
    (folder / "index.json").write_text(json.dumps(described))
    report = check_folder(folder)
    assert [problem.key for problem in report.problems] == [before.keys[1]]
    assert "PyAV cannot open it" in report.problems[0].reason
    assert report.problems[0].remedy == "make the set again with `tubelet pack` or `tubelet index`"


def test_a_decoder_that_makes_no_progress_costs_its_sample_only(tmp_path):
    for number in range(2):
        make_video(tmp_path / f"videos/{number}.mp4", frames=8, seed=number)
    pack(PackConfig(source=str(tmp_path / "videos"), out=str(tmp_path / "shards"), jobs=1))
    report = check_folder(tmp_path / "shards", stall_s=1e-6)
    assert [problem.key is not None for problem in report.problems] == [True, True]
    assert all("makes no progress for 1e-06 s" in line for line in lines(report))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere"], "/nowhere: no such folder"),
        (["EMPTY"], "holds no index.json, so it is not a finished shard set"),
        (["DAMAGED"], "not a shard index"),
        (["EMPTY", "--decode", "four"], "decode: "),
        (["EMPTY", "--stall-s", "0"], "stall_s: 0.0 does not do"),
        (["EMPTY", "--jobs", "-1"], "jobs: -1 does not do"),
        (["EMPTY", "more"], "more: is one folder too many; give SHARDS"),
        ([], "SHARDS: missing; see tubelet check --help"),
    ],
)
def test_what_is_no_set_of_shards_is_refused_in_one_line(tmp_path, capsys, arguments, words):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "DAMAGED").mkdir()
    (tmp_path / "DAMAGED/index.json").write_text("[]")
    folders = {name: str(tmp_path / name) for name in ("EMPTY", "DAMAGED")}
    assert main(["check", *(folders.get(argument, argument) for argument in arguments)]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1

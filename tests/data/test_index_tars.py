"""`tubelet index` on tars that webdataset and others wrote: indexed in place, truthfully, and fit to train on."""

import gzip
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import webdataset

from launch.cli import main
from pretrain.data import index_tars
from pretrain.data.check import CheckConfig, check
from pretrain.data.index_tars import IndexConfig, IndexSummary, index
from pretrain.data.inspection import read_indexes
from pretrain.data.shards import ShardSet
from pretrain.errors import Refused
from tests.runs import tiny_pretraining
from tests.videos import make_video

Members = dict[str, bytes]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[bytes]:
    """Six videos: 12 to 17 frames at 12 frames a second, 48 x 64; the last is VP9 at 24, 40 x 32."""
    folder = tmp_path_factory.mktemp("videos")
    paths = [make_video(folder / f"{number}.mp4", frames=12 + number, seed=number) for number in range(5)]
    paths.append(make_video(folder / "5.webm", frames=17, frame_rate=24, height=40, width=32, codec="libvpx-vp9"))
    return [path.read_bytes() for path in paths]


def write_tar(path: Path, samples: dict[str, Members]) -> Path:
    """Writes members as they are given, whatever their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def index_folder(folder: Path, out: Path | None = None, **options) -> IndexSummary:
    return index(IndexConfig([str(folder)], str(out or folder), jobs=1, **options))


@pytest.fixture
def foreign(videos, tmp_path) -> Path:
    """Two tars by webdataset's writer, the video before what belongs to it, and a reason or two to be careful."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name, numbers in (("00000", (0, 1, 2)), ("00001", (3, 4, 5))):
        with webdataset.TarWriter(str(folder / f"{name}.tar"), encoder=False) as writer:
            for number in numbers:
                suffix = "webm" if number == 5 else "mp4"
                writer.write(
                    {
                        "__key__": f"part/clip{number}",
                        suffix: videos[number],
                        "txt": f"a caption of {number}".encode(),
                        "json": json.dumps({"action": {"name": "jump" if number % 2 else "run"}}).encode(),
                        "cls": str(number % 2).encode() + b"\n",
                    }
                )
    return folder


def test_a_tar_that_goes_away_while_it_is_indexed_ends_it_with_one_line(foreign, monkeypatch, capsys):
    number_classes = index_tars._number_classes

    def go_away(*arguments):
        (foreign / "00001.tar").unlink()
        return number_classes(*arguments)

    monkeypatch.setattr(index_tars, "_number_classes", go_away)
    assert main(["index", str(foreign), "--jobs", "1"]) == 1
    said = capsys.readouterr().err
    assert f"tubelet: {foreign / '00001.tar'}: cannot be read (No such file or directory); see whether" in said
    assert "Traceback" not in said
    assert {path.name for path in foreign.iterdir()} == {"00000.tar"}


def test_tars_are_indexed_in_place_and_stay_as_they_are(foreign, videos, capsys):
    before = {path.name: path.read_bytes() for path in foreign.iterdir()}
    assert main(["index", str(foreign), "--jobs", "1"]) == 0
    assert "2 tars, 2 classes" in capsys.readouterr().err
    assert {path.name for path in foreign.iterdir()} == {*before, "00000.idx", "00001.idx", "index.json"}
    assert all((foreign / name).read_bytes() == content for name, content in before.items())
    shards = ShardSet.open(foreign)
    assert (shards.classes, shards.labels()) == (("0", "1"), [0, 1, 0, 1, 0, 1])
    for number in range(6):
        sample = shards.read(number)
        assert (sample.key, sample.video, sample.metadata) == (f"part/clip{number}", videos[number], {})
        assert (sample.frames, sample.frame_rate) == (12 + number, 24 if number == 5 else 12)


def test_the_index_says_that_nothing_was_resampled_and_how_large_the_videos_are(foreign):
    summary = index_folder(foreign)
    assert (summary.shards.frame_rate, summary.shards.resampled, summary.shards.short_side) == (None, False, 48)
    assert summary.codecs == {"h264": 5, "vp9": 1}
    inspection = read_indexes(summary.shards)
    assert inspection.sizes == {(64, 48): 5, (32, 40): 1}
    assert inspection.frame_rates == Counter({12.0: 5, 24.0: 1})
    assert check(CheckConfig(str(foreign), decode="all", jobs=1)).problems == ()
    content = bytearray((foreign / "00001.tar").read_bytes())
    content[summary.shards.shard_index(1).video_offsets[0] + 60] ^= 255
    (foreign / "00001.tar").write_bytes(content)
    found = [problem.subject for problem in check(CheckConfig(str(foreign), jobs=1)).problems]
    assert found == ["00001.tar", "00001.tar: sample part/clip3"]


def test_a_run_trains_on_tars_of_others(foreign, tmp_path):
    out = tmp_path / "index"
    index_folder(foreign, out, label_field="json.action.name")
    assert ShardSet.open(out).classes == ("jump", "run")
    assert [link.readlink() for link in sorted(out.glob("*.tar"))] == [
        Path("../foreign/00000.tar"),
        Path("../foreign/00001.tar"),
    ]
    recipe = tiny_pretraining(tmp_path, out)
    run = tmp_path / "run"
    assert main(["pretrain", "--config", str(recipe), "--out", str(run), "--steps", "4"]) == 0
    assert (run / "summary.json").exists()
    assert not (run / "skipped.jsonl").exists() or not (run / "skipped.jsonl").read_text()


@pytest.mark.parametrize(
    ("members", "options", "classes", "labels"),
    [
        ({"txt": ["run", "jump ", "run\n"]}, {"label_field": "txt", "classes": "sit,run,jump"}, 3, [1, 2, 1]),
        ({"json": ['{"label": 2}'] * 3}, {"label_field": "json.label"}, ("0", "1", "2"), [2, 2, 2]),
        ({"cls": ["1", "0", "1"]}, {"classes": "a,b,c"}, 3, [1, 0, 1]),
        ({"cls": ["1", "0", "1"]}, {"unlabelled": True}, (), None),
        ({"txt": ["a caption", "another", "a third"]}, {}, (), None),
    ],
    ids=["text of given classes", "numbers in json", "names for numbers", "unlabelled", "captions"],
)
def test_labels_come_from_where_they_are_said_to_be(videos, tmp_path, members, options, classes, labels):
    ((suffix, contents),) = members.items()
    samples = {f"k{n}": {"mp4": videos[n], suffix: content.encode()} for n, content in enumerate(contents)}
    write_tar(tmp_path / "in/a.tar", samples)
    shards = index_folder(tmp_path / "in", **options).shards
    assert (len(shards.classes) if isinstance(classes, int) else shards.classes) == classes
    assert (shards.labels() if shards.labelled else None) == labels


def test_what_cannot_be_read_is_listed_with_its_reason_and_left_out(videos, tmp_path, capsys):
    folder = tmp_path / "in"
    good = {"mp4": videos[0], "cls": b"1"}
    samples = {
        "good": good,
        "broken": {"mp4": videos[1][:300], "cls": b"1"},
        "unlabelled": {"mp4": videos[1]},
        "captioned": {"txt": b"a caption", "cls": b"0"},
        "strange": {"mp4": videos[2], "cls": b"\xff"},
    }
    write_tar(folder / "a.tar", samples)
    write_tar(folder / "b.tar", {"other": good, "twice": good})
    with tarfile.open(folder / "b.tar", "a") as tar:
        member = tarfile.TarInfo("twice.mp4")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    cut = write_tar(folder / "c.tar", {"whole": good, "cut": good})
    cut.write_bytes(cut.read_bytes()[: 512 + len(videos[0]) * 2])
    (folder / "d.tar").write_bytes(b"no tar at all" * 100)
    assert main(["index", str(folder), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 0
    capsys.readouterr()
    shards = ShardSet.open(tmp_path / "out")
    assert [shards.key(number) for number in range(shards.samples)] == ["good", "other", "whole"]
    lines = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    reasons = {entry["source"]: entry["reason"] for entry in map(json.loads, lines)}
    for source, words in {
        "a.tar/broken": "PyAV cannot open it",
        "a.tar/unlabelled": "has no cls, so no label",
        "a.tar/captioned": "holds no video, only cls, txt",
        "a.tar/strange": "its cls cannot be read",
        "b.tar/twice": "its mp4 stands twice in the tar",
        "c.tar/cut": "is cut off at the end of the tar",
        "c.tar": "not a whole tar (unexpected end of data)",
        "d.tar": "not a whole tar",
    }.items():
        assert words in reasons.pop(source)
    assert reasons == {}
    assert check(CheckConfig(str(tmp_path / "out"), jobs=1)).problems == (), "what is left out is no problem of the set"


def test_keys_that_stand_in_two_tars_are_told_apart(videos, tmp_path):
    for number, name in enumerate(("a", "b")):
        write_tar(tmp_path / f"in/{name}.tar", {"000": {"mp4": videos[number]}})
    shards = index_folder(tmp_path / "in").shards
    assert [shards.key(number) for number in range(2)] == ["a/000", "b/000"]
    assert check(CheckConfig(str(tmp_path / "in"), jobs=1)).problems == ()


def test_a_decoder_that_makes_no_progress_costs_its_sample_only(videos, tmp_path):
    write_tar(tmp_path / "in/a.tar", {"0": {"mp4": videos[0]}})
    with pytest.raises(Refused, match=r"no sample of 1 tars can be indexed .*makes no progress for 1e-06 s"):
        index_folder(tmp_path / "in", stall_s=1e-6)
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.tar"]


def compressed(folder: Path) -> None:
    (folder / "a.tar").write_bytes(gzip.compress((folder / "a.tar").read_bytes()))


@pytest.mark.parametrize(
    ("prepare", "options", "words"),
    [
        (compressed, {}, "compressed, so no sample can be read by itself; `gunzip` it first"),
        (lambda folder: (folder / "a.tar").rename(folder / "a.tar.gz"), {}, "holds no .tar file .but a.tar.gz; decomp"),
        (lambda folder: (folder / "index.json").touch(), {}, "holds index.json already; remove index.json to index"),
        (lambda folder: (folder / "pack.json").touch(), {}, "holds pack.json already; name another folder"),
        (lambda folder: (folder / "a.idx").write_text("0 1 2"), {}, "is no index of Tubelet's; name another folder"),
        (None, {"out": "elsewhere"}, "is there already and is another file than"),
        (None, {"classes": "a,b"}, "sample 0: label '2' is none of the 2 classes; mend it, name all --classes, or"),
        (None, {"label_field": "json.label"}, "no sample of 1 tars can be indexed .a.tar/0: has no json, so no label"),
        (None, {"label_field": "action"}, "label_field: action does not do; use cls, txt, or json.FIELD"),
        (None, {"unlabelled": True, "classes": "a,b"}, "unlabelled: takes neither label_field nor classes"),
        (None, {"tars": ["/nowhere.tar"]}, "/nowhere.tar: no such file or folder"),
        (None, {"tars": []}, "tars: nothing to index"),
    ],
)
def test_what_cannot_be_indexed_is_refused_and_nothing_is_written(videos, tmp_path, prepare, options, words):
    folder = tmp_path / "in"
    write_tar(folder / "a.tar", {"0": {"mp4": videos[0], "cls": b"2"}})
    write_tar(tmp_path / "elsewhere/a.tar", {})
    if prepare is not None:
        prepare(folder)
    before = sorted(folder.iterdir())
    changed = options | ({"out": str(tmp_path / options["out"])} if "out" in options else {})
    with pytest.raises(Refused, match=words):
        index(IndexConfig(**{"tars": [str(folder)], "out": str(folder), "jobs": 1} | changed))
    assert sorted(folder.iterdir()) == before


def test_a_folder_for_the_index_that_cannot_be_is_refused_in_one_line(foreign, capsys):
    assert main(["index", str(foreign), "--jobs", "1", "--unlabelled", "--out", "x" * 300]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tubelet: ")]
    assert "cannot be written (File name too long); name another folder" in line


def test_tars_are_named_one_by_one_and_a_missing_folder_for_the_index_is_refused(videos, tmp_path, capsys):
    tars = [write_tar(tmp_path / f"in/{name}.tar", {name: {"mp4": videos[0]}}) for name in "abc"]
    assert main(["index", *map(str, tars[:2]), "--out", str(tmp_path / "out"), "--jobs=1"]) == 0
    assert ShardSet.open(tmp_path / "out").samples == 2
    capsys.readouterr()
    assert main(["index", str(tars[0])]) == 2
    said = capsys.readouterr().err
    assert "out" in said
    assert said.count("\n") == 1

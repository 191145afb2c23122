"""Packing real videos: byte-identical shards, what webdataset reads back, labels, rejected files, and refusals."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pretrain.data.pack import PackConfig, pack
from pretrain.data.pack_folder import PackFolder, Rejection
from pretrain.data.shards import ShardSet
from pretrain.data.video import open_video
from pretrain.errors import DiskFull, Refused, TubeletError
from tests.videos import make_video, moving_square, truncate


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Two classes of four videos each, and one broken file."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(8):
        name = f"{'jump' if number % 2 else 'run'}/clip.{number}.mp4"
        make_video(folder / name, frames=8 + number, frame_rate=8, seed=number)
    truncate(make_video(folder / "run/broken.mp4"), 0.5)
    return folder


@pytest.fixture(scope="module")
def packed(videos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack(PackConfig(source=str(videos), out=str(out), samples_per_shard=4, jobs=1))
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_runs_with_other_jobs_and_another_folder_give_the_same_bytes(videos, packed, tmp_path):
    (tmp_path / "elsewhere").symlink_to(videos)
    pack(PackConfig(source=str(tmp_path / "elsewhere"), out=str(tmp_path / "out"), samples_per_shard=4, jobs=2))
    assert content(tmp_path / "out") == content(packed)
    assert not any(str(videos).encode() in value for value in content(packed).values()), "no path of this machine"


def test_webdataset_alone_reads_what_was_packed(packed):
    shards = ShardSet.open(packed)
    urls = [str(packed / shard.name) for shard in shards.shards]
    samples = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    assert len(samples) == shards.samples == 8
    for number in range(shards.samples):
        ours, theirs = shards.read(number), samples[shards.key(number)]
        assert (ours.video, str(ours.label).encode()) == (theirs["mp4"], theirs["cls"])
        assert ours.metadata == json.loads(theirs["json"])


def test_labels_sources_and_counts_are_those_of_the_input(packed):
    shards = ShardSet.open(packed)
    assert (shards.classes, shards.frame_rate, shards.short_side, shards.resampled) == (
        ("jump", "run"),
        None,
        256,
        False,
    )
    for number, label in enumerate(shards.labels()):
        sample = shards.read(number)
        folder, name = sample.metadata["source"].split("/")
        assert label == sample.label == shards.classes.index(folder)
        assert sample.frames == sample.metadata["frames"] == 8 + int(name.split(".")[1])
        assert (sample.frame_rate, sample.metadata["height"], sample.metadata["width"]) == (8, 48, 64)


def test_rejected_files_are_listed_and_in_no_shard(packed):
    (line,) = (packed / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["source"] == "run/broken.mp4"
    assert "moov atom not found" in json.loads(line)["reason"]
    shards = ShardSet.open(packed)
    assert "run/broken.mp4" not in {shards.read(number).metadata["source"] for number in range(shards.samples)}


def test_a_finished_pack_says_so_and_a_changed_one_is_refused(videos, packed):
    before = content(packed)
    config = {"source": str(videos), "out": str(packed), "samples_per_shard": 4}
    summary = pack(PackConfig(**config))
    assert (summary.finished_before, summary.accepted, len(summary.rejected)) == (True, 8, 1)
    with pytest.raises(Refused, match="packed with short_side 256, now 128"):
        pack(PackConfig(**config, short_side=128))
    with pytest.raises(Refused, match="another folder"):
        pack(PackConfig(**config, unlabelled=True))
    assert content(packed) == before


def test_a_frame_rate_is_given_to_all_and_noted(videos, tmp_path):
    make_list = tmp_path / "list.txt"
    make_list.write_text("run/clip.0.mp4 1\njump/clip.1.mp4 0\n")
    pack(PackConfig(source=str(videos), list=str(make_list), out=str(tmp_path / "out"), fps=4, short_side=32, jobs=1))
    shards = ShardSet.open(tmp_path / "out")
    assert (shards.classes, shards.frame_rate, shards.short_side, shards.resampled) == (("0", "1"), 4.0, 32, True)
    assert {shards.read(number).frame_rate for number in range(2)} == {4.0}


def test_an_unlabelled_set_has_no_labels(videos, tmp_path):
    pack(PackConfig(source=str(videos / "jump"), out=str(tmp_path / "out"), jobs=1))
    shards = ShardSet.open(tmp_path / "out")
    assert (shards.labelled, shards.classes, shards.read(0).label) == (False, (), None)
    assert not list((tmp_path / "out").glob("rejected*"))
    with pytest.raises(Refused, match="no labels"):
        shards.labels()


def test_a_folder_without_one_good_video_is_refused_and_leaves_nothing(tmp_path):
    truncate(make_video(tmp_path / "videos/broken.mp4"), 0.5)
    with pytest.raises(Refused, match="none of the 1 videos can be packed"):
        pack(PackConfig(source=str(tmp_path / "videos"), out=str(tmp_path / "out"), jobs=1))
    assert not (tmp_path / "out").exists()


def test_videos_that_go_away_while_packing_stop_it_and_are_not_bad(tmp_path, monkeypatch):
    folder = tmp_path / "videos"
    for number in range(6):
        make_video(folder / f"{number}.mp4", frames=6, seed=number)
    (tmp_path / "list.txt").write_text("".join(f"{number}.mp4\n" for number in range(7)))
    out = tmp_path / "out"
    options = {"samples_per_shard": 2, "jobs": 1, "unlabelled": True, "list": str(tmp_path / "list.txt")}
    config = PackConfig(source=str(folder), out=str(out), **options)
    taking = PackFolder.taking

    def unmount(*arguments):
        folder.rename(tmp_path / "unmounted")
        return taking(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(PackFolder, "taking", unmount)
        with pytest.raises(TubeletError, match=r"mp4 is gone; see whether its disk is still mounted; 0 of 4 shards"):
            pack(config)
    assert not (out / "index.json").exists()
    (tmp_path / "unmounted").rename(folder)
    summary = pack(config)
    assert summary.accepted == 6
    assert [rejection.source for rejection in summary.rejected] == ["6.mp4"], "it was never there"


def test_what_a_pack_made_of_folders_is_told(tmp_path, capsys):
    make_video(tmp_path / "videos/jump/a.mp4", frames=6)
    make_video(tmp_path / "videos/b.mp4", frames=6)
    pack(PackConfig(source=str(tmp_path / "videos"), out=str(tmp_path / "out"), jobs=1))
    assert "unlabelled: b.mp4 lies in no class folder" in capsys.readouterr().err
    (tmp_path / "videos/b.mp4").rename(tmp_path / "videos/jump/b.mp4")
    with pytest.raises(Refused, match=r"packed with other classes \(number 0 was none, now jump\); name another"):
        pack(PackConfig(source=str(tmp_path / "videos"), out=str(tmp_path / "out"), jobs=1))


def test_nothing_is_taken_from_a_pack_without_one_good_video_that_was_killed_at_its_end(videos, tmp_path, monkeypatch):
    truncate(make_video(tmp_path / "bad/0.mp4"), 0.5)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)  # the last thing it would have done
        with pytest.raises(Refused, match="none of the 1 videos"):
            pack(PackConfig(source=str(tmp_path / "bad"), out=str(tmp_path / "out"), jobs=1))
    assert pack(PackConfig(source=str(videos), out=str(tmp_path / "out"), samples_per_shard=9, jobs=1)).accepted == 8


def test_a_folder_of_other_things_is_refused_and_untouched(videos, tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    with pytest.raises(Refused, match=r"holds thesis\.tex"):
        pack(PackConfig(source=str(videos), out=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("short_side", 15), ("short_side", 99), ("fps", 0), ("gop", 0), ("samples_per_shard", 0), ("jobs", -1)),
        *(("gop", 10**10), ("stall_s", 0), ("stall_s", float("nan")), ("stall_s", float("inf"))),
    ],
)
def test_options_out_of_range_are_refused_by_name(videos, tmp_path, field, value):
    with pytest.raises(Refused, match=f"^{field}: "):
        pack(PackConfig(source=str(videos), out=str(tmp_path / "out"), **{field: value}))
    assert not (tmp_path / "out").exists()


def test_packing_onto_the_videos_is_refused(videos):
    with pytest.raises(TubeletError, match="is the folder of the videos"):
        pack(PackConfig(source=str(videos), out=str(videos)))


def test_a_video_that_hangs_is_given_up_and_costs_itself_alone(tmp_path):
    """Reading a pipe that nobody writes to never returns, as a file on a dead network mount does not."""
    make_video(tmp_path / "videos/good.mp4", frames=10, frame_rate=8)
    pipe = tmp_path / "videos/hangs.mp4"
    os.mkfifo(pipe)
    end = threading.Timer(20, lambda: os.close(os.open(pipe, os.O_RDWR)))  # lets this test fail instead of hanging
    end.start()
    summary = pack(PackConfig(source=str(tmp_path / "videos"), out=str(tmp_path / "out"), jobs=1, stall_s=0.3))
    end.cancel()
    assert summary.accepted == 1
    assert summary.rejected == (Rejection("hangs.mp4", "crashes its decoder, or makes no progress for 0.3 s"),)


@pytest.mark.parametrize("out", ["file", "file/out", "/proc/out", "/proc/version/out"])
def test_a_folder_that_cannot_be_made_is_refused_in_one_line(videos, tmp_path, out):
    (tmp_path / "file").write_text("text")
    with pytest.raises(Refused, match=r"(not a folder|cannot be written \(.*\)); name another") as caught:
        pack(PackConfig(source=str(videos), out=str(tmp_path / out)))
    assert str(caught.value).startswith(f"{tmp_path / out}: ")
    assert "\n" not in str(caught.value)


def test_class_folders_of_images_become_labelled_videos_of_one_frame(tmp_path):
    for number, name in enumerate(("cat/a.jpg", "cat/b.png", "dog/c.webp")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(moving_square(1, 48, 64, number)[0]).save(tmp_path / "images" / name)
    (tmp_path / "images/dog/broken.jpg").write_bytes(b"no image")
    config = PackConfig(source=str(tmp_path / "images"), out=str(tmp_path / "out"), segment_s=2, jobs=1)
    summary = pack(config)
    assert [rejection.source for rejection in summary.rejected] == ["dog/broken.jpg"]
    shards = ShardSet.open(tmp_path / "out")
    samples = [shards.read(number) for number in range(shards.samples)]
    assert sorted((sample.metadata["source"], shards.classes[sample.label], sample.frames) for sample in samples) == [
        ("cat/a.jpg", "cat", 1),
        ("cat/b.png", "cat", 1),
        ("dog/c.webp", "dog", 1),
    ]
    assert all(open_video(sample.video).read(np.zeros(4, int)).shape == (4, 48, 64, 3) for sample in samples)


def stop_before_the_end(monkeypatch, config: PackConfig, error: Exception, shards: int = 1) -> TubeletError:
    """Packs until the given error keeps a shard from being recorded, and returns what the pack made of it."""
    commit = PackFolder.commit

    def fail(folder: PackFolder, *arguments) -> None:
        if len(list(folder.work.glob("*.tar.json"))) == shards:
            raise error
        commit(folder, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(PackFolder, "commit", fail)
        with pytest.raises(TubeletError) as caught:
            pack(config)
    return caught.value


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, DiskFull, "no space left on the disk (No space left on device); free some"),
        (errno.EDQUOT, DiskFull, "no space left on the disk (Disk quota exceeded); free some"),
        (errno.EIO, TubeletError, "Input/output error"),
    ],
)
def test_a_disk_that_fails_is_told_in_one_line_and_the_same_command_goes_on(
    videos, packed, tmp_path, monkeypatch, number, kind, words
):
    config = PackConfig(source=str(videos), out=str(tmp_path / "out"), samples_per_shard=4, jobs=1)
    error = stop_before_the_end(monkeypatch, config, OSError(number, os.strerror(number)))
    assert type(error) is kind
    kept = "1 of 3 shards are finished and stay; run the same command again to go on"
    assert str(error) == f"{tmp_path / 'out'}: {words}; {kept}"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_text("[]"), lambda path: path.write_bytes(b"\xff")])
def test_a_damaged_record_is_refused_by_name_and_packed_again_without_it(
    videos, packed, tmp_path, monkeypatch, damage: Callable[[Path], object]
):
    out = tmp_path / "out"
    config = PackConfig(source=str(videos), out=str(out), samples_per_shard=4, jobs=1)
    stop_before_the_end(monkeypatch, config, OSError(errno.EIO, "words"))
    record = out / ".packing" / "shard-000000.tar.json"
    damage(record)
    with pytest.raises(Refused, match="remove it, and the same command packs shard-000000") as caught:
        pack(config)
    assert str(caught.value).startswith(f"{record}: not the record of a shard")
    record.unlink()
    pack(config)
    assert content(out) == content(packed)


@pytest.mark.parametrize("content", ["[]", "{", "3"])
def test_a_damaged_plan_is_refused_by_name(videos, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/pack.json").write_text(content)
    with pytest.raises(Refused, match=r"pack\.json: cannot be read \(.*\); name another folder, or remove"):
        pack(PackConfig(source=str(videos), out=str(tmp_path / "out")))
    assert (tmp_path / "out/pack.json").read_text() == content


def test_a_damaged_list_of_rejected_videos_is_refused_by_name(videos, packed, tmp_path):
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    cut(out / "rejected.jsonl")
    config = PackConfig(source=str(videos), out=str(out), samples_per_shard=4)
    with pytest.raises(Refused, match=r"rejected\.jsonl: not a list of rejected videos"):
        pack(config)
    (out / "rejected.jsonl").unlink()
    assert pack(config).finished_before

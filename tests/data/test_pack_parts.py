"""Packing in parts: the merged set is that of one process to the byte, and every mixture of packings is refused."""

import shutil
from pathlib import Path

import pytest

from launch.cli import main
from pretrain.data.pack import PackConfig, pack
from pretrain.data.pack_merge import MergeConfig, merge
from pretrain.data.pack_parts import listed
from pretrain.data.shards import ShardSet
from pretrain.errors import Refused
from tests.data.test_pack import content
from tests.videos import make_video, truncate


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Two classes of four videos each, and two broken files."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(8):
        make_video(folder / f"{'jump' if number % 2 else 'run'}/{number}.mp4", frames=6 + number, seed=number)
    for name in ("run/broken.mp4", "jump/broken.mp4"):
        truncate(make_video(folder / name), 0.5)
    return folder


def part_of(videos: Path, out: Path, part: str | None, **options) -> PackConfig:
    return PackConfig(source=str(videos), out=str(out), samples_per_shard=3, jobs=1, part=part, **options)


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "shards"
    pack(part_of(videos, out, None))
    return out


@pytest.fixture(scope="module")
def two_of_three(videos, tmp_path_factory) -> Path:
    """A folder that part 1 of 3 and part 0 of 3 have packed into, in this order."""
    out = tmp_path_factory.mktemp("parts") / "shards"
    for part in ("1/3", "0/3"):
        pack(part_of(videos, out, part))
    return out


@pytest.fixture
def begun(two_of_three, tmp_path) -> Path:
    return Path(shutil.copytree(two_of_three, tmp_path / "begun"))


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_merged_parts_are_the_set_of_one_process_to_the_byte(videos, whole, tmp_path, parts):
    out = tmp_path / "out"
    summaries = [pack(part_of(videos, out, f"{number}/{parts}")) for number in reversed(range(parts))]
    assert not (out / "index.json").exists()
    summary = merge(MergeConfig(str(out)))
    assert content(out) == content(whole)
    assert ShardSet.open(out).fingerprint == ShardSet.open(whole).fingerprint
    assert sum(part.accepted for part in summaries) == summary.accepted == 8
    assert sum(len(part.rejected) for part in summaries) == len(summary.rejected) == 2
    assert sum(part.shards for part in summaries) == summary.shards == 4
    assert pack(part_of(videos, out, f"0/{parts}")).finished_before
    assert pack(part_of(videos, out, None)).finished_before


def test_a_part_that_is_finished_says_so_and_so_does_a_merged_set(videos, begun, capsys):
    finished = {path: path.stat().st_mtime_ns for path in begun.glob("shard-*")}
    arguments = ["--samples-per-shard", "3", "--jobs", "1"]
    assert main(["pack", str(videos), str(begun), "--part", "1/3", *arguments]) == 0
    said = capsys.readouterr().err
    assert f"{begun}: part 1/3 was packed before; nothing to do" in said
    assert f"part 1/3 is finished; when all are, `tubelet merge {begun}` makes the set" in said
    assert finished == {path: path.stat().st_mtime_ns for path in begun.glob("shard-*")}
    assert main(["pack", str(videos), str(begun), "--part=2/3", *arguments]) == 0
    assert "before" not in capsys.readouterr().err
    assert main(["merge", str(begun)]) == 0
    assert main(["merge", str(begun)]) == 0
    assert f"{begun}: these videos were packed before; nothing to do" in capsys.readouterr().err


def test_a_part_that_lost_a_shard_is_packed_again(videos, begun, whole):
    pack(part_of(videos, begun, "2/3"))
    (begun / "shard-000001.tar").unlink()
    with pytest.raises(Refused, match="of 3 parts, 1 is not finished"):
        merge(MergeConfig(str(begun)))
    assert not pack(part_of(videos, begun, "1/3")).finished_before
    merge(MergeConfig(str(begun)))
    assert content(begun) == content(whole)


def test_a_merge_names_the_parts_that_are_not_finished_and_changes_nothing(begun):
    before = content(begun)
    with pytest.raises(Refused, match=r"of 3 parts, 2 is not finished; .* --part I/3 .*\(sbatch --array=2\)"):
        merge(MergeConfig(str(begun)))
    assert content(begun) == before


@pytest.mark.parametrize(
    ("part", "options", "words"),
    [
        ("2/4", {}, "packed in 3 parts, now in 4 parts; give --part I/3"),
        (None, {}, "packed in 3 parts, now in one piece; give --part I/3"),
        ("2/3", {"short_side": 32}, "packed with short_side 256, now 32"),
        ("2/3", {"seed": 1}, "packed with seed 0, now 1"),
    ],
)
def test_a_part_of_another_packing_is_refused_by_name(videos, begun, part, options, words):
    before = content(begun)
    with pytest.raises(Refused, match=words):
        pack(part_of(videos, begun, part, **options))
    assert content(begun) == before


def test_a_part_of_videos_that_changed_is_refused(videos, begun, tmp_path):
    changed = Path(shutil.copytree(videos, tmp_path / "changed"))
    make_video(changed / "run/0.mp4", frames=40)
    with pytest.raises(Refused, match="videos that have changed since"):
        pack(part_of(changed, begun, "2/3"))


def test_a_pack_in_one_piece_is_not_gone_on_with_in_parts(videos, begun):
    (begun / ".packing/parts").write_text("1\n")
    with pytest.raises(Refused, match="packed in one piece, now in 3 parts; leave out --part"):
        pack(part_of(videos, begun, "2/3"))
    with pytest.raises(Refused, match="1 of 4 shards are not finished; run the same `tubelet pack` again"):
        merge(MergeConfig(str(begun)))


@pytest.mark.parametrize("part", ["3", "1/", "/2", "-1/2", "2/2", "0/0", "1/2/3", "a/b", "0x1/2", "", "9999999999/9"])
def test_a_part_that_cannot_be_is_refused_in_one_sentence(videos, tmp_path, capsys, part):
    assert main(["pack", str(videos), str(tmp_path / "out"), f"--part={part}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tubelet: part: ")
    assert "use " in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_no_pack_has_begun_is_not_merged(tmp_path, capsys):
    for folder in (tmp_path / "nowhere", tmp_path):
        assert main(["merge", str(folder)]) == 2
        assert f"{folder}: holds no pack.json, so no pack was begun there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"), [("pack.json", "[]"), ("pack.json", '{"videos": 3}'), (".packing/parts", "x")]
)
def test_a_damaged_file_of_a_pack_is_refused_by_name(begun, name, text):
    (begun / name).write_text(text)
    with pytest.raises(Refused) as caught:
        merge(MergeConfig(str(begun)))
    assert str(caught.value).startswith(f"{begun / name}: not ")


def test_parts_without_one_good_video_are_refused_by_the_merge(tmp_path):
    for number in range(2):
        truncate(make_video(tmp_path / f"videos/{number}.mp4"), 0.5)
    for part in ("0/2", "1/2"):
        pack(part_of(tmp_path / "videos", tmp_path / "out", part))
    with pytest.raises(Refused, match="none of the 2 videos can be packed"):
        merge(MergeConfig(str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_numbers_are_listed_as_slurm_takes_them():
    assert listed([5, 0, 3, 4, 9, 10]) == "0,3-5,9-10"

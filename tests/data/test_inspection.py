"""`tubelet inspect`: figures that are those of the videos, and a contact sheet that is fair and repeatable."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from launch.cli import main
from pretrain.data.contact_sheet import CELL_WIDTH_PX, HEADING_PX, MARGIN_PX, contact_sheet, draw_evenly
from pretrain.data.inspection import read_indexes
from pretrain.data.pack import PackConfig, pack
from pretrain.data.shards import ShardSet
from tests.conftest import PACKED_VIDEOS
from tests.videos import make_video


def test_the_figures_are_those_of_the_videos(packed_shards, capsys):
    """Of the fixture: 10, 12, .. 30 frames at 12 frames a second, even ones in `run`, 48 x 64."""
    inspection = read_indexes(ShardSet.open(packed_shards))
    assert inspection.samples == PACKED_VIDEOS
    assert inspection.classes == (5, 6)
    assert sorted(inspection.durations_s) == pytest.approx([frames / 12 for frames in range(10, 31, 2)])
    assert inspection.frame_rates == {12: PACKED_VIDEOS}
    assert inspection.sizes == {(64, 48): PACKED_VIDEOS}
    assert inspection.size_bytes == sum(path.stat().st_size for path in packed_shards.glob("*.tar"))
    assert main(["inspect", str(packed_shards)]) == 0
    said = capsys.readouterr().out
    facts = ["0.83 s to 2.50 s, median 1.67 s", "12 in all", "64 x 48 in all", "jump", "18.3 s", "3, "]
    assert [fact for fact in facts if fact not in said] == []
    assert ShardSet.open(packed_shards).fingerprint in said


def test_one_seed_gives_one_picture_and_another_seed_another(packed_shards, tmp_path, capsys):
    pictures = []
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(pictures)}.png"
        assert main(["inspect", str(packed_shards), "--out", str(out), "--samples", "4", "--seed", str(seed)]) == 0
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    assert Image.open(tmp_path / "0.png").width > CELL_WIDTH_PX


def test_a_cell_shows_the_middle_frame_of_its_sample(tmp_path):
    """A video that is dark but for its middle frame, and one that is damaged since it was packed."""
    pictures = np.full((9, 48, 64, 3), 20, dtype=np.uint8)
    pictures[4] = (200, 60, 40)
    make_video(tmp_path / "videos/flash.mp4", pictures=pictures)
    make_video(tmp_path / "videos/second.mp4", frames=9)
    pack(PackConfig(source=str(tmp_path / "videos"), out=str(tmp_path / "shards"), jobs=1))
    shards = ShardSet.open(tmp_path / "shards")
    flash = next(number for number in range(2) if shards.key(number).startswith("flash"))
    index = shards.shard_index(0)
    path = tmp_path / "shards/shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[index.video_offsets[1 - flash] + 50] ^= 255
    path.write_bytes(content)
    sheet = np.asarray(contact_sheet(ShardSet.open(tmp_path / "shards"), 2, 0)).astype(int)
    across = CELL_WIDTH_PX // 4
    cells = [sheet[MARGIN_PX + HEADING_PX + 30, MARGIN_PX + across + n * (sheet.shape[1] // 2 - 34)] for n in (0, 1)]
    assert np.abs(cells[flash] - (200, 60, 40)).max() < 12
    assert np.ptp(cells[1 - flash]) < 12, "grey where the sample cannot be read"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 70), st.integers(0, 3))
def test_samples_are_drawn_evenly_over_classes(labels, count, seed):
    drawn = draw_evenly(labels, count, seed)
    assert len(drawn) == len(set(drawn)) == min(count, len(labels))
    assert drawn == sorted(drawn, key=lambda number: (labels[number], number))
    shown, there = Counter(labels[number] for number in drawn), Counter(labels)
    most = max(shown.values())
    assert all(shown[label] >= min(most - 1, there[label]) for label in there)


def test_an_index_written_before_sizes_were_says_so(packed_shards, tmp_path, capsys):

    folder = Path(shutil.copytree(packed_shards, tmp_path / "shards"))
    described = json.loads((folder / "index.json").read_text())
    for entry in described["shards"]:
        path = folder / entry["name"].replace(".tar", ".idx")
        index = json.loads(path.read_text())
        del index["heights"], index["widths"]
        path.write_text(json.dumps(index))
        entry["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(described))
    assert main(["inspect", str(folder)]) == 0
    assert "not in the index" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "sheet.jpg"], "out: sheet.jpg is no PNG by its name; end it with .png"),
        (["--out", "/nowhere/sheet.png"], "out: /nowhere/sheet.png cannot be written; name a file in a folder that"),
        (["--samples", "0"], "samples: 0 does not do; use 1 to 1000"),
        (["--seed", "-1"], "seed: -1 does not do"),
        (["--outt", "x"], "outt: there is no such field; did you mean out?"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(packed_shards, capsys, options, words):
    assert main(["inspect", str(packed_shards), *options]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1
    assert main(["inspect", "/nowhere"]) == 2

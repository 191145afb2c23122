"""The four sets as they are distributed, in miniature: packed by their official annotations, finetuned, evaluated."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.cli import main
from pretrain.data.shards import ShardSet
from pretrain.data.subset import split_of
from tests.runs import TINY, TINY_ENCODER
from tests.videos import make_video

pytestmark = pytest.mark.xdist_group("official sets")

SSV2_TEMPLATES = {
    "Pushing [something] from left to right": "0",
    "Putting [something similar to other things that are already on the table]": "1",
    "Dropping [something] onto [something]": "2",
}


def ucf101(folder: Path) -> Path:
    """`UCF-101/CLASS/v_CLASS_gNN_cNN.avi` and `ucfTrainTestlist`, with classes from 1 and lines that end in CRLF."""
    classes = ("ApplyEyeMakeup", "HandstandPushups", "YoYo")
    lists: dict[str, str] = {"classInd.txt": "".join(f"{number} {name}\r\n" for number, name in enumerate(classes, 1))}
    for number, name in enumerate(classes, 1):
        spelt = name.replace("HandstandPushups", "HandStandPushups")  # as in the names of these videos alone
        for group in (1, 8, 15):
            video = f"{name}/v_{spelt}_g{group:02d}_c01.avi"
            make_video(folder / "UCF-101" / video, frames=8, height=32, width=42, frame_rate=25, seed=number + group)
            for split, tested in ((1, 1), (2, 8), (3, 15)):
                listed = f"testlist0{split}.txt" if group == tested else f"trainlist0{split}.txt"
                lists[listed] = lists.get(listed, "") + video + ("" if group == tested else f" {number}") + "\r\n"
    return write(folder / "ucfTrainTestlist", lists)


def hmdb51(folder: Path) -> Path:
    """`hmdb51_org/CLASS/NAME.avi` and `testTrainMulti_7030_splits`: 1 trains, 2 tests, 0 does neither in this split."""
    lists: dict[str, str] = {}
    marks = {"a": (1, 1, 2), "b": (1, 2, 1), "c": (2, 1, 1), "d": (0, 0, 1), "e": (0, 0, 0)}
    for number, name in enumerate(("brush_hair", "shake_hands", "wave")):
        for video, splits in marks.items():
            file = f"Faith_{video}_{name}_u_nm_np1_ba_goo_{number}.avi"
            seed = number + 3 * ord(video)
            make_video(folder / "hmdb51_org" / name / file, frames=8, height=32, width=42, frame_rate=30, seed=seed)
            for split, mark in enumerate(splits, 1):
                listed = f"{name}_test_split{split}.txt"
                lists[listed] = lists.get(listed, "") + f"{file} {mark} \n"
    return write(folder / "testTrainMulti_7030_splits", lists)


def something_something_v2(folder: Path) -> Path:
    """`20bn-something-something-v2/ID.webm`, and `labels` with labels.json, train.json and validation.json."""
    entries: dict[str, list[dict[str, object]]] = {"train.json": [], "validation.json": []}
    for number in range(9):
        template = list(SSV2_TEMPLATES)[number % 3]
        video = folder / "20bn-something-something-v2" / f"{78600 + number}.webm"
        make_video(video, frames=8, height=32, width=42, codec="libvpx-vp9", options={"cpu-used": "8"}, seed=number)
        entry = {"id": video.stem, "label": template.replace("[something]", "a cup").lower(), "template": template}
        entries["train.json" if number < 6 else "validation.json"].append(entry | {"placeholders": ["a cup"]})
    labels = {name.replace("[", "").replace("]", ""): number for name, number in SSV2_TEMPLATES.items()}
    listed = {name: json.dumps(content) for name, content in entries.items()}
    return write(folder / "labels", {"labels.json": json.dumps(labels)} | listed)


def kinetics400(folder: Path) -> Path:
    """`k400/SPLIT/CLASS/ID_000001_000011.mp4` and the CSV files, which quote some of the names of classes."""
    lines = {split: ["label,youtube_id,time_start,time_end,split,is_cc"] for split in ("train", "val")}
    for number in range(9):
        name = ("abseiling", "air drumming", "petting animal (not cat)")[number % 3]
        split = "train" if number < 6 else "val"
        stem = f"-_{number}abcdefghi"[:11]
        video = folder / "k400" / split / name.replace(" ", "_") / f"{stem}_{number:06d}_{number + 10:06d}.mp4"
        make_video(video, frames=8, height=32, width=42, frame_rate=30, seed=number)
        lines[split].append(f'"{name}",{stem},{number},{number + 10},{split},0')
    return write(folder / "annotations", {f"{split}.csv": "\n".join(rows) + "\n" for split, rows in lines.items()})


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    return folder


def pack(videos: Path, shards: Path, *annotations: object) -> Path:
    options = ["--short-side", "32", "--jobs", "1", "--annotations", *map(str, annotations)]
    assert main(["pack", str(videos), str(shards), *options]) == 0
    return shards


def finetune(folder: Path, out: Path, train: Sequence[Path], held_out: Sequence[Path], *options: str) -> Path:
    """Trains a tiny classifier from scratch."""
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY + f"architecture: {TINY_ENCODER.replace(', drop_path: 0.2', '')}\nsteps: 4\n")
    sets = ["--data.shards", *train, *(("--validation.shards", *held_out) if held_out else ())]
    assert main(["finetune", "--config", str(recipe), "--out", str(out), *map(str, sets), *options]) == 0
    return out


def evaluated(model: Path, shards: Path, *options: str) -> dict:
    command = ["evaluate", "--model", str(model), "--shards", str(shards), "--out", str(model / "evaluation")]
    assert main([*command, "--workers", "0", "--views.spatial", "3", *options]) == 0
    return json.loads((model / "evaluation" / "evaluation.json").read_text())


def test_ucf101_is_packed_once_for_its_three_splits_and_each_is_trained_and_evaluated_on(tmp_path):
    lists = ucf101(tmp_path)
    shards = pack(tmp_path / "UCF-101", tmp_path / "shards", lists, "--split", "all")
    whole = ShardSet.open(shards)
    assert (whole.samples, whole.classes) == (9, ("ApplyEyeMakeup", "HandstandPushups", "YoYo"))
    for split in (1, 2, 3):
        held_out = ["--data.split", f"train{split}", "--validation.split", f"test{split}"]
        run = finetune(tmp_path, tmp_path / f"run{split}", [shards], [], *held_out)
        figures = evaluated(run, shards, "--split", f"test{split}")
        assert (figures["samples"], figures["errors"], figures["split"]) == (3, 0, f"test{split}")
        assert json.loads((run / "evaluation.json").read_text())["fingerprint"] == figures["fingerprint"]
    assert sorted(split_of(whole, "train2").labels()) == [0, 0, 1, 1, 2, 2]
    alone = ShardSet.open(pack(tmp_path / "UCF-101", tmp_path / "alone", lists / "trainlist02.txt"))
    assert sorted(split_of(whole, "train2").keys()) == sorted(alone.keys()), "the same samples as packed by themselves"


def test_hmdb51_is_packed_once_finetuned_on_a_split_and_evaluated_on_its_test_part(tmp_path):
    splits = hmdb51(tmp_path)
    shards = pack(tmp_path / "hmdb51_org", tmp_path / "shards", splits, "--split", "all")
    whole = ShardSet.open(shards)
    assert whole.samples == 12, "all but those that are marked 0 in every split"
    assert [split_of(whole, f"train{split}").samples for split in (1, 2, 3)] == [6, 6, 9]
    run = finetune(tmp_path, tmp_path / "run", [shards], [], "--data.split", "train3", "--validation.split", "test3")
    figures = evaluated(run, shards, "--split", "test3")
    assert (figures["samples"], figures["errors"]) == (3, 0)


def test_something_something_v2_is_packed_finetuned_and_evaluated(tmp_path):
    labels = something_something_v2(tmp_path)
    train, test = (
        pack(tmp_path / "20bn-something-something-v2", tmp_path / name, labels / f"{name}.json")
        for name in ("train", "validation")
    )
    model = finetune(tmp_path, tmp_path / "run", [train], [test])
    classes = json.loads((model / "model" / "config.json").read_text())["classes"]
    assert classes == [name.replace("[", "").replace("]", "") for name in SSV2_TEMPLATES], "in the order of labels.json"
    assert evaluated(model, test)["samples"] == 3


def test_kinetics_is_packed_finetuned_and_evaluated(tmp_path):
    annotations = kinetics400(tmp_path)
    train, test = (pack(tmp_path / "k400", tmp_path / name, annotations / f"{name}.csv") for name in ("train", "val"))
    figures = evaluated(finetune(tmp_path, tmp_path / "run", [train], [test]), test)
    assert (figures["samples"], figures["errors"]) == (3, 0)
    assert ShardSet.open(test).classes == ("abseiling", "air drumming", "petting animal (not cat)")

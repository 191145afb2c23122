"""Prediction: classes of files and folders, and a file that does not play named while the others are predicted."""

import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
from finetune.config import ViewsConfig
from finetune.predict import PredictionOptions, clips_of
from launch.cli import main
from pretrain.data.transcode import transcode
from pretrain.data.video import DecoderName
from pretrain.errors import Refused
from tests.runs import run, start
from tests.videos import make_video, moving_square, truncate


def test_the_most_probable_classes_are_printed_best_first(finetuned, tmp_path, capsys):
    videos = [str(make_video(tmp_path / name, seed=seed)) for seed, name in enumerate(("one.mp4", "two.webm.mp4"))]
    assert main(["predict", *videos, "--model", str(finetuned)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == videos
    assert len(lines) == 2 * (1 + 2)
    for found in finetune.load(finetuned).predict(videos):
        assert found.error is None
        shares = [share for _, share in found.classes]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert {name for name, _ in found.classes} == {"jump", "run"}


def test_a_file_that_does_not_play_is_refused_by_name(finetuned, tmp_path, capsys):
    broken = truncate(make_video(tmp_path / "broken.mp4"), 0.3)
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    for path, message in ((broken, "cannot be decoded"), (text, "cannot be decoded"), (tmp_path / "none", "no such")):
        capsys.readouterr()
        assert main(["predict", str(path), "--model", str(finetuned)]) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1
        assert said.err.startswith(f"tubelet: {path}: {message}")
        assert said.out == ""


def test_a_broken_video_among_good_ones_is_named_and_the_others_are_predicted(finetuned, tmp_path, capsys):
    good = [str(make_video(tmp_path / name)) for name in ("one.mp4", "two.mp4")]
    broken, missing = str(truncate(make_video(tmp_path / "broken.mp4"), 0.3)), str(tmp_path / "none.mp4")
    assert main(["predict", good[0], broken, missing, good[1], "--model", str(finetuned)]) == 1
    said = capsys.readouterr()
    assert [line for line in said.out.splitlines() if not line.startswith(" ")] == good
    first, second = said.err.splitlines()
    assert first.startswith(f"tubelet: {broken}: cannot be decoded")
    assert second.startswith(f"tubelet: {missing}: no such file")
    assert main(["predict", broken, missing, "--model", str(finetuned)]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 2)


def test_pyav_predicts_what_decord_predicts_and_never_asks_for_it(finetuned, tmp_path, capsys, monkeypatch):
    command = ["predict", str(make_video(tmp_path / "one.mp4")), "--model", str(finetuned), "--decoder"]
    assert main([*command, "decord"]) == 0
    by_decord = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "decord", None)
    assert main([*command, "pyav"]) == 0
    assert capsys.readouterr().out == by_decord
    with pytest.raises(ImportError, match="decord"):
        main([*command, "decord"])


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_a_turned_video_is_seen_upright_with_every_decoder(finetuned, tmp_path, rotation):
    description = finetune.load(finetuned).description
    pictures = moving_square(24, 64, 64, seed=3)
    lying = np.ascontiguousarray(np.rot90(pictures, -rotation // 90, axes=(1, 2)))
    upright = str(make_video(tmp_path / "upright.mp4", pictures=pictures))
    turned = str(make_video(tmp_path / "turned.mp4", pictures=lying, rotation=rotation))

    def seen_in(file: str, decoder: DecoderName = "auto") -> torch.Tensor:
        stored = transcode(file, short_side=description.short_side)
        return clips_of(stored, description, ViewsConfig(), decoder).float()

    seen = [seen_in(turned, decoder) for decoder in ("decord", "pyav", "auto")]
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    expected = seen_in(upright)
    assert (seen[0] - expected).abs().mean() < 4 < (seen[0] - expected.flip(2)).abs().mean()


def test_a_file_is_predicted_before_the_next_one_is_read(finetuned, tmp_path):
    later = tmp_path / "later.mp4"
    predictions = finetune.load(finetuned).predict([str(make_video(tmp_path / "one.mp4")), str(later)])
    assert next(predictions).error is None
    make_video(later)
    assert next(predictions).error is None


def test_a_model_whose_logits_are_not_finite_predicts_nothing(finetuned, tmp_path, capsys):
    model = Path(shutil.copytree(finetuned / "model", tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    save_file({name: value * float("nan") for name, value in weights.items()}, model / "model.safetensors")
    video = str(make_video(tmp_path / "one.mp4"))
    assert main(["predict", video, "--model", str(model)]) == 3
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"tubelet: {video}: the logits of {model} are not finite; finetune again\n")


def test_a_model_that_is_missing_is_refused(finetuned, tmp_path, capsys):
    video = str(make_video(tmp_path / "one.mp4"))
    assert main(["predict", video, "--model", str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'}: has no config.json" in capsys.readouterr().err
    bare = Path(shutil.copytree(finetuned / "model", tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    assert main(["predict", video, "--model", str(bare)]) == 2
    assert f"{bare}: has no model.safetensors" in capsys.readouterr().err


def test_a_folder_is_predicted_file_by_file_as_json_with_the_asked_number_of_classes(finetuned, tmp_path, capsys):
    folder = tmp_path / "videos"
    (folder / "inner").mkdir(parents=True)
    videos = [str(make_video(folder / name)) for name in ("b.mp4", "inner/a.mkv.mp4", "c.mp4")]
    broken = str(truncate(make_video(folder / "broken.mp4"), 0.3))
    (folder / "notes.txt").write_text("no video")
    assert main(["predict", str(folder), "--model", str(finetuned), "--json", "--top", "1"]) == 1
    said = capsys.readouterr()
    found = {one["file"]: one for one in map(json.loads, said.out.splitlines())}
    assert set(found) == {*videos, broken}
    assert all(len(found[video]["classes"]) == 1 and found[video]["error"] is None for video in videos)
    assert found[broken]["classes"] == []
    assert found[broken]["error"].startswith("cannot be decoded")
    assert said.err.startswith(f"tubelet: {broken}: cannot be decoded")


def test_several_videos_at_once_by_other_processes_are_predicted_as_one_after_the_other(finetuned, tmp_path):
    videos = [str(make_video(tmp_path / f"{seed}.mp4", seed=seed)) for seed in range(5)]
    videos.insert(2, str(truncate(make_video(tmp_path / "broken.mp4"), 0.3)))
    model = finetune.load(finetuned)
    alone = list(model.predict(videos))
    together = list(model.predict(videos, PredictionOptions(jobs=2, micro_batch=3)))
    assert [one.file for one in together] == videos
    for one, other in zip(alone, together, strict=True):
        assert (one.error is None) == (other.error is None)
        assert dict(one.classes) == pytest.approx(dict(other.classes), abs=1e-5)


def test_options_that_cannot_be_and_an_empty_folder_are_refused(finetuned, tmp_path, capsys):
    video = str(make_video(tmp_path / "one.mp4"))
    command = ["predict", video, "--model", str(finetuned)]
    for option, value, message in (
        ("--top", "0", "top: 0 must be at least 1"),
        ("--micro-batch", "0", "micro_batch: 0 must be at least 1"),
        ("--temporal", "0", "views.temporal, views.spatial: must be at least 1"),
        ("--jobs", "-1", "jobs: -1 does not do"),
        ("--top", "few", "argument --top: invalid int value: 'few'"),
    ):
        assert main([*command, option, value]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="holds no video"):
        next(finetune.load(finetuned).predict(tmp_path / "empty"))


def test_who_interrupts_explanations_is_told_how_to_go_on_and_does(finetuned, tmp_path):
    first = make_video(tmp_path / "0.mp4")
    files = [first, *(tmp_path / f"{number}.mp4" for number in range(1, 80))]
    for copy in files[1:]:
        copy.hardlink_to(first)
    command = ["--model", finetuned, "--micro_batch", "1", "--top", "1"]
    going = start("launch", ["predict", *files, *command, "--explain", tmp_path / "shown"], tmp_path / "output")
    assert going.wait_for(lambda: going.text.count("explained by") > 2)
    going.kill(signal.SIGINT)
    assert going.wait().code == 130, going.text
    (last,) = going.text.splitlines()[-1:]
    assert last.startswith("tubelet: interrupted; the files that are printed are done; give the others to go on")
    assert all(path.stat().st_size for path in (tmp_path / "shown").iterdir()), "no explanation is cut short"
    left = [file for file in files if f"{file}\n" not in going.text]
    assert 0 < len(left) < len(files)
    again = run("launch", ["predict", *left[:3], *command, "--explain", tmp_path / "more"], tmp_path / "output")
    assert again.code == 0, again.text

"""Prediction: five classes of a video file, and a file that does not play refused by name."""

import shutil
from pathlib import Path

import pytest

from finetune.predict import predict
from launch.cli import main
from tests.videos import make_video, truncate


def test_the_most_probable_classes_are_printed_best_first(finetuned, tmp_path, capsys):
    videos = [str(make_video(tmp_path / name, seed=seed)) for seed, name in enumerate(("one.mp4", "two.webm.mp4"))]
    assert main(["predict", *videos, "--model", str(finetuned)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == videos
    assert len(lines) == 2 * (1 + 2)
    for found in predict(str(finetuned), videos):
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


def test_a_model_that_is_missing_is_refused(finetuned, tmp_path, capsys):
    video = str(make_video(tmp_path / "one.mp4"))
    assert main(["predict", video, "--model", str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'}: has no config.json" in capsys.readouterr().err
    bare = Path(shutil.copytree(finetuned / "model", tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    assert main(["predict", video, "--model", str(bare)]) == 2
    assert f"{bare}: has no model.safetensors" in capsys.readouterr().err

"""Comparing runs: paired differences, groups of seeds and of folds, and one line for whatever does not fit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from finetune.compare import compare, names_of
from finetune.evaluation_page import write_result
from finetune.figures import VideoLogits, figures_of
from finetune.run_results import read_result
from launch.cli import main

CLASSES = tuple("abcdefg")


def evaluated(folder: Path, right: np.ndarray, config: str = "", name: str = "v", fingerprint: str = "f" * 64) -> Path:
    """A run's folder whose model is right on the videos that `right` tells; true classes go round."""
    labels = np.arange(len(right)) % len(CLASSES)
    logits = np.eye(len(CLASSES), dtype=np.float32)[np.where(right, labels, (labels + 1) % len(CLASSES))]
    seen = [VideoLogits(place, f"{name}{place}", labels[place], logits[place], None) for place in range(len(right))]
    folder.mkdir(parents=True)
    write_result(
        folder,
        figures_of(seen, CLASSES),
        {"shards": "sets/test", "split": name, "fingerprint": fingerprint, "views": {}},
    )
    if config:
        (folder / "config.yaml").write_text(config)
    return folder


def alter_record(run: Path, **fields) -> None:
    file = run / "evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def alter_line(run: Path, **fields) -> None:
    """Gives the first prediction other fields."""
    file = run / "predictions.jsonl"
    first, rest = file.read_text().split("\n", 1)
    file.write_text(json.dumps(json.loads(first) | fields) + "\n" + rest)


def drawn(videos: int, share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(videos) < share


def test_a_difference_is_paired_video_by_video(tmp_path):
    first = drawn(200, 0.6, seed=0)
    better = first.copy()
    better[np.flatnonzero(~first)[:10]] = True
    other = np.random.default_rng(1).permutation(better)
    one, two, three = (evaluated(tmp_path / str(n), right) for n, right in enumerate((first, better, other)))
    found = compare([("first", [one]), ("better", [two]), ("other", [three])]).found
    paired, unpaired = (row["top1"] for row in found.differences)
    assert paired.value == pytest.approx(10 / 200)
    assert unpaired.value == pytest.approx(10 / 200)
    assert 0 < paired.interval[0] < 10 / 200 < paired.interval[1] < 0.09
    assert unpaired.interval[0] < 0 < 0.09 < unpaired.interval[1]
    standard_error = np.std(better.astype(float) - first) / np.sqrt(200)
    assert paired.interval == pytest.approx([0.05 - 1.96 * standard_error, 0.05 + 1.96 * standard_error], abs=0.006)


def test_videos_that_only_one_of_two_has_right_are_counted_and_tested_exactly(tmp_path):
    first = np.arange(60) % 2 == 0
    other = first.copy()
    other[[1, 3, 5, 7, 9]] = True
    other[0] = False
    folds = [[first[:30], first[30:]], [other[:30], other[30:]]]
    names = ("first", "other")
    alone = [(name, [evaluated(tmp_path / name, right)]) for name, right in zip(names, (first, other), strict=True)]
    parted = [
        (name, [evaluated(tmp_path / f"{name}-{fold}", right, name=f"f{fold}-") for fold, right in enumerate(rights)])
        for name, rights in zip(names, folds, strict=True)
    ]
    for groups in (alone, parted):
        (found,) = compare(groups).found.discordant
        assert (found.better, found.worse) == (5, 1)
        assert found.p_value == pytest.approx(2 * (1 + 6) / 2**6)  # of six, one or none the other way
    seeds = [alone[0], ("seeds", [*alone[1][1], evaluated(tmp_path / "again", other)])]
    assert compare(seeds).found.discordant == [None]


def test_a_groups_figures_are_the_means_over_its_seeds_and_its_interval_is_over_videos(tmp_path):
    seeds = [drawn(140, 0.7, seed) for seed in range(3)]
    folders = [evaluated(tmp_path / str(seed), right) for seed, right in enumerate(seeds)]
    none = evaluated(tmp_path / "none", np.zeros(140, dtype=bool))
    found = compare([("none", [none]), ("seeds", folders)]).found
    figure = found.figures[1]["top1"]
    shares = [right.mean() for right in seeds]
    assert figure.value == pytest.approx(np.mean(shares))
    assert figure.deviation == pytest.approx(np.std(shares, ddof=1))
    standard_error = np.std(np.mean(seeds, axis=0)) / np.sqrt(140)
    half = 1.96 * standard_error
    assert figure.interval == pytest.approx([figure.value - half, figure.value + half], abs=0.012)
    assert found.differences[0]["top1"].value == pytest.approx(figure.value)
    alone = compare([("none", [none]), ("one", [folders[0]])]).found.differences[0]["top1"].interval
    copies = [evaluated(tmp_path / f"copy-{number}", seeds[0]) for number in range(3)]
    assert compare([("none", [none]), ("same", copies)]).found.differences[0]["top1"].interval == pytest.approx(alone)


def test_folds_are_paired_fold_by_fold_in_any_order(tmp_path):
    ours, theirs = [], []
    for fold, videos in enumerate((35, 70)):
        right = drawn(videos, 0.5, fold)
        ours.append(evaluated(tmp_path / f"ours-{fold}", right, name=f"fold{fold}-", fingerprint=str(fold) * 64))
        better = right | (np.arange(videos) % 10 == 0)
        theirs.append(evaluated(tmp_path / f"theirs-{fold}", better, name=f"fold{fold}-", fingerprint=str(fold) * 64))
    found = compare([("ours", ours), ("theirs", theirs[::-1])]).found
    expected = [json.loads((run / "evaluation.json").read_text()) for run in (*ours, *theirs)]
    for name in ("top1", "top5", "mean_class_accuracy"):
        values = [one[name] for one in expected]
        assert found.figures[0][name].value == pytest.approx(np.mean(values[:2]))
        assert found.differences[0][name].value == pytest.approx(np.mean(values[2:]) - np.mean(values[:2]))
    assert found.differences[0]["top1"].interval[0] > 0


def test_a_single_runs_intervals_are_those_of_its_evaluation(tmp_path):
    folder = evaluated(tmp_path / "a", drawn(97, 0.7, seed=1))
    found = compare([("a", [folder]), ("b", [evaluated(tmp_path / "b", drawn(97, 0.5, seed=4))])]).found
    record = json.loads((folder / "evaluation.json").read_text())
    for name, figure in found.figures[0].items():
        assert (figure.value, figure.interval) == (pytest.approx(record[name]), record[f"{name}_interval"])


def test_a_table_and_a_page_show_what_differs(tmp_path, capsys):
    settings = "seed: {}\nout: runs/{}\noptimizer: {{base_lr: {}}}\nencoder: {}\nresume: null\n"
    for name, share, rate in (("scratch", 0.5, 0.01), ("pretrained", 0.8, 0.001)):
        for seed in range(4):
            right = drawn(70, share, seed)
            start = f"runs/{seed}" if name == "pretrained" else "null"
            evaluated(tmp_path / name / str(seed), right, settings.format(seed, seed, rate, start))
    groups = [
        part
        for name in ("scratch", "pretrained")
        for part in ("--group", name, *(str(tmp_path / name / str(seed)) for seed in range(4)))
    ]
    assert main(["compare", *groups, "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    for expected in (
        "scratch",
        "pretrained",
        "top-1 accuracy",
        "Differences to scratch",
        "optimizer.base_lr",
        "0.001",
        "4 values",
    ):
        assert expected in told
    assert "out" not in [line.split()[1] for line in told.splitlines() if line.startswith("│")]
    assert "resume" not in told
    assert "seed" not in told, "both groups have the same"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "optimizer.base_lr" in page
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert record["reference"] == "scratch"
    low, high = record["differences"]["pretrained"]["top1"]["interval"]
    assert low < record["differences"]["pretrained"]["top1"]["value"] < high


def test_a_run_and_an_evaluation_within_it_are_compared_by_their_views(finetuned, packed_shards, capsys, tmp_path):
    command = ["evaluate", "--model", str(finetuned), "--shards", str(packed_shards), "--workers", "0"]
    assert main([*command, "--views.temporal", "2"]) == 0
    elsewhere = Path(shutil.copytree(finetuned / "evaluation", tmp_path / "a/b/elsewhere"))
    assert read_result(elsewhere).settings == read_result(finetuned / "evaluation").settings
    capsys.readouterr()
    assert main(["compare", str(finetuned), str(finetuned / "evaluation"), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    (settings,) = [line for line in told.splitlines() if "views.temporal" in line]
    assert [part.strip() for part in settings.strip("│").split("│")] == ["views.temporal", "1", "2"]
    assert "optimizer" not in told, "the evaluation has the run's settings"
    assert "top-5" not in told, "which tells nothing of two classes"


def test_names_are_the_last_parts_that_tell_runs_apart():
    assert names_of(["runs/a", "runs/b/"]) == ["a", "b"]
    assert names_of(["runs/a", "runs/b/evaluation"]) == ["a", "b/evaluation"]
    assert names_of(["x/a/evaluation", "x/b/evaluation"]) == ["a/evaluation", "b/evaluation"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "evaluation.json").unlink(), "holds no evaluation.json"),
        (lambda run: (run / "evaluation.json").write_text("{"), "evaluation.json: cannot be read"),
        (
            lambda run: (run / "evaluation.json").write_text("{}"),
            "does not tell classes, samples, shards, fingerprint, views",
        ),
        (lambda run: (run / "evaluation.json").write_text("[" * 100000), "evaluation.json: cannot be read"),
        (
            lambda run: (run / "evaluation.json").write_text("[]"),
            "evaluation.json: cannot be read (it holds no object)",
        ),
        (lambda run: alter_record(run, views=None), "evaluation.json: views cannot be so"),
        (lambda run: alter_record(run, model=3, split=["a"]), "evaluation.json: model, split cannot be so"),
        (lambda run: alter_record(run, top1_interval=[0.5]), "evaluation.json: top1_interval cannot be so"),
        (lambda run: alter_record(run, top5_interval=None), "evaluation.json: top5_interval cannot be so"),
        (lambda run: alter_line(run, label=None), "predictions.jsonl: line 1 is no prediction"),
        (lambda run: alter_line(run, key=3), "predictions.jsonl: line 1 is no prediction"),
        (lambda run: alter_line(run, most_probable=[]) or alter_line(run, predicted=""), "line 1 is no prediction"),
        (lambda run: alter_line(run, most_probable=[{"class": "a"}, None]), "line 1 is no prediction"),
        (lambda run: (run / "predictions.jsonl").write_text(""), "predictions.jsonl: holds no video"),
        (lambda run: (run / "evaluation.json").write_text("3"), "evaluation.json: cannot be read"),
        (lambda run: (run / "predictions.jsonl").unlink(), "predictions.jsonl: cannot be read (No such file"),
        (lambda run: (run / "predictions.jsonl").write_bytes(b"\xff"), "predictions.jsonl: cannot be read"),
        (lambda run: (run / "predictions.jsonl").write_text("{}\n"), "predictions.jsonl: line 1 is no prediction"),
        (
            lambda run: (run / "predictions.jsonl").write_text((run / "predictions.jsonl").read_text()[:1000]),
            "is no prediction",
        ),
        (
            lambda run: (run / "predictions.jsonl").write_text(
                "".join((run / "predictions.jsonl").read_text().splitlines(keepends=True)[1:])
            ),
            "holds 6 videos, but evaluation.json 7",
        ),
        (lambda run: (run / "config.yaml").write_text("a: ["), "config.yaml: cannot be read"),
        (lambda run: (run / "config.yaml").write_text("a"), "config.yaml: is no configuration"),
    ],
)
def test_what_is_missing_or_damaged_is_named_in_one_line(damage, message, tmp_path, capsys):
    runs = [str(evaluated(tmp_path / name, drawn(7, 0.5, 0))) for name in "ab"]
    damage(tmp_path / "b")
    assert main(["compare", *runs, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert str(tmp_path / "b") in said
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, capsys):
    one, two = (evaluated(tmp_path / name, drawn(7, 0.5, 0)) for name in "ab")
    other = evaluated(tmp_path / "other", drawn(7, 0.5, 0), name="w", fingerprint="e" * 64)
    file = tmp_path / "file"
    file.touch()
    for arguments, message in (
        ([], "two runs or groups are needed"),
        ([one], "two runs or groups are needed"),
        ([one, tmp_path / "none"], f"{tmp_path / 'none'}: is no folder"),
        ([one, file], f"{file}: is no folder"),
        ([one, other], "sets/test, v (fingerprint ffffffffffff, 7 videos)"),
        ([one, one], f"{one}: stands twice; give each run once, and each --group a name of its own"),
        (["--group", "x", one, "--group", "x", two], "x: stands twice"),
        (["--group", "x", one, one, "--group", "y", two], f"--group x: holds {one} twice"),
        (["--group", "x", "--group", "y", two], "--group x: has no runs"),
        (["--group", "x", one, other, "--group", "y", two], "no run of y was"),
        (["--group", "x", one, two, other, "--group", "y", two, other], "1 of the 2 of y"),
        ([one, two, "--unknown"], "--unknown"),
        ([one, two, "--out", file / "folder"], "cannot be written"),
    ):
        assert main(["compare", *map(str, arguments)]) == 2, arguments
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert message in said

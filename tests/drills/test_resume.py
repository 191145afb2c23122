"""Pretraining under fire, in real processes: killed again and again, started twice, interrupted, started when done."""

import json
import os
import random
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from pretrain.data.shards import ShardSet
from pretrain.engine.tracking import read_metrics
from tests.runs import Started, run, start, tiny_pretraining

pytestmark = pytest.mark.xdist_group("resume")  # one worker, which makes once what these tests share

STEPS = 18
EVERY = 5
SAME = ("step", "loss", "learning_rate", "gradient_norm", "padded", "skipped")
VARIANTS = {"one-process": (1, []), "zero2-of-two": (2, ["--deepspeed", "zero2"])}


@pytest.fixture(scope="module")
def shards(tmp_path_factory, packed_shards) -> Path:
    """Shards with one damaged sample, which every epoch passes over."""
    folder = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(packed_shards, folder)
    opened = ShardSet.open(folder)
    with open(folder / opened.shards[1].name, "r+b") as file:
        file.seek(opened.shard_index(1).video_offsets[2] + 50)
        file.write(b"damage")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, shards) -> Path:
    return tiny_pretraining(tmp_path_factory.mktemp("recipe"), shards)


def arguments(recipe: Path, out: Path, *more: object) -> list[object]:
    cadence = ["--steps", STEPS, "--checkpoint.every", EVERY, "--data.max_bad_share", 0.5]
    return ["--config", recipe, "--out", out, *cadence, *more]


def record(out: Path) -> list[tuple]:
    return [tuple(entry[name] for name in SAME) for entry in read_metrics(out / "metrics.jsonl")]


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def encoder(out: Path) -> bytes:
    return (out / "encoder" / "model.safetensors").read_bytes()


def outcome(out: Path) -> dict:
    return json.loads((out / "outcome.json").read_text())


def goes_on_from(started: Started) -> list[int]:
    return [int(step) for step in re.findall(r"going on from step (\d+)", started.text)]


@pytest.fixture(scope="module", params=VARIANTS)
def uninterrupted(request, recipe, tmp_path_factory) -> tuple[str, Path]:
    world, options = VARIANTS[request.param]
    out = tmp_path_factory.mktemp(request.param) / "run"
    done = run("pretrain", arguments(recipe, out, *options), out.parent, world=world)
    assert done.codes == [0] * world, done.text
    return request.param, out


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(["pretrain", *map(str, arguments(recipe, out, "--steps", 12))]) == 0
    return out


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_run_killed_three_times_ends_with_the_very_weights_and_losses_of_one_that_was_not(
    uninterrupted, recipe, tmp_path
):
    variant, reference = uninterrupted
    world, options = VARIANTS[variant]
    out = tmp_path / "run"
    kills = sorted(random.Random().sample(range(EVERY + 1, STEPS), 3))
    resumed = []
    for kill in kills:
        going = start("pretrain", arguments(recipe, out, *options), tmp_path, world=world)
        # An attempt that was killed may have written more lines than the next one waits for.
        going.wait_for(lambda: (kill == kills[0] or goes_on_from(going)) and lines(out) >= kill)  # noqa: B023
        going.kill()
        resumed += goes_on_from(going)
        assert not (out / "summary.json").exists(), "the run ended before it was killed"
    last = run("pretrain", arguments(recipe, out, *options), tmp_path, world=world)
    assert last.code == 0, f"kills at {kills}: {last.text}"
    resumed += goes_on_from(last)
    assert len(resumed) == 3, f"kills at {kills} were resumed at {resumed}"
    assert all(step % EVERY == 0 and step > 0 for step in resumed)
    assert [entry[0] for entry in record(out)] == list(range(1, STEPS + 1)), f"kills at {kills}"
    assert record(out) == record(reference), f"kills at {kills}"
    assert encoder(out) == encoder(reference), f"kills at {kills}"
    skipped = (out / "skipped.jsonl").read_text()
    assert skipped.count("\n") > 3
    assert skipped == (reference / "skipped.jsonl").read_text()
    assert outcome(out)["attempt"] == 4


def test_a_finished_run_started_again_says_so_and_changes_nothing(finished, recipe, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert main(["pretrain", *map(str, arguments(recipe, finished, "--steps", 12, "--log_every", 5))]) == 0
    assert "is finished: step 12 is done; give more --steps to go on" in capsys.readouterr().err
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed <= {"outcome.json", "run.lock"}
    assert outcome(finished)["exit_code"] == 0


def test_a_run_killed_between_its_last_checkpoint_and_its_final_figures_still_gets_both(finished, copy, recipe):
    for name in ("encoder", "pictures"):
        shutil.rmtree(copy / name)
    for name in ("summary.json", "report.html", "outcome.json"):
        (copy / name).unlink()
    assert main(["pretrain", *map(str, arguments(recipe, copy, "--steps", 12))]) == 0
    assert encoder(copy) == encoder(finished)
    assert (copy / "report.html").exists()
    assert json.loads((copy / "summary.json").read_text()) == json.loads((finished / "summary.json").read_text())


def test_a_finished_run_goes_on_when_it_is_given_more_steps(copy, recipe):
    assert main(["pretrain", *map(str, arguments(recipe, copy, "--steps", 14))]) == 0
    assert [entry[0] for entry in record(copy)] == list(range(1, 15))
    assert json.loads((copy / "summary.json").read_text())["steps"] == 14


def refusal(capsys, arguments: list[object]) -> str:
    capsys.readouterr()
    assert main(["pretrain", *map(str, arguments)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tubelet: ")]
    assert len(said) == 1
    return said[0]


def test_what_decides_the_samples_cannot_change_in_the_middle_of_a_run(finished, copy, recipe, packed_shards, capsys):
    more = ["--steps", 16]
    assert re.search(
        r"seed: is 7, but .*step-00000012 was written with 0",
        refusal(capsys, arguments(recipe, copy, *more, "--seed", 7)),
    )
    assert re.search(
        r"data.global_batch: is 8, but .* was written with 4",
        refusal(capsys, arguments(recipe, copy, *more, "--data.global_batch", 8)),
    )
    other = copy.parent / "other"
    shutil.copytree(packed_shards, other)
    index = other / "index.json"
    index.write_text(index.read_text() + "\n")
    here = ShardSet.open(other).fingerprint
    before = ShardSet.open(yaml.safe_load((copy / "config.yaml").read_text())["data"]["shards"])
    newest = copy / "checkpoints" / "step-00000012"
    assert refusal(capsys, arguments(recipe, copy, *more, "--data.shards", other)) == (
        f"tubelet: data.shards: is {other} (fingerprint {here}), but {newest} was written with {before.folder} "
        f"(fingerprint {before.fingerprint}); use that again or give another --out"
    )
    for option, value, was in (("encoder.heads", 4, 2), ("mask.ratio", 0.75, 0.5), ("decoder.depth", 2, 1)):
        said = refusal(capsys, arguments(recipe, copy, *more, f"--{option}", value))
        assert re.search(f"{option}: is {value}, but .* was written with {was}", said)
    for name in ("metrics.jsonl", "config.yaml"):
        assert (copy / name).read_bytes() == (finished / name).read_bytes()
    assert sorted(os.listdir(copy / "checkpoints")) == sorted(os.listdir(finished / "checkpoints"))


def test_a_run_goes_on_where_its_data_were_moved_to(finished, copy, recipe, shards, capsys):
    moved = shutil.copytree(shards, copy.parent / "moved")
    capsys.readouterr()
    assert main(["pretrain", *map(str, arguments(recipe, copy, "--steps", 14, "--data.shards", moved))]) == 0
    assert "going on from step 12" in capsys.readouterr().err
    assert record(copy)[:12] == record(finished)


def test_never_resuming_refuses_a_folder_that_holds_checkpoints(copy, recipe, capsys):
    said = refusal(capsys, arguments(recipe, copy, "--resume", "never"))
    assert "holds checkpoints, and --resume never would bury them; give another --out" in said
    assert lines(copy) == 12


def test_a_run_that_was_begun_afresh_or_from_another_goes_on_by_the_command_that_began_it(
    finished, recipe, tmp_path, capsys
):
    origin = finished / "checkpoints" / "step-00000010"
    for resume in ("never", origin):
        out = tmp_path / str(resume).rsplit("/", 1)[-1]
        command = arguments(recipe, out, "--resume", resume)
        assert main(["pretrain", *map(str, command), "--steps", "11"]) == 0
        capsys.readouterr()
        assert main(["pretrain", *map(str, command), "--steps", "13"]) == 0
        assert "going on from step 11" in capsys.readouterr().err
        assert [entry[0] for entry in record(out)] == list(range(1 if resume == "never" else 11, 14))


def test_a_named_older_checkpoint_is_refused_while_newer_ones_stand_beside_it(copy, recipe, capsys):
    older = copy / "checkpoints" / "step-00000010"
    said = refusal(capsys, arguments(recipe, copy, "--resume", older))
    assert "holds step-00000012, which is newer" in said
    shutil.rmtree(copy / "checkpoints" / "step-00000012")
    assert main(["pretrain", *map(str, arguments(recipe, copy, "--resume", older, "--steps", 11))]) == 0
    assert [entry[0] for entry in record(copy)] == list(range(1, 12))


def test_a_second_start_is_refused_by_name_and_ctrl_c_is_one_line_that_tells_how_to_go_on(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    going = start("pretrain", arguments(recipe, out, "--steps", 5000, "--data.workers", 1), tmp_path)
    going.wait_for(lambda: lines(out) > EVERY)
    said = refusal(capsys, arguments(recipe, out))
    assert f"process {going.pids[0]} on {socket.gethostname()} is writing to this run" in said
    before = lines(out)
    going.wait_for(lambda: lines(out) > before)
    going.kill(signal.SIGINT)
    assert going.wait().code == 130
    assert "Traceback" not in going.text
    assert going.text.count("tubelet: ") == 1
    done = lines(out)
    assert (
        f"tubelet: interrupted after step {done}, which is saved; start the same command again to go on" in going.text
    )
    assert outcome(out)["exit_code"] == 130
    again = run("pretrain", arguments(recipe, out, "--steps", done + 1), tmp_path)
    assert again.code == 0, again.text
    assert goes_on_from(again) == [done]

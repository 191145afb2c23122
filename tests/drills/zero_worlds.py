"""A run that goes on with another number of processes, again and again, against the same run undisturbed.

`python -m tests.drills.zero_worlds` runs the whole matrix and prints a line for each: about 1 minute a ZeRO stage.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pretrain.engine.checkpoint_search import step_folders
from pretrain.engine.manifest import verify
from pretrain.engine.tracking import read_metrics
from pretrain.engine.universal import convert
from tests.runs import run, tiny_pretraining
from tests.videos import pack_labelled_videos

EVERY = 3
WORLDS = (2, 1, 4, 2)
TOLERANCE = 1e-5


def command(recipe: Path, out: Path, stage: int, steps: int, *more: object) -> list[object]:
    """A run whose model draws nothing, since what a model draws depends on the rank, and whose decay is felt."""
    sizes = ["--data.global_batch", 8, "--encoder.drop_path", 0, "--optimizer.weight_decay", 0.5, "--log_keys", "true"]
    cadence = ["--steps", steps, "--checkpoint.every", EVERY, "--checkpoint.keep_last", 10]
    return ["--config", recipe, "--out", out, "--deepspeed", f"zero{stage}", *sizes, *cadence, *more]


def go_back(out: Path, step: int) -> None:
    """Leaves a run as it was when it had saved `step`."""
    for folder in step_folders(out / "checkpoints"):
        if folder.name > f"step-{step:08d}":
            shutil.rmtree(folder)
    (out / "summary.json").unlink()


def change_worlds(recipe: Path, folder: Path, stage: int, worlds: Sequence[int], *more: object) -> tuple[Path, Path]:
    """Trains with one number of processes after the other, `EVERY` steps with each.

    Returns:
        The folder of a run that the first number of processes trained from end to end, and that of the one that
        changed.
    """
    steps = EVERY * len(worlds)
    undisturbed, changing = folder / "undisturbed", folder / "changing"
    for number, world in enumerate(worlds):
        out = changing if number else undisturbed
        done = run("pretrain", command(recipe, out, stage, steps, *more), folder, world=world)
        assert done.codes == [0] * world, done.text
        if number == 0:
            shutil.copytree(undisturbed, changing)
        else:
            assert f"going on from step {EVERY * number} " in done.text, done.text
        if number < len(worlds) - 1:
            go_back(changing, EVERY * (number + 1))
    return undisturbed, changing


def largest_difference_of_losses(undisturbed: Path, changing: Path) -> float:
    """Returns how far the losses are apart at most, relative to their size; the samples must be the same."""
    before, after = (
        [entry["loss"] for entry in read_metrics(out / "metrics.jsonl")] for out in (undisturbed, changing)
    )
    keys = [
        [(one["step"], sorted(one["keys"])) for one in read_metrics(out / "keys.jsonl")]
        for out in (undisturbed, changing)
    ]
    assert keys[0] == keys[1]
    assert len(before) == len(after) == len(keys[0])
    return max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(after, before, strict=True))


def states(out: Path, stage: int) -> dict[str, torch.Tensor]:
    """Returns weights and AdamW's states of a run's newest checkpoint, by parameter, whatever cut them into parts."""
    saved = verify(step_folders(out / "checkpoints")[-1])
    if stage == 0:
        content = torch.load(saved.folder / "deepspeed" / "mp_rank_00_model_states.pt", weights_only=False)
        found = {f"{name}/fp32": value for name, value in content["module"].items()}
        for number, state in content["optimizer"]["state"].items():
            found |= {f"{number}/{name}": value for name, value in state.items()}
        return found
    with tempfile.TemporaryDirectory() as temporary:
        converted = Path(temporary) / "converted"
        convert(saved, converted)
        zero = converted / "deepspeed" / "zero"
        found = {}
        for path in zero.rglob("*.pt"):
            content: Any = torch.load(path, weights_only=False)
            if path.name == "optimizer_state.pt":
                continue
            value = content["param"] if isinstance(content, dict) else content
            found[str(path.relative_to(zero).with_suffix(""))] = torch.as_tensor(value).detach().float()
        return found


def largest_difference_of_states(undisturbed: Path, changing: Path, stage: int) -> float:
    """Returns how far any weight's or moment's tensor is off, relative to the norm of the undisturbed one."""
    before, after = (states(out, stage) for out in (undisturbed, changing))
    assert before.keys() == after.keys()
    assert any(name.endswith("exp_avg_sq") for name in before)
    differences = []
    for name, value in before.items():
        assert value.shape == after[name].shape, name
        differences.append(float((after[name] - value).norm() / value.norm().clamp_min(1e-12)))
    return max(differences)


def main() -> int:
    """Runs every stage in fp32 and prints how far each is off; returns how many failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = tiny_pretraining(folder, pack_labelled_videos(folder, 11))
        for stage in map(int, sys.argv[1:] or "0123"):
            pair = change_worlds(recipe, folder / f"zero{stage}", stage, WORLDS)
            losses, moments = largest_difference_of_losses(*pair), largest_difference_of_states(*pair, stage)
            good = losses < TOLERANCE and moments < 1e-3
            failed += not good
            worlds = " -> ".join(map(str, WORLDS))
            said = f"losses within {losses:.1e}, states within {moments:.1e}: {'good' if good else 'BAD'}"
            print(f"ZeRO {stage}, {worlds}: {said}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())

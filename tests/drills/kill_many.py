"""Many kills in one run, most of them between two file operations of a checkpoint, against the undisturbed run.

By chance an attempt writes its checkpoints at once or beside training; the undisturbed run writes them at once.

`python -m tests.drills.kill_many --kills 200` prints how many runs ended in the very weights of the undisturbed one.
"""

import argparse
import itertools
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from pretrain.engine.checkpoint_search import find_checkpoint
from pretrain.engine.tracking import read_metrics
from pretrain.errors import Refused
from tests.runs import Started, run, start, tiny_pretraining
from tests.videos import pack_labelled_videos

STEPS = 24
EVERY = 3
KILLS_IN_A_RUN = 25
SHARE_WHILE_SAVING = 0.75
RECORD = ("step", "loss", "learning_rate", "gradient_norm")
ENGINES: dict[str, tuple[int, list[object]]] = {"one-process": (1, []), "zero2-of-two": (2, ["--deepspeed", "zero2"])}


class Tally(NamedTuple):
    """What came of a drill.

    Attributes:
        kills: Processes killed.
        while_saving: Those killed between two file operations of a checkpoint.
        runs: Runs that these kills were in.
        identical: Runs that ended as the undisturbed one did.
        failures: What went wrong otherwise.
    """

    kills: int
    while_saving: int
    runs: int
    identical: int
    failures: list[str]


def drill(recipe: Path, folder: Path, engine: str, kills: int, chosen: random.Random) -> Tally:
    """Kills runs until `kills` kills have been made, and lets each run come to its end."""
    world, options = ENGINES[engine]
    cadence = ["--steps", STEPS, "--checkpoint.every", EVERY, *options]

    def command(out: Path) -> list[object]:
        return ["--config", recipe, "--out", out, *cadence]

    undisturbed = folder / "undisturbed"
    counting = run("pretrain", command(undisturbed), folder, world=world, kill_at=0)
    assert counting.codes == [0] * world, counting.text
    counted = [0, *map(int, counting.outputs[0].with_suffix(".operations").read_text().split())]
    operations = max(later - earlier for earlier, later in itertools.pairwise(counted))
    made = while_saving = identical = runs = 0
    failures: list[str] = []
    while made < kills:
        out, runs, newest, in_this_run = folder / f"killed-{runs}", runs + 1, 0, 0
        while True:
            here = min(kills - made, KILLS_IN_A_RUN - in_this_run)
            saving = chosen.random() < SHARE_WHILE_SAVING
            kill_at = chosen.randint(1, 2 * operations) if here and saving else 0
            beside = ["--checkpoint.background", chosen.choice(("true", "false"))]
            going = start("pretrain", [*command(out), *beside], folder, world=world, kill_at=kill_at)
            if here and not saving:
                _kill_at_a_moment(going, out, chosen)
            _end_with_rank_0(going)
            if going.code != -9:
                break
            made, while_saving, in_this_run = made + 1, while_saving + saving, in_this_run + 1
            try:
                saved = find_checkpoint(out / "checkpoints", "auto")
            except Refused as error:
                failures.append(f"after kill {made} (operation {kill_at}): {error}")
                break
            if (saved.step if saved else 0) < newest:
                failures.append(f"after kill {made} (operation {kill_at}): step {newest} was lost")
            newest = saved.step if saved else 0
        if going.codes != [0] * world:
            failures.append(f"{out}: {going.codes}: {going.text[-2000:]}")
        else:
            identical += _same(out, undisturbed)
    return Tally(made, while_saving, runs, identical, failures)


def _kill_at_a_moment(going: Started, out: Path, chosen: random.Random) -> None:
    """Kills all ranks at once, some time after a random step."""
    metrics = out / "metrics.jsonl"
    lines = chosen.randrange(STEPS)
    going.wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= lines)
    time.sleep(chosen.uniform(0, 0.1))
    if not going.is_over():
        going.kill()


def _end_with_rank_0(going: Started) -> None:
    """Waits for the end; when rank 0 was killed, the others are at once, as srun does it."""
    if going.wait_for(lambda: going.is_over() or going.codes[0] == -9):
        going.kill()


def _same(out: Path, undisturbed: Path) -> bool:
    weights = [(folder / "encoder" / "model.safetensors").read_bytes() for folder in (out, undisturbed)]
    records = [
        [[entry[name] for name in RECORD] for entry in read_metrics(folder / "metrics.jsonl")]
        for folder in (out, undisturbed)
    ]
    return weights[0] == weights[1] and records[0] == records[1]


def main() -> int:
    """Runs the drill for one process, and for ZeRO 2 of two; returns 1 if any run ended otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = tiny_pretraining(folder, pack_labelled_videos(folder, 11))
        for engine, share in (("one-process", arguments.kills * 3 // 4), ("zero2-of-two", -(-arguments.kills // 4))):
            tally = drill(recipe, folder / engine, engine, share, random.Random(arguments.seed))
            print(f"{engine}: {tally.kills} kills, {tally.while_saving} of them inside a save, in {tally.runs} runs")
            print(f"{engine}: identical / total: {tally.identical} / {tally.runs}", flush=True)
            for failure in tally.failures:
                print(failure)
            failed |= tally.identical < tally.runs or bool(tally.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

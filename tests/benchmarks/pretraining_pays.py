"""Whether pretraining pays on a small labelled set: five folds, pretrained on their training videos or from scratch.

For each fold: the recipe `ti_112` is pretrained without labels on the training videos; then on the held-out ones
k-NN, linear and attentive probe of the encoder as it is and of fresh weights, finetuning from the encoder, and the same
finetuning from scratch, without layer-wise decay of the learning rate. `tubelet compare` puts all of it into one table
and one page, with a paired bootstrap over the videos. An interrupted call goes on where it was:

    python -m tests.benchmarks.pretraining_pays --list videos/train.txt videos/val.txt --out runs/pays

For 300 clips of 2 s that took 77 minutes on two cores beside other work. The settings of the recipes were chosen on the
first fold, most of them by the loss; `--folds 1` makes that fold alone. Each job has one thread, since two threads that
wait for each other's small matrices do less.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import time
from pathlib import Path

import torch

from finetune.run_results import read_result
from launch.cli import main as tubelet
from pretrain.files import write_text

FOLDS = 5
ARCHITECTURE = [
    *("--architecture.variant", "Ti", "--architecture.tubelet", "[2,28,28]"),
    *("--architecture.positions", "sincos_3d", "--architecture.position_temperature", 20),
]
"""What `ti_112` pretrains, for a model that starts without it."""
FIRST = "finetuned, from scratch"
"""What the others are compared with."""
KINDS = {"knn": "k-NN", "linear": "linear probe", "attentive": "attentive probe"}


def run(*arguments: object) -> None:
    """Runs a command of tubelet; raises `SystemExit` where it fails."""
    code = tubelet([str(one) for one in arguments])
    if code:
        raise SystemExit(code)


def pack(lists: list[Path], out: Path) -> Path:
    """Packs the videos of all lists into one labelled set; returns its folder."""
    shards = out / "shards"
    if not (shards / "index.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        lines = [line for one in lists for line in one.read_text().splitlines() if line.strip()]
        write_text(out / "videos.txt", "\n".join(lines) + "\n")
        options = ["--list", out / "videos.txt", "--short-side", 128, "--fps", 7.5, "--samples-per-shard", 50]
        run("pack", lists[0].parent, shards, *options)
    return shards


def length(epochs: int) -> list[object]:
    """Returns the options of a run of so many epochs, of which the first tenth warms up."""
    return ["--epochs", epochs, "--optimizer.warmup_epochs", epochs / 10]


def is_evaluated(folder: Path) -> bool:
    """Whether a run or a probe has left its predictions."""
    return (folder / "predictions.jsonl").exists()


def from_pretraining(fold: int, shards: Path, out: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Pretrains, probes and finetunes in a fold; returns the folders of what is evaluated by what they are."""
    encoder = out / "pretrain"
    run("pretrain", *of_fold(fold, shards), *length(options.pretraining_epochs), "--out", encoder)
    splits = ["--train", shards, "--train_split", encoder / "split" / "training.txt"]
    splits += ["--test", shards, "--test_split", encoder / "split" / "validation.txt"]
    found = {}
    for name, flags in (("pretrained", []), ("untrained", ["--untrained"])):
        folder = out / f"probe-{name}"
        for kind, title in KINDS.items():
            found[f"{title}, {name}"] = folder / kind
            if not is_evaluated(folder / kind):
                run("probe", "--encoder", encoder, *splits, "--kind", kind, "--out", folder, *flags)
    found["finetuned, pretrained"] = out / "finetuned"
    epochs = length(options.finetuning_epochs)
    run("finetune", *of_fold(fold, shards), "--encoder", encoder, *epochs, "--out", out / "finetuned")
    return found


def from_scratch(fold: int, shards: Path, out: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Trains the same classifier from fresh weights in a fold; returns its folder."""
    start = [*ARCHITECTURE, "--optimizer.layer_decay", "null", *length(options.finetuning_epochs)]
    run("finetune", *of_fold(fold, shards), *start, "--out", out / "scratch")
    return {FIRST: out / "scratch"}


def of_fold(fold: int, shards: Path) -> list[object]:
    """Returns the options that a run of a fold shares with the others."""
    return ["--config", "ti_112", "--data.shards", shards, "--validation.folds", FOLDS, "--validation.fold", fold]


def main() -> None:
    """Makes what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", nargs="+", type=Path, required=True, help="files of `path label` lines")
    parser.add_argument("--out", type=Path, default=Path("runs/pays"), help="folder for everything (%(default)s)")
    parser.add_argument("--folds", type=int, default=FOLDS, help="how many of the five folds are made (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="models worked on at once (%(default)s)")
    parser.add_argument("--pretraining_epochs", type=int, default=40, help="(%(default)s)")
    parser.add_argument("--finetuning_epochs", type=int, default=20, help="(%(default)s)")
    options = parser.parse_args()
    started = time.time()
    shards = pack(options.list, options.out)
    groups: dict[str, list[Path]] = {}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, spawn, torch.set_num_threads, (1,)) as pool:
        started_runs = [
            pool.submit(kind, fold, shards, options.out / f"fold-{fold}", options)
            for fold, kind in itertools.product(range(1, options.folds + 1), (from_pretraining, from_scratch))
        ]
        for runs in started_runs:
            for name, folder in runs.result().items():
                groups.setdefault(name, []).append(folder)
    ordered = [FIRST, *(name for name in groups if name != FIRST)]
    flags = [part for name in ordered for part in ("--group", name, *groups[name])]
    run("compare", *flags, "--out", options.out / "comparison")
    for name in ordered:
        right = sum(int(read_result(folder).answers.right.sum()) for folder in groups[name])
        print(f"{name:28s}{right:5d} videos right")
    print(f"this call took {(time.time() - started) / 60:.1f} min")


if __name__ == "__main__":
    main()

"""The demo: from videos to a finetuned classifier and a page that shows what happened, in minutes, on a laptop.

It makes its own videos, packs them with the real packer, pretrains, and finetunes with few labels twice: from the
pretrained encoder and from scratch. Training from scratch gets a learning rate of its own, chosen among several by the
accuracy on a validation split; test videos are looked at once, by the runs that are reported.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from finetune.config import FinetuneConfig
from finetune.evaluate import EvaluateConfig, evaluate
from finetune.evaluation_page import evaluation_sections
from finetune.figures import Evaluation
from finetune.finetuning import finetune
from finetune.multi_label import LabelsEvaluation
from launch.digits import MOTIONS, Split, write_videos
from pretrain.commandline import parse
from pretrain.config import PretrainConfig
from pretrain.data.pack import PackConfig, pack
from pretrain.data.shards import ShardSet
from pretrain.engine.tracking import read_metrics
from pretrain.errors import Refused
from pretrain.features import features
from pretrain.files import write_json
from pretrain.model.encoder import Encoder
from pretrain.neighbours import knn_accuracy
from pretrain.pretraining import pretrain
from pretrain.report import RECONSTRUCTION_NOTE, Figure, Section, Table, curves, write_report
from pretrain.weights import configs_from, encoder_from, load_encoder_weights, load_model_folder

logger = logging.getLogger(__name__)

VIDEOS = {"unlabelled": 2000, "labelled": 32, "validation": 128, "test": 400}
FINETUNING_SEEDS = (0, 1)
SCRATCH_RATES = ("3.2e-2", "6.4e-2")  # optimizer.base_lr, for 256 samples in a step


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """The demo."""

    out: str = "runs/demo"
    """Folder for everything that the demo makes."""
    seed: int = 0
    """Seed of the videos and of every run."""
    jobs: int = 2
    """Processes that make and pack videos; 0 is one for each core."""
    steps: int | None = None
    """Steps of pretraining in place of the recipe's."""

    def validate(self) -> None:
        """Raises `Refused` for what no part of the demo takes."""
        if self.seed < 0:
            raise Refused(f"seed: {self.seed} must not be negative")
        if self.jobs < 0:
            raise Refused(f"jobs: {self.jobs} must not be negative; 0 is one for each core")


def demo(config: DemoConfig) -> dict[str, Any]:
    """Runs the demo; an interrupted one goes on, a finished one is made anew.

    Returns:
        What `summary.json` holds: the two accuracies, the probes, and the seconds that it took.

    Raises:
        Refused: A field of the configuration cannot be.
    """
    config.validate()
    started = time.time()
    out = Path(config.out)
    _clear_unless_interrupted(out, config)
    make_shards(config, out)
    shards = {split: str(out / "shards" / split) for split in VIDEOS}
    options: dict[str, Any] = {"config": "demo", "out": out / "pretrain", "seed": config.seed}
    options |= {"data.shards": shards["unlabelled"], "validation.shards": shards["validation"]}
    options |= {"probe.shards": shards["labelled"], "probe.asked": shards["validation"]}
    if config.steps is not None:
        options |= {"steps": config.steps, "optimizer.warmup_steps": config.steps // 10}
    pretraining = parse(PretrainConfig, "pretrain", _options(**options))
    with _leaving_cores_to(pretraining.data.workers):
        pretrain(pretraining)
    probes = probe(out / "pretrain" / "encoder", shards, config.seed)
    pretrained = [_finetune(config, shards, "pretrained", number, None) for number in FINETUNING_SEEDS]
    rate, tried = choose_scratch_rate(config, shards)
    scratch = [_finetune(config, shards, "scratch", number, rate) for number in FINETUNING_SEEDS]
    evaluations = {
        name: [evaluate(EvaluateConfig(model=str(run), shards=shards["test"], workers=0)) for run in runs]
        for name, runs in (("pretrained", pretrained), ("scratch", scratch))
    }
    accuracies = {name: [one.figures["top1"] for one in found] for name, found in evaluations.items()}
    summary = {
        "seed": config.seed,
        "top1_pretrained": statistics.mean(accuracies["pretrained"]),
        "top1_scratch": statistics.mean(accuracies["scratch"]),
        **probes,
        "top1_pretrained_by_seed": accuracies["pretrained"],
        "top1_scratch_by_seed": accuracies["scratch"],
        "scratch_base_lr": float(rate),
        "scratch_validation_top1_by_base_lr": tried,
        "seconds": round(time.time() - started, 1),
    }
    write_demo_report(out, summary, evaluations, pretrained, scratch)
    write_json(out / "summary.json", summary)
    logger.info(
        "test accuracy %.1f %% pretrained, %.1f %% from scratch; look at %s",
        100 * summary["top1_pretrained"],
        100 * summary["top1_scratch"],
        out / "report.html",
    )
    return summary


@contextlib.contextmanager
def _leaving_cores_to(workers: int) -> Iterator[None]:
    """Keeps torch's threads off the cores that decode: threads that wait for each other are slower than fewer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - workers))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_shards(config: DemoConfig, out: Path) -> None:
    """Makes the videos of all splits and packs them; splits that are packed already are left alone."""
    missing = [name for name in VIDEOS if not (out / "shards" / name / "index.json").exists()]
    splits = [Split(out / "videos" / name, name, VIDEOS[name], labelled=name != "unlabelled") for name in missing]
    if not splits:
        return
    logger.info("making %d videos", sum(split.count for split in splits))
    write_videos(splits, config.seed, config.jobs or os.cpu_count() or 1)
    for split in splits:
        folder = out / "shards" / split.name
        pack(PackConfig(source=str(split.folder), out=str(folder), samples_per_shard=200, jobs=config.jobs))
    shutil.rmtree(out / "videos")


def probe(encoder_folder: Path, shards: dict[str, str], seed: int) -> dict[str, float]:
    """Returns the k-NN accuracy of the pretrained encoder and of the same encoder before training."""
    weights, description = load_model_folder(encoder_folder)
    architecture, clip = configs_from(description, encoder_folder)
    known, asked = ShardSet.open(shards["labelled"]), ShardSet.open(shards["test"])

    def accuracy(encoder: Encoder) -> float:
        return knn_accuracy(*features(encoder, known, clip), *features(encoder, asked, clip))

    torch.manual_seed(seed)
    encoder = encoder_from(architecture, clip)
    untrained = accuracy(encoder)
    load_encoder_weights(encoder, weights, encoder_folder)
    return {"knn_pretrained": accuracy(encoder), "knn_untrained": untrained}


def choose_scratch_rate(config: DemoConfig, shards: dict[str, str]) -> tuple[str, dict[str, float]]:
    """Trains from scratch at each learning rate; returns the best by validation accuracy, and all accuracies."""
    tried = {}
    for rate in SCRATCH_RATES:
        run = _finetune(config, shards, "scratch", FINETUNING_SEEDS[0], rate)
        tried[rate] = read_metrics(run / "metrics.jsonl")[-1]["validation_top1"]
    return max(tried, key=lambda rate: tried[rate]), tried


def _finetune(config: DemoConfig, shards: dict[str, str], start: str, number: int, rate: str | None) -> Path:
    """Finetunes unless that very run is finished; returns its folder."""
    run = Path(config.out) / f"{start}{f'-lr-{rate}' if rate else ''}-{number}"
    recipe = "demo" if start == "pretrained" else "demo_scratch"
    options: dict[str, Any] = {"config": recipe, "out": run, "seed": config.seed * 100 + number}
    options |= {"data.shards": shards["labelled"], "validation.shards": shards["validation"]}
    if start == "pretrained":
        options["encoder"] = Path(config.out) / "pretrain"
    if rate is not None:
        options["optimizer.base_lr"] = rate
    if not (run / "summary.json").exists():
        finetune(parse(FinetuneConfig, "finetune", _options(**options)))
    return run


def _options(**fields: Any) -> list[str]:
    """Returns fields as command-line options."""
    return [part for name, value in fields.items() for part in (f"--{name}", str(value))]


def _clear_unless_interrupted(out: Path, config: DemoConfig) -> None:
    """Removes an earlier demo that is finished or made something else; leaves an interrupted one to go on."""
    note = out / "demo.json"
    content = {"seed": config.seed, "steps": config.steps}
    if note.exists() and ((out / "summary.json").exists() or json.loads(note.read_text()) != content):
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(note, content)


def write_demo_report(
    out: Path,
    summary: dict[str, Any],
    evaluations: dict[str, list[Evaluation | LabelsEvaluation]],
    pretrained: list[Path],
    scratch: list[Path],
) -> None:
    """Writes the demo's page."""
    gain = 100 * (summary["top1_pretrained"] - summary["top1_scratch"])
    metrics = read_metrics(out / "pretrain" / "metrics.jsonl")
    trained = [entry for entry in metrics if "loss" in entry]
    validated = [entry for entry in metrics if "validation_loss" in entry]
    probed = [entry for entry in metrics if "probe_knn" in entry]
    neighbours = {"k-NN": ([entry["step"] for entry in probed], [entry["probe_knn"] for entry in probed])}
    losses = {
        "training": ([entry["step"] for entry in trained], [entry["loss"] for entry in trained]),
        "held-out": ([entry["step"] for entry in validated], [entry["validation_loss"] for entry in validated]),
    }
    by_seed = zip(FINETUNING_SEEDS, summary["top1_pretrained_by_seed"], summary["top1_scratch_by_seed"], strict=True)
    rows = [_row(f"seed {number}", with_pretraining, without) for number, with_pretraining, without in by_seed]
    rows.append(_row("k-NN probe, no finetuning", summary["knn_pretrained"], summary["knn_untrained"]))
    write_report(
        out / "report.html",
        title="Tubelet demo",
        summary=(
            f"A masked autoencoder watched {VIDEOS['unlabelled']} unlabelled clips of digits that drift in flickering "
            f"light. The label of a clip is the direction of the drift, which no single frame shows. Both classifiers "
            f"were then trained on the same {VIDEOS['labelled']} labelled clips and tested on {VIDEOS['test']} others."
        ),
        headline=[
            (f"{100 * summary['top1_scratch']:.0f} %", "test accuracy from scratch"),
            (f"{100 * summary['top1_pretrained']:.0f} %", "test accuracy after pretraining"),
            (f"{gain:+.0f} points", "gained by pretraining"),
        ],
        sections=[
            Section(
                "Accuracy",
                f"Chance is {100 / len(MOTIONS):.1f} %. Training from scratch used the best of "
                f"{len(SCRATCH_RATES)} learning rates by validation accuracy. The classes below are those of the "
                f"pretrained model with seed {FINETUNING_SEEDS[0]}.",
                [Table(("test accuracy", "pretrained", "from scratch", "points"), rows)],
            ),
            Section(
                "Reconstructions",
                RECONSTRUCTION_NOTE,
                [Figure(path) for path in sorted((out / "pretrain" / "pictures").glob("*.png"))],
            ),
            Section(
                "Curves",
                parts=[
                    Figure(curves(losses, "Pretraining: reconstruction loss", "step", "loss")),
                    Figure(
                        curves(neighbours, "Pretraining: k-NN accuracy", "step", "share"),
                        f"Validation videos whose neighbours among the {VIDEOS['labelled']} labelled ones are of their "
                        f"class; step 0 is the encoder before training.",
                    ),
                    Figure(
                        curves(_finetuning_losses(pretrained, scratch), "Finetuning: training loss", "step", "loss")
                    ),
                ],
            ),
            *evaluation_sections(evaluations["pretrained"][0], tuple(MOTIONS)),
        ],
        facts={"seed": summary["seed"], "seconds": summary["seconds"], "command": "tubelet demo"},
    )


def _row(name: str, with_pretraining: float, without: float) -> tuple[str, ...]:
    gain = f"{100 * (with_pretraining - without):+.1f}"
    return name, f"{100 * with_pretraining:.1f} %", f"{100 * without:.1f} %", gain


def _finetuning_losses(pretrained: list[Path], scratch: list[Path]) -> dict[str, Any]:
    series = {}
    for name, runs in (("pretrained", pretrained), ("from scratch", scratch)):
        all_metrics = [read_metrics(run / "metrics.jsonl") for run in runs]
        series[name] = (
            [entry["step"] for entry in all_metrics[0]],
            [[entry["loss"] for entry in metrics] for metrics in all_metrics],
        )
    return series

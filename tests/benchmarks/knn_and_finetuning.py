"""Whether the k-NN accuracy during pretraining tells what finetuning will make of the encoder, on the demo.

Pretrains by the demo's recipe with a probe and a checkpoint at every tenth of the run, finetunes from each of these
encoders and from the untrained one, and prints the rank correlation (Spearman's) of the probe's accuracy, which
validation videos tell, with the accuracy after finetuning on test videos. An interrupted call goes on where it was:

    python -m tests.benchmarks.knn_and_finetuning --out runs/knn_and_finetuning

About a quarter of an hour on two cores.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from scipy.stats import spearmanr

from finetune.config import FinetuneConfig
from finetune.evaluate import EvaluateConfig, evaluate
from finetune.finetuning import finetune
from launch.demo import VIDEOS, DemoConfig, make_shards
from pretrain.commandline import parse
from pretrain.config import PretrainConfig
from pretrain.engine.checkpoint_search import step_folders
from pretrain.engine.progress import set_up_logging
from pretrain.engine.tracking import read_metrics
from pretrain.files import write_json
from pretrain.pretraining import build_autoencoder, pretrain
from pretrain.weights import describe_encoder, save_model_folder

PARTS = 10


def options(**fields: Any) -> list[str]:
    """Returns fields as command-line options."""
    return [part for name, value in fields.items() for part in (f"--{name}", str(value))]


def pretrained(out: Path, seed: int, steps: int) -> dict[int, Path]:
    """Pretrains; returns the folder of the encoder of each step that was probed."""
    shards = {split: str(out / "shards" / split) for split in VIDEOS}
    every = steps // PARTS
    given: dict[str, Any] = {"config": "demo", "out": out / "pretrain", "seed": seed, "steps": steps}
    given |= {"optimizer.warmup_steps": steps // 10, "data.shards": shards["unlabelled"]}
    given |= {"probe.shards": shards["labelled"], "probe.asked": shards["validation"], "probe.every": every}
    given |= {"checkpoint.every": every, "checkpoint.keep_every": every}
    config = parse(PretrainConfig, "pretrain", options(**given))
    pretrain(config)
    torch.manual_seed(config.seed)
    weights = {0: build_autoencoder(config).state_dict()}
    for folder in step_folders(out / "pretrain" / "checkpoints"):
        weights[int(folder.name.removeprefix("step-"))] = load_file(folder / "model.safetensors")
    found = {}
    for step, state in weights.items():
        encoder = {name.removeprefix("encoder."): one for name, one in state.items() if name.startswith("encoder.")}
        found[step] = out / "encoders" / f"step-{step:08d}"
        save_model_folder(found[step], encoder, describe_encoder(config.encoder, config.data.clip))
    return found


def finetuned_accuracy(out: Path, encoder: Path, seed: int) -> float:
    """Finetunes from an encoder, unless that is done; returns the accuracy on test videos."""
    run = out / f"finetuned-{encoder.name}-{seed}"
    given: dict[str, Any] = {"config": "demo", "encoder": encoder, "out": run, "seed": seed}
    given |= {"data.shards": out / "shards" / "labelled", "validation.shards": out / "shards" / "validation"}
    if not (run / "summary.json").exists():
        finetune(parse(FinetuneConfig, "finetune", options(**given)))
    evaluation = evaluate(EvaluateConfig(model=str(run), shards=str(out / "shards" / "test"), workers=0))
    return evaluation.figures["top1"]


def main() -> None:
    """Measures, prints the table and the correlation, and writes both to `correlation.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/knn_and_finetuning"))
    parser.add_argument("--seed", type=int, default=0, help="seed of the videos and of pretraining (0)")
    parser.add_argument("--seeds", type=int, default=2, help="finetuning runs from each encoder (2)")
    parser.add_argument("--steps", type=int, default=1100, help="steps of pretraining (1100)")
    given = parser.parse_args()
    set_up_logging()
    given.out.mkdir(parents=True, exist_ok=True)
    make_shards(DemoConfig(out=str(given.out), seed=given.seed), given.out)
    encoders = pretrained(given.out, given.seed, given.steps)
    probes = {entry["step"]: entry for entry in read_metrics(given.out / "pretrain" / "metrics.jsonl")}
    table = Table("step", "k-NN", "effective rank", "deviation", "finetuned")
    rows = []
    for step, encoder in sorted(encoders.items()):
        probe = probes[step]
        accuracy = float(np.mean([finetuned_accuracy(given.out, encoder, seed) for seed in range(given.seeds)]))
        rows.append({"step": step, "knn": probe["probe_knn"], "finetuned": accuracy})
        spread = f"{probe['probe_rank']:.1f}", f"{probe['probe_deviation']:.3f}"
        table.add_row(str(step), f"{probe['probe_knn']:.1%}", *spread, f"{accuracy:.1%}")
    correlation = spearmanr([row["knn"] for row in rows], [row["finetuned"] for row in rows])
    figures = {"rank_correlation": float(correlation.statistic), "p_value": float(correlation.pvalue)}
    write_json(given.out / "correlation.json", figures | {"encoders": rows})
    Console().print(table)
    print(f"rank correlation {correlation.statistic:.2f} (p = {correlation.pvalue:.2g}) over {len(rows)} encoders")


if __name__ == "__main__":
    main()

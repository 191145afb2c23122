"""Pretraining: the one file that puts data, model and engine together."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.config import PretrainConfig
from pretrain.data.loader import Batch, EvaluationViews, TrainingClips, evaluation_batches
from pretrain.data.order import evaluation_slice
from pretrain.data.randomness import sample_key
from pretrain.data.shards import ShardSet
from pretrain.engine.distributed import Processes
from pretrain.engine.run import Run
from pretrain.engine.tracking import read_metrics
from pretrain.model.mae import MaskedAutoencoder
from pretrain.model.masking import MaskConfig, draw_mask
from pretrain.report import RECONSTRUCTION_NOTE, Figure, Section, filmstrip, paint, visible_pixels, write_report
from pretrain.stage import (
    curve_figures,
    is_finished,
    named_fields,
    open_shards,
    open_stage,
    order_of,
    say_finished,
    start_processes,
    summarise,
    train,
)
from pretrain.weights import (
    configs_from,
    describe_encoder,
    encoder_from,
    find_encoder,
    load_encoder_weights,
    load_model_folder,
    refuse_other_architecture,
    refuse_other_clip,
    save_model_folder,
)

HELD_OUT_SET = 1  # the set number that keys the fixed masks of held-out clips
PICTURED_CLIPS = 4


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Pretrains an encoder and leaves it in the run's folder.

    Returns:
        The run's final figures, as in `summary.json`.

    Raises:
        Refused: The configuration, the shards or the run's checkpoints do not fit; nothing was started.
        StoppedByRule: The run was stopped; its checkpoints are whole.
    """
    config.validate()
    shards = open_shards("data.shards", config.data.shards, config.data.clip)
    held_out = None
    if config.validation.shards:
        held_out = open_shards("validation.shards", config.validation.shards, config.data.clip)
    order = order_of(config, shards)
    steps = config.total_steps(order.steps_per_epoch)
    initial = initial_weights(config) if config.init else None
    trained = {
        **named_fields("encoder", config.encoder.resolved()),
        **named_fields("decoder", config.decoder),
        **named_fields("mask", config.mask),
    }
    with start_processes(config) as processes, open_stage(config, processes, "pretrain", order, shards, trained) as run:
        if is_finished(run, steps):
            return say_finished(run)
        torch.manual_seed(config.seed)
        model = MaskedAutoencoder(encoder_from(config.encoder, config.data.clip), config.decoder)
        if initial and not run.saved:
            load_encoder_weights(model.encoder, initial, find_encoder(config.init))
        validation = functools.partial(reconstruction_loss_on, held_out, config, processes) if held_out else None
        draw = functools.partial(draw_mask, config.mask, config.grid)
        model = train(
            config,
            run,
            order,
            steps,
            model,
            TrainingClips(shards, config.data, config.seed, draw),
            reconstruction_loss,
            validation=validation,
            validate_every=config.validation.every,
            export=functools.partial(export_encoder, config, run),
        )
        strips = save_reconstructions(config, run, model, held_out or shards)
        summary = summarise(run, max(run.first_step, steps))
        if processes.is_main:
            write_pretraining_report(config, run.out, summary, strips)
        run.finish(summary)
        return summary


def initial_weights(config: PretrainConfig) -> dict[str, Tensor]:
    """Returns the weights of `config.init`; raises `Refused` if they were trained as another encoder."""
    folder = find_encoder(config.init)
    weights, description = load_model_folder(folder)
    architecture, clip = configs_from(description, folder)
    refuse_other_architecture("encoder", folder, architecture, config.encoder)
    refuse_other_clip(folder, clip, config.data.clip)
    return weights


def reconstruction_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the mean reconstruction loss of a batch."""
    return model(batch.clips, batch.visible, batch.masked).loss.mean()


def reconstruction_loss_on(
    held_out: ShardSet, config: PretrainConfig, processes: Processes, model: nn.Module
) -> dict[str, float]:
    """Returns the mean loss over held-out samples, with the same crops and masks at every call."""
    chosen = config.validation.chosen(held_out.samples)
    numbers, counted = evaluation_slice(len(chosen), processes.world, processes.rank)
    views = EvaluationViews(held_out, config.data.clip)
    total = torch.zeros(2, dtype=torch.float64)
    for batch in evaluation_batches(views, chosen[numbers], counted, config.data.micro_batch, config.data.workers):
        visible, masked = fixed_masks(config.mask, config, [one.sample for one in batch], processes.device)
        clips = torch.cat([one.clips for one in batch]).to(processes.device)
        loss = model(clips, visible, masked).loss.double().cpu()
        weight = torch.tensor([float(one.counted and one.error is None) for one in batch], dtype=torch.float64)
        total += torch.stack([(loss * weight).sum(), weight.sum()])
    loss_sum, count = processes.gather(total).sum(0).tolist()
    return {"validation_loss": loss_sum / max(count, 1.0)}


def fixed_masks(
    mask: MaskConfig, config: PretrainConfig, samples: list[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns the masks of held-out samples, which depend on nothing but their numbers."""
    drawn = [
        draw_mask(
            mask,
            config.grid,
            sample_key(0, HELD_OUT_SET, 0, sample, 0, "mask"),
            sample_key(0, HELD_OUT_SET, 0, sample, 0, "decoder_mask"),
        )
        for sample in samples
    ]
    visible, masked = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*drawn, strict=True))
    return visible, masked


def export_encoder(config: PretrainConfig, run: Run, model: nn.Module) -> None:
    """Writes the encoder to the run's folder; every rank calls it, since ZeRO 3 gathers the weights."""
    weights = run.processes.accelerator.get_state_dict(model)
    if run.processes.is_main:
        encoder = {
            name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")
        }
        save_model_folder(run.out / "encoder", encoder, describe_encoder(config.encoder, config.data.clip))


@torch.no_grad()
def save_reconstructions(config: PretrainConfig, run: Run, model: nn.Module, shards: ShardSet) -> list[Path]:
    """Draws filmstrips of a few clips into `pictures/`; every rank calls it, since ZeRO 3 shares the forward pass."""
    model.eval()
    everything = MaskConfig(config.mask.name, config.mask.ratio, decoded=1.0)
    views = EvaluationViews(shards, config.data.clip)
    numbers = np.linspace(0, shards.samples - 1, min(PICTURED_CLIPS, shards.samples)).astype(int)
    paths = []
    for number in numbers.tolist():
        view = views[number, True]
        if view.error is not None:
            continue
        visible, masked = fixed_masks(everything, config, [number], run.processes.device)
        prediction = model(view.clips.to(run.processes.device), visible, masked).prediction
        if run.processes.is_main:
            clip = view.clips[0].numpy()
            shown = visible[0].cpu().numpy()
            painted = paint(
                clip, shown, masked[0].cpu().numpy(), prediction[0].float().cpu().numpy(), config.encoder.tubelet
            )
            path = run.out / "pictures" / f"reconstruction-{len(paths)}.png"
            path.parent.mkdir(exist_ok=True)
            filmstrip(clip, visible_pixels(shown, clip.shape, config.encoder.tubelet), painted).save(path)
            run.tracker.log_picture(run.first_step, f"reconstruction/{len(paths)}", path)
            paths.append(path)
    return paths


def write_pretraining_report(config: PretrainConfig, out: Path, summary: dict[str, Any], strips: list[Path]) -> None:
    """Writes the run's page."""
    write_report(
        out / "report.html",
        title=f"Pretraining {out.name}",
        summary=f"A {config.encoder.variant} {config.encoder.name} encoder, {summary['steps']} steps.",
        headline=headline_of(summary),
        sections=[
            Section("Curves", parts=curve_figures(read_metrics(out / "metrics.jsonl"))),
            Section("Reconstructions", RECONSTRUCTION_NOTE, [Figure(path) for path in strips]),
        ],
        facts={"command line": f"tubelet pretrain --config {out / 'config.yaml'}"},
    )


def headline_of(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the figures at the top of a pretraining run's page."""
    figures = [
        ("loss", "training loss", "{:.4f}"),
        ("validation_loss", "held-out loss", "{:.4f}"),
        ("clips_per_second", "clips per second", "{:.1f}"),
    ]
    return [(text.format(summary[name]), label) for name, label, text in figures if summary.get(name) is not None]

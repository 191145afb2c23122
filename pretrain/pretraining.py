"""Pretraining: the one file that puts data, model and engine together."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from pretrain.agreement import agreed_inputs, fingerprints, open_inputs
from pretrain.config import PretrainConfig
from pretrain.data.balanced import SampleOrder
from pretrain.data.loader import Batch
from pretrain.data.packed_clips import PackedTrainingClips, grid_of_sample
from pretrain.data.randomness import sample_key
from pretrain.data.shards import ShardSet
from pretrain.data.training_clips import TrainingClips
from pretrain.data.views import HELD_OUT_SET, EvaluationViews, Views
from pretrain.engine.checks import Check
from pretrain.engine.distributed import Processes
from pretrain.engine.run import Run
from pretrain.engine.saving import Exported, whole_weights
from pretrain.engine.tracking import METRICS, read_metrics
from pretrain.engine.trainer import Objective
from pretrain.files import replacing
from pretrain.held_out import held_out_loss
from pretrain.identity import named_fields
from pretrain.model.mae import MaskedAutoencoder
from pretrain.model.masking import MaskConfig, draw_mask, mask_counts
from pretrain.model.packing import PackedMaskedAutoencoder
from pretrain.packed_pretraining import (
    packed_reconstruction,
    packed_reconstruction_loss,
    packed_reconstruction_loss_on,
)
from pretrain.packing import packing_of
from pretrain.pictures import (
    PLAIN_RECONSTRUCTION_NOTE,
    RECONSTRUCTION_NOTE,
    UNDECODED_NOTE,
    filmstrip,
    paint,
    visible_pixels,
)
from pretrain.probing import Prober, ProbeSets, open_probe_sets, probe_sections
from pretrain.report import Figure, Section, write_report
from pretrain.sets import RunSets, open_run_sets, save_division
from pretrain.stage import (
    curve_figures,
    going_on,
    is_finished,
    open_stage,
    order_of,
    say_finished,
    start_processes,
    summarise,
    train,
    validate,
)
from pretrain.weights import (
    describe_encoder,
    encoder_from,
    find_encoder,
    fit_to_clips,
    load_encoder,
    load_encoder_weights,
    refuse_other_architecture,
    save_model_folder,
)

PICTURED_CLIPS = 4


class Inputs(NamedTuple):
    """What a pretraining run reads, opened, and what follows from it.

    Attributes:
        sets: What it trains on and what is held out.
        order: The order of the samples.
        steps: Length of the run in steps.
        initial: The weights to start from and their folder, if any.
        clips: Cuts the training clips.
        probed: The labelled sets of the probe, if there is one.
    """

    sets: RunSets
    order: SampleOrder
    steps: int
    initial: tuple[dict[str, Tensor], Path] | None
    clips: TrainingClips
    probed: ProbeSets | None


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Pretrains an encoder and leaves it in the run's folder.

    Returns:
        The run's final figures, as in `summary.json`.

    Raises:
        Refused: The configuration, the shards or the run's checkpoints do not fit; nothing was started.
        StoppedByRule: The run was stopped; its checkpoints are whole.
    """
    validate(config)
    opened = open_inputs(config, lambda: inputs_of(config))
    with start_processes(config) as processes:
        return pretrain_in(processes, config, agreed_inputs(config, processes, opened, hashes_of))


def inputs_of(config: PretrainConfig) -> Inputs:
    """Opens all that the run reads; raises `Refused` for what is wrong with it."""
    sets = open_run_sets(config)
    order = order_of(config, *sets.training)
    steps = config.total_steps(order.steps_per_epoch)
    initial = initial_weights(config, config.init) if config.init else None
    clips = training_clips(config, sets.training, sets.held_out)
    return Inputs(sets, order, steps, initial, clips, open_probe_sets(config))


def hashes_of(inputs: Inputs) -> dict[str, str]:
    """Returns what must be the same on all nodes."""
    sets = inputs.sets
    known, asked = inputs.probed or (None, None)
    return {
        **fingerprints("data.shards", *sets.training),
        **fingerprints("validation.shards", sets.held_out),
        **fingerprints("probe.shards", known),
        **fingerprints("probe.asked", asked),
    }


def pretrain_in(processes: Processes, config: PretrainConfig, inputs: Inputs) -> dict[str, Any]:
    """Pretrains in processes that have found each other; see `pretrain`."""
    sets, order, steps, initial, clips, probed = inputs
    held_out = sets.held_out
    with open_stage(config, processes, "pretrain", order, sets.training, trained_fields(config)) as run:
        order, steps = going_on(config, order, run)
        if is_finished(run, steps):
            return say_finished(run)
        save_division(run, sets)
        torch.manual_seed(config.seed)
        autoencoder = build_autoencoder(config)
        if initial and not run.saved:
            load_encoder_weights(autoencoder.encoder, *initial)
        loss_on = packed_reconstruction_loss_on if config.data.packing else reconstruction_loss_on
        checks = []
        if held_out:
            measure = functools.partial(loss_on, held_out, config, processes)
            checks.append(Check("a validation", config.validation.every, measure))
        if probed:
            checks.append(Prober(config, probed, run).check)
        model = train(
            config,
            run,
            order,
            steps,
            autoencoder,
            clips,
            build_objective(config, processes),
            checks=checks,
            export=functools.partial(export_encoder, config, run),
        )
        done = max(run.first_step, steps)
        strips = save_reconstructions(config, run, done, model, held_out or sets.training[0])
        summary = summarise(run, done)
        processes.on_main_only(lambda: write_pretraining_report(config, run.out, summary, strips))
        run.finish(summary)
        return summary


def trained_fields(config: PretrainConfig) -> dict[str, Any]:
    """Returns what is trained, by the full names of its fields."""
    return {
        **named_fields("encoder", config.encoder.resolved()),
        **named_fields("decoder", config.decoder),
        **named_fields("mask", config.mask),
    }


def training_clips(config: PretrainConfig, sets: tuple[ShardSet, ...], held_out: ShardSet | None) -> TrainingClips:
    """Returns what cuts the run's clips; raises `Refused` where a set does not tell what packing needs to know."""
    if config.data.packing is None:
        draw = functools.partial(draw_mask, config.mask, config.grid)
        return TrainingClips(sets, config.data, config.seed, draw)
    packing = packing_of(config.data, config.encoder.tubelet, config.mask)
    if held_out:
        grid_of_sample(held_out, 0, packing)
    return PackedTrainingClips(sets, config.data, config.seed, packing)


def build_autoencoder(config: PretrainConfig) -> MaskedAutoencoder:
    """Returns the model that the run trains, with fresh weights."""
    encoder = encoder_from(config.encoder, config.data.clip, packing=config.data.packing)
    if config.data.packing:
        return PackedMaskedAutoencoder(encoder, config.decoder)
    return MaskedAutoencoder(encoder, config.decoder, mask_counts(config.mask, config.grid).visible_slots)


def build_objective(config: PretrainConfig, processes: Processes) -> Objective:
    """Returns the loss of a batch."""
    if config.data.packing:
        return packed_reconstruction_loss(processes, config.accumulation(processes.world))
    return reconstruction_loss


def initial_weights(config: PretrainConfig, path: str) -> tuple[dict[str, Tensor], Path]:
    """Returns the weights of the encoder at `path` and its folder; raises `Refused` if it is another encoder."""
    folder = find_encoder(path)
    pretrained = load_encoder(folder)
    refuse_other_architecture("encoder", folder, pretrained.architecture, config.encoder)
    return fit_to_clips(pretrained, folder, config.data.clip, config.data.packing), folder


def reconstruction_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the mean reconstruction loss of a batch."""
    return model(batch.clips, batch.visible, batch.masked).loss.mean()


def reconstruction_loss_on(
    held_out: ShardSet, config: PretrainConfig, processes: Processes, model: nn.Module
) -> dict[str, float]:
    """Computes the mean loss over held-out clips, with the same crops and masks at every call; every rank calls it.

    Args:
        held_out: The held-out set.
        config: The run's configuration, which says how many of its samples are used.
        processes: All processes, which share the samples.
        model: The prepared model.

    Returns:
        As `held_out_loss`.
    """
    data = config.data
    views = EvaluationViews(held_out, data.clip, decoder=data.decoder, decode_limit_s=data.decode_limit_s)

    def losses_of(batch: list[Views]) -> tuple[Tensor, Tensor]:
        visible, masked = fixed_masks(config.mask, config, [one.sample for one in batch], processes.device)
        clips = torch.cat([one.clips for one in batch]).to(processes.device)
        loss = model(clips, visible, masked).loss
        return loss, torch.ones_like(loss)

    return held_out_loss(views, held_out.samples, config, processes, losses_of)


def fixed_masks(
    mask: MaskConfig, config: PretrainConfig, samples: list[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Draws the masks of held-out samples, which depend on nothing but their numbers.

    Args:
        mask: The mask.
        config: The run's configuration, which sets the token grid.
        samples: Sample numbers, B of them.
        device: Where the masks are needed.

    Returns:
        `(B, Nv)` visible and `(B, Nm)` masked token numbers.
    """
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


def export_encoder(config: PretrainConfig, run: Run, model: nn.Module) -> Exported | None:
    """Returns the encoder for the run's folder; every rank calls it, since ZeRO 3 gathers the weights."""
    weights = whole_weights(run.processes, model)
    if weights is None:
        return None
    encoder = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    description = describe_encoder(config.encoder, config.data.clip, config.data.packing)
    return Exported(encoder, lambda copied: save_model_folder(run.out / "encoder", copied, description))


@torch.no_grad()
def save_reconstructions(
    config: PretrainConfig, run: Run, step: int, model: nn.Module, shards: ShardSet
) -> list[Path] | None:
    """Draws filmstrips of a few clips into `pictures/`; every rank calls it, since ZeRO 3 shares the forward pass.

    Args:
        config: The run's configuration.
        run: The open run.
        step: Steps done.
        model: The prepared model.
        shards: The samples to choose from; those that cannot be decoded are left out.

    Returns:
        The files, on rank 0.
    """
    model.eval()
    numbers = np.linspace(0, shards.samples - 1, min(PICTURED_CLIPS, shards.samples)).astype(int)
    reconstruct = packed_reconstruction if config.data.packing else reconstruction
    strips = []
    for number in numbers.tolist():
        reconstructed = reconstruct(config, shards, model, number, run.processes.device)
        if reconstructed and run.processes.is_main:
            strips.append(filmstrip_of(config, *reconstructed))
    return run.processes.on_main_only(lambda: write_pictures(run, step, strips))


def reconstruction(
    config: PretrainConfig, shards: ShardSet, model: nn.Module, number: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Reconstructs all tokens of one sample that training asks for at any time.

    Returns:
        The clip, the numbers of its visible and of its masked tokens, and the prediction, as for `paint`; None where
        the sample cannot be decoded.
    """
    data = config.data
    views = EvaluationViews(shards, data.clip, decoder=data.decoder, decode_limit_s=data.decode_limit_s)
    view = views[number, True]
    visible, masked = fixed_masks(config.mask.as_shown(), config, [number], device)
    prediction = model(view.clips.to(device), visible, masked).prediction[0].float().cpu().numpy()
    if view.error is not None:
        return None
    return view.clips[0].numpy(), visible[0].cpu().numpy(), masked[0].cpu().numpy(), prediction


def filmstrip_of(
    config: PretrainConfig, clip: np.ndarray, visible: np.ndarray, masked: np.ndarray, prediction: np.ndarray
) -> Image:
    """Returns the picture of one reconstruction; arguments as for `paint`."""
    tubelet = config.encoder.tubelet
    painted = paint(clip, visible, masked, prediction, tubelet, config.decoder.targets)
    return filmstrip(clip, visible_pixels(visible, clip.shape, tubelet), painted)


def write_pictures(run: Run, step: int, strips: list[Image]) -> list[Path]:
    """Writes filmstrips to the run's `pictures/` and sends them to W&B; returns the files."""
    paths = []
    for number, strip in enumerate(strips):
        path = run.out / "pictures" / f"reconstruction-{number}.png"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            strip.save(temporary, "PNG")
        if run.tracker:
            run.tracker.log_picture(step, f"reconstruction/{number}", path)
        paths.append(path)
    return paths


def write_pretraining_report(
    config: PretrainConfig, out: Path, summary: dict[str, Any], strips: list[Path] | None
) -> None:
    """Writes the run's page."""
    note = PLAIN_RECONSTRUCTION_NOTE if config.decoder.targets == "pixels" else RECONSTRUCTION_NOTE
    if config.mask.as_shown().decoded < 1:
        note = f"{note} {UNDECODED_NOTE}"
    metrics = read_metrics(out / METRICS)
    write_report(
        out / "report.html",
        title=f"Pretraining {out.name}",
        summary=f"A {config.encoder.variant} {config.encoder.name} encoder, {summary['steps']} steps.",
        headline=headline_of(summary),
        sections=[
            Section("Curves", parts=curve_figures(metrics)),
            *probe_sections(metrics),
            Section("Reconstructions", note, [Figure(path) for path in strips or []]),
        ],
        facts={"command line": f"tubelet pretrain --config {out / 'config.yaml'}"},
    )


def headline_of(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the figures at the top of a pretraining run's page."""
    figures = [
        ("loss", "training loss", "{:.4f}"),
        ("validation_loss", "held-out loss", "{:.4f}"),
        ("probe_knn", "k-NN accuracy", "{:.1%}"),
        ("clips_per_second", "clips per second", "{:.1f}"),
    ]
    return [(text.format(summary[name]), label) for name, label, text in figures if summary.get(name) is not None]

"""The probe of pretraining: what the encoder's features are worth so far, and the alarm when they collapse.

Every so many steps all ranks together compute the features of labelled videos. Logged beside the loss are the accuracy
of their nearest neighbours and the two figures of `collapse.py`. Nothing is trained on the labels, and nothing of the
run's own training depends on the probe.
"""

import functools
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pretrain.collapse import Spread, collapse_of, spread_of
from pretrain.config import PretrainConfig
from pretrain.data.packed_views import PackedEvaluationViews, PackedViews
from pretrain.data.shards import ShardSet
from pretrain.data.views import EvaluationViews
from pretrain.engine.checks import Check, Figures
from pretrain.engine.run import Run
from pretrain.errors import Refused, StoppedByRule
from pretrain.features import Encode, VideoFeatures, mean_features_by, shared_features
from pretrain.labelled import listed, open_labelled, refuse_other_classes, videos_by_class
from pretrain.model.packing import pool_segments
from pretrain.neighbours import knn_accuracy
from pretrain.packing import joined, packing_of, visible_tokens
from pretrain.report import Figure, Section, curves

logger = logging.getLogger(__name__)

FEW_BATCHES = 16  # that a process reads by itself in less time than its loader processes need to start


class ProbeSets(NamedTuple):
    """The labelled sets of a probe.

    Attributes:
        known: Its videos have neighbours' votes.
        asked: Its videos ask; None where each of the known ones asks all others.
    """

    known: ShardSet
    asked: ShardSet | None


def open_probe_sets(config: PretrainConfig) -> ProbeSets | None:
    """Opens the sets of a run's probe, if there is one.

    Raises:
        Refused: A set cannot be opened, has no labels, too few videos, or other classes than the other set.
    """
    if config.probe.shards is None:
        return None
    data = config.data
    known = open_labelled("probe.shards", config.probe.shards, data.clip, data.cache, least=2)
    chosen = config.probe.chosen(known.samples)
    counts = videos_by_class(known, chosen)
    if (counts > 0).sum() < 2:
        raise Refused(
            f"probe.shards: {known.folder} has videos of one class among the {len(chosen)} that are used; give a set "
            f"of two classes or more, or raise probe.samples"
        )
    if config.probe.asked is not None:
        asked = open_labelled("probe.asked", config.probe.asked, data.clip, data.cache)
        refuse_other_classes("probe.asked", asked, "probe.shards", known)
        if asked.fingerprint == known.fingerprint:
            logger.warning(
                "probe.asked: is the set that probe.shards names, so each video is its own nearest neighbour; leave it "
                "out, and each asks all others"
            )
        return ProbeSets(known, asked)
    single = [name for name, count in zip(known.classes, counts, strict=True) if count == 1]
    if single:
        logger.warning(
            "probe.shards: %s: one video each among the %d that are used, so that none of the others is of its class; "
            "raise probe.samples, add videos, or give probe.asked",
            listed(single),
            len(chosen),
        )
    return ProbeSets(known, None)


class Prober:
    """Probes the model of a run, and raises the alarm.

    Args:
        config: The run's configuration.
        sets: The labelled sets.
        run: The open run, in whose checkpoints the figures from before training are kept.
    """

    def __init__(self, config: PretrainConfig, sets: ProbeSets, run: Run) -> None:
        """Takes up what the run's checkpoint notes of the probes before."""
        self.config = config
        self.sets = sets
        self.run = run
        run.state["probe"] = run.saved.state.get("probe") if run.saved else None

    @property
    def check(self) -> Check:
        """The probe as the trainer makes it."""
        return Check("a probe", self.config.probe.every, self.measure, before_training=True, judge=self.judge)

    def measure(self, model: nn.Module) -> Figures:
        """Returns accuracy, effective rank and deviation, and whether the features have collapsed; all ranks call it.

        Raises:
            StoppedByRule: The features are not finite.
        """
        known = self._features(self.sets.known, model)
        asked = self._features(self.sets.asked, model) if self.sets.asked else known
        errors = [error for part in ([known] if asked is known else [known, asked]) for error in part.errors if error]
        figures: Figures = {"probe_errors": len(errors)}
        known, asked = known.decoded(), asked.decoded()
        if len(known.keys) < 2 or not asked.keys:
            return figures
        values, voices = known.values[:, 0], asked.values[:, 0]
        if not (values.isfinite().all() and voices.isfinite().all()):
            error = StoppedByRule(
                "the features that the probe found are not finite; checkpoints are untouched: lower optimizer.base_lr, "
                "or set optimizer.clip_grad"
            )
            error.told = True
            raise error
        own = self.sets.asked is None
        spread = spread_of(values)
        return figures | {
            "probe_knn": knn_accuracy(values, known.labels, voices, asked.labels, leave_out_own=own),
            "probe_rank": spread.rank,
            "probe_deviation": spread.deviation,
            "collapsed": int(collapse_of(spread, self._before_training()) is not None),
        }

    def judge(self, step: int, figures: Figures) -> None:
        """Keeps the figures from before training; warns where the features have collapsed since, and may end the run.

        Raises:
            StoppedByRule: They have collapsed, and `probe.stop_on_collapse` is set.
        """
        if "probe_rank" not in figures:
            return
        noted = self.run.state["probe"] or {}
        spread = Spread(figures["probe_rank"], figures["probe_deviation"])
        before = self._before_training()
        self.run.state["probe"] = noted | {"collapsed": figures["collapsed"]}
        if step == 0:
            self.run.state["probe"] |= {"before": list(spread)}
            return
        why = collapse_of(spread, before)
        if why is None:
            return
        if self.config.probe.stop_on_collapse:
            error = StoppedByRule(
                f"the features have collapsed at step {step}: {why}; checkpoints are untouched: look at the mask, the "
                f"targets and the learning rate, or set probe.stop_on_collapse to false to go on"
            )
            error.told = True
            raise error
        if not noted.get("collapsed"):
            self._warn(step, why)

    def _warn(self, step: int, why: str) -> None:
        text = f"the features have collapsed at step {step}: {why}; look at the mask, the targets and the learning rate"
        logger.warning(text)
        if self.run.tracker:
            self.run.tracker.alert("The features have collapsed", text)

    def _before_training(self) -> Spread | None:
        noted = (self.run.state["probe"] or {}).get("before")
        return Spread(*noted) if noted else None

    def _features(self, shards: ShardSet, model: nn.Module) -> VideoFeatures:
        data, processes = self.config.data, self.run.processes
        views, encode = views_and_encoding(self.config, shards, model, processes.device)
        chosen = self.config.probe.chosen(shards.samples)
        workers = data.workers if len(chosen) > FEW_BATCHES * data.micro_batch * processes.world else 0
        return shared_features(encode, views, chosen, processes, data.micro_batch, workers)


def views_and_encoding(
    config: PretrainConfig, shards: ShardSet, model: nn.Module, device: torch.device
) -> tuple[Dataset, Encode]:
    """Returns what cuts the middle clips of a set's videos, and what makes mean-pooled features of them.

    Args:
        config: The run's configuration.
        shards: The set.
        model: The prepared masked autoencoder, which encodes what comes without a mask.
        device: Where it computes.
    """
    data = config.data
    if data.packing is None:
        views = EvaluationViews(shards, data.clip, decoder=data.decoder, decode_limit_s=data.decode_limit_s)
        return views, mean_features_by(model, device)
    packing = packing_of(data, config.encoder.tubelet)
    packed = PackedEvaluationViews(shards, packing, decoder=data.decoder, decode_limit_s=data.decode_limit_s)
    return packed, functools.partial(_mean_of_packed, model, device)


def _mean_of_packed(model: nn.Module, device: torch.device, group: list[PackedViews]) -> Tensor:
    tokens = visible_tokens(joined([one.sequences for one in group], device))
    return pool_segments(model(tokens).tokens, tokens.segments, 1)[:, 0].float()


CURVES = (
    ("probe_knn", "k-NN accuracy", "share"),
    ("probe_rank", "Effective rank of the features", "rank"),
    ("probe_deviation", "Deviation of the features", "deviation"),
)


def probe_sections(metrics: list[dict[str, Any]]) -> list[Section]:
    """Returns what a run's page shows of its probes; nothing where there are none."""
    probes = [entry for entry in metrics if "probe_rank" in entry]
    if not probes:
        return []
    steps = [entry["step"] for entry in probes]
    text = (
        "What the frozen features of labelled videos are worth: the share of videos whose nearest neighbours are of "
        "their class, and how far features of different videos lie apart. Step 0 is the encoder before training."
    )
    collapsed = [str(entry["step"]) for entry in probes if entry.get("collapsed")]
    if collapsed:
        text = f"The features had collapsed at step {', '.join(collapsed)}. {text}"
    drawn = [
        Figure(curves({name: (steps, [entry[name] for entry in probes])}, title, "step", label))
        for name, title, label in CURVES
    ]
    return [Section("Probe", text, drawn)]

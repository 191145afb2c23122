"""The sets of a run: what it trains on and what is held out, from the fields of `data` and `validation`."""

import logging
from typing import NamedTuple

import numpy as np

from pretrain.config import RunConfig, ValidationConfig
from pretrain.data.clips import ClipConfig
from pretrain.data.partition import groups_of, parts_of
from pretrain.data.shard_cache import CacheConfig
from pretrain.data.shards import ShardSet
from pretrain.data.subset import Subset, common_samples, split_of, whole_and_numbers, write_keys
from pretrain.engine.run import Run
from pretrain.errors import Refused

logger = logging.getLogger(__name__)

SPLIT = "split"
"""The folder of a run that takes the keys of a set that the run divided."""


class RunSets(NamedTuple):
    """The sets of a run.

    Attributes:
        training: The training set, or the sets of a mixture.
        held_out: The held-out set, if there is one.
        divided: Whether both are parts of one set that the run divided.
    """

    training: tuple[ShardSet, ...]
    held_out: ShardSet | None
    divided: bool = False


def open_run_sets(config: RunConfig) -> RunSets:
    """Opens the sets of a run.

    Raises:
        Refused: One of them cannot be opened, has no such split or cannot be divided as asked for, or samples of the
            training set are held out too.
        TubeletError: One cannot be fetched.
    """
    data, validation = config.data, config.validation
    if data.mixture is not None:
        training = tuple(open_shards("data.mixture", folder, data.clip, data.cache) for folder in data.mixture)
    else:
        training = (open_shards("data.shards", data.shards, data.clip, data.cache, data.split),)
    if validation.divides:
        return RunSets(*_divided(training[0], validation), divided=True)
    if validation.shards is None and validation.split is None:
        return RunSets(training, None)
    path = data.shards if validation.shards is None else validation.shards
    held_out = open_shards("validation.shards", path, data.clip, data.cache, validation.split)
    for shards in training:
        _refuse_overlap(shards, held_out)
    return RunSets(training, held_out)


def open_shards(
    field: str, path: str | None, clip: ClipConfig, cache: CacheConfig | None = None, split: str | None = None
) -> ShardSet:
    """Opens a set of shards, or a split of it, to cut clips from.

    Args:
        field: The field that names the set, such as `data.shards`; the field of its split is called alike, such as
            `data.split`, or `train_split` beside `train`.
        path: The set's folder or URL.
        clip: The clips.
        cache: Where shards from a URL are kept.
        split: The split, as `split_of` takes it; None is the whole set.

    Raises:
        Refused: The set cannot be opened, it has no such split, or the clip's stride means nothing on it.
        TubeletError: It cannot be fetched.
    """
    if path is None:
        raise Refused(f"{field}: is missing; give a folder that `tubelet pack` wrote")
    try:
        shards = ShardSet.open(path, cache=cache)
    except Refused as error:
        raise Refused(f"{field}: {error}") from error
    refuse_stride_on_resampled(field, shards, clip)
    if split is None:
        return shards
    try:
        return split_of(shards, split)
    except Refused as error:
        named = f"{field.removesuffix('shards')}split" if field.endswith("shards") else f"{field}_split"
        raise Refused(f"{named}: {error}") from error


def refuse_stride_on_resampled(field: str, shards: ShardSet, clip: ClipConfig) -> None:
    """Raises `Refused` where a clip counts stored frames on a set whose frames packing chose."""
    if clip.stride is not None and shards.resampled:
        raise Refused(
            f"data.clip.stride: {field} {shards.folder} was packed with --fps, so stored frames are not the source's; "
            f"give data.clip.frame_rate instead"
        )


def save_division(run: Run, sets: RunSets) -> None:
    """Tells how a run divided its set, and writes the keys of both parts into its folder; every rank calls it.

    Warns where a whole set is trained on and held out too.
    """
    if sets.held_out and any(common_samples(shards, sets.held_out) for shards in sets.training):
        logger.warning(
            "validation.shards: is a set that is trained on, so its figures tell what was learned by heart; give "
            "another, or validation.share"
        )
    if not sets.divided or sets.held_out is None:
        return
    training, held_out = sets.training[0], sets.held_out
    logger.info(
        f"{held_out.split} of {training.folder}: {training.samples} samples are trained on and {held_out.samples} held "
        f"out; {run.out / SPLIT} lists their keys"
    )

    def write() -> None:
        (run.out / SPLIT).mkdir(exist_ok=True)
        write_keys(run.out / SPLIT / "training.txt", training)
        write_keys(run.out / SPLIT / "validation.txt", held_out)

    run.processes.on_main_only(write)


def _divided(shards: ShardSet, validation: ValidationConfig) -> tuple[tuple[ShardSet], ShardSet]:
    """Returns the part to train on and the part that is held out."""
    keys = shards.keys()
    labels: list[tuple[int, ...]] = shards.label_lists() if shards.labelled else [()] * shards.samples
    groups = groups_of(keys, validation.group)
    if validation.folds is not None and validation.fold is not None:
        field, name = "validation.folds", f"fold {validation.fold} of {validation.folds}"
        parts = parts_of(groups, labels, [1 / validation.folds] * validation.folds, validation.seed)
        chosen = parts == validation.fold - 1
    else:
        share = validation.share or 0
        field, name = "validation.share", f"share {share:g}"
        chosen = parts_of(groups, labels, [1 - share, share], validation.seed) == 1
    _refuse_lost_classes(field, shards, groups, labels, chosen)
    told = name if shards.split is None else f"{name} of {shards.split}"
    whole, rows = whole_and_numbers(shards)
    return (Subset(whole, rows[~chosen], f"all but {told}"),), Subset(whole, rows[chosen], told)


def _refuse_lost_classes(
    field: str, shards: ShardSet, groups: list[str], labels: list[tuple[int, ...]], chosen: np.ndarray
) -> None:
    """Raises `Refused` where a class has no sample to train on, or a share holds none of it out."""
    trained, held_out = (
        {label for number in np.flatnonzero(part).tolist() for label in labels[number]} for part in (~chosen, chosen)
    )
    lost = sorted(held_out - trained) or (sorted(trained - held_out) if field.endswith("share") else [])
    if not lost and chosen.any() and not chosen.all():
        return
    own = [group for group, classes in zip(groups, labels, strict=True) if not lost or lost[0] in classes]
    subject = f"class {shards.classes[lost[0]]!r} of {shards.folder}" if lost else str(shards.folder)
    more = f" (and {len(lost) - 1} other classes)" if len(lost) > 1 else ""
    kinds = len(set(own))
    has = f"{len(own)} sample{'s' * (len(own) > 1)}"
    has += f" in {kinds} group{'s' * (kinds > 1)}" if kinds < len(own) else ""
    raise Refused(
        f"{field}: {subject} has {has}{more}, too few to train on some and hold others out; add videos of it, leave it "
        "out of the set, or give validation.shards"
    )


def _refuse_overlap(training: ShardSet, held_out: ShardSet) -> None:
    """Raises `Refused` where samples of a split would be trained on and held out too; a whole set may be, to try."""
    both = common_samples(training, held_out)
    if not both or (training.split is None and held_out.split is None):
        return
    field = "validation.shards" if held_out.split is None else "validation.split"
    source = f"all of {training.folder}" if training.split is None else f"data.split {training.split}"
    raise Refused(
        f"{field}: {both} of the {held_out.samples} samples of {held_out.split or held_out.folder} are trained on too "
        f"({source}); hold out a split that is not"
    )

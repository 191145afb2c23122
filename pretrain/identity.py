"""What makes a run the same run: its samples, their order, and what is trained must not change between attempts."""

from pathlib import Path
from typing import Any

from pretrain.commandline import to_dict
from pretrain.config import RunConfig
from pretrain.data.balanced import SampleOrder
from pretrain.data.order import Mixture, Order
from pretrain.data.shards import ShardSet
from pretrain.engine.checkpoint_search import find_checkpoint
from pretrain.engine.run import CHECKPOINTS, refuse_changes


def named_fields(name: str, config: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass under their full names, with values as JSON holds them."""
    return {f"{name}.{field}": value for field, value in to_dict(config).items()}


def identity_of(
    config: RunConfig, order: SampleOrder, sets: tuple[ShardSet, ...], trained: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns what must not change between the attempts of a run, as `open_run` takes it.

    Args:
        config: The run's configuration.
        order: The order of the samples.
        sets: The training set, or the sets of a mixture.
        trained: What is trained, by the full names of its fields.

    Returns:
        The values under the names of their fields, and how to tell what some of them stand for.
    """
    mixture = None
    part = "" if sets[0].split is None else f", {sets[0].split}"
    told = {"data.shards": f"{sets[0].folder}{part} (fingerprint {sets[0].fingerprint})", "data.mixture": "none"}
    if isinstance(order, Mixture):
        mixture = [[shards.fingerprint, part.lanes] for shards, part in zip(sets, order.sets, strict=True)]
        places = (
            f"{shards.folder} in {lanes} lanes (fingerprint {fingerprint})"
            for shards, (fingerprint, lanes) in zip(sets, mixture, strict=True)
        )
        told = {"data.shards": "none", "data.mixture": ", ".join(places)}
    identity = {
        "data.shards": sets[0].fingerprint if mixture is None else None,
        "data.mixture": mixture,
        "seed": config.seed,
        "data.global_batch": order.global_batch,
        "data.class_power": config.data.class_power,
        "data.lanes": config.data.lanes,
        "data.shards_per_window": config.data.shards_per_window,
        "data.packing": None if config.data.packing is None else to_dict(config.data.packing),
        **trained,
    }
    return identity, told


def overridden_fields(order: SampleOrder, trained: dict[str, Any]) -> set[str]:
    """Returns what may change in the middle of a run: it neither makes another model nor reads samples twice."""
    masks = {name for name in trained if name.startswith("mask.")}
    return masks | ({"data.global_batch"} if isinstance(order, Order) else set())


def refuse_other_run(
    config: RunConfig, stage: str, order: SampleOrder, sets: tuple[ShardSet, ...], trained: dict[str, Any]
) -> None:
    """Raises `Refused` where the run's folder holds the checkpoints of another run, or none that can be read.

    That is what starting the run would do; here nothing is started. See `identity_of` for the arguments.
    """
    saved = find_checkpoint(Path(config.out) / CHECKPOINTS, config.resume)
    if saved:
        identity, told = identity_of(config, order, sets, trained)
        refuse_changes(saved, stage, identity, told, overridden_fields(order, trained), config.override_config)

"""What `tubelet order` lists: the clips that each step of a run reads, from its recipe or its `config.yaml`."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from finetune.config import FinetuneConfig
from pretrain.commandline import parse
from pretrain.config import PretrainConfig, RunConfig
from pretrain.data.reading_list import reading_list
from pretrain.data.sequence_plan import Packing
from pretrain.errors import Refused
from pretrain.packing import packing_of
from pretrain.sets import open_run_sets
from pretrain.stage import order_of


def clips_read(
    name: str, overrides: list[str], steps: str, world: int = 1, resumed_at: int = 0
) -> Iterator[dict[str, Any]]:
    """Yields what `Reading` holds of each clip, by the names of its fields.

    Args:
        name: A pretraining recipe, or the `config.yaml` of a run, pretraining or finetuning.
        overrides: Fields set on the command line.
        steps: `A:B`, the first and the last step, numbered from 1 as in `metrics.jsonl`.
        world: Processes of the run.
        resumed_at: Steps done when the attempt started; workers take turns from there on.

    Raises:
        Refused: The configuration, its shards, the steps or the world cannot be; nothing was yielded.
    """
    config = read_config(name, overrides)
    if config.steps is None and config.epochs is None:
        raise Refused(f"{name}: gives the run no length; take the run's own config.yaml, or give --epochs")
    config.validate()
    if world < 1:
        raise Refused(f"--world: {world} must be at least 1")
    config.accumulation(world)
    first, last = _parse_steps(steps)
    sets = open_run_sets(config).training
    order = order_of(config, *sets)
    total = config.total_steps(order.steps_per_epoch)
    if last > total:
        raise Refused(f"--steps: {last} is past the end of the run, which has {total} steps; end at {total} or before")
    if not 0 <= resumed_at < first:
        raise Refused(
            f"--resumed-at: {resumed_at} must be at least 0 and before step {first}, the first that is listed"
        )
    masked = isinstance(config, PretrainConfig)
    packing = packing_of_run(config)
    listed = reading_list(sets, config.data, order, range(first, last + 1), world, resumed_at, masked, packing)
    return (clip._asdict() for clip in listed)


def packing_of_run(config: RunConfig) -> Packing | None:
    """Returns how a run sizes its clips; None where all have one size."""
    if config.data.packing is None:
        return None
    if isinstance(config, FinetuneConfig):
        from finetune.starting_point import starting_point  # with all that trains, which no other list needs

        return packing_of(config.data, starting_point(config).architecture.tubelet)
    assert isinstance(config, PretrainConfig), "there are two stages"
    return packing_of(config.data, config.encoder.tubelet, config.mask)


def read_config(name: str, overrides: list[str]) -> RunConfig:
    """Reads the configuration of a run of either stage; raises `Refused` if it is of neither."""
    arguments = ["--config", name, *overrides]
    if _is_of_finetuning(Path(name)):
        return parse(FinetuneConfig, "finetune", arguments)
    return parse(PretrainConfig, "pretrain", arguments)


def _is_of_finetuning(path: Path) -> bool:
    """Whether a file sets a field that finetuning alone has."""
    own, others = ({field.name for field in dataclasses.fields(kind)} for kind in (FinetuneConfig, PretrainConfig))
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False  # what is wrong with it is told when it is parsed
    return isinstance(content, dict) and bool((own - others) & content.keys())


def _parse_steps(steps: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", steps)
    if not match:
        raise Refused(f"--steps: {steps} is not A:B; give the first and the last step, such as 1:10")
    first, last = int(match[1]), int(match[2])
    if not 1 <= first <= last:
        raise Refused(
            f"--steps: {steps} holds no step; steps count from 1, as in metrics.jsonl, and A must not exceed B"
        )
    return first, last

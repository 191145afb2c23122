"""The start of a stage: each process opens what it reads, and all go on together or none does.

What one node cannot open, or has in another version, would leave the others waiting for it; so several processes first
tell each other what they have opened (`engine/preflight.py`), and a process alone is refused at once.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pretrain.commandline import to_dict
from pretrain.config import RunConfig
from pretrain.data.shards import ShardSet
from pretrain.engine.compiler import refuse_without_compiler
from pretrain.engine.distributed import Processes, launched_world
from pretrain.engine.preflight import Opened, Same, preflight
from pretrain.files import sha256_of_file

SAME_COMMAND = "start all processes with the same command line and the same recipe"
SAME_DATA = "copy the same files to all nodes, or name a folder that all of them share"

Inputs = TypeVar("Inputs")


def open_inputs(config: RunConfig, action: Callable[[], Inputs]) -> Opened[Inputs]:
    """Opens what a run reads.

    Args:
        config: The run's configuration.
        action: Opens it. What it raises is raised at once in a process alone; of several, `agreed_inputs` raises it in
            all of them.
    """

    def open_here() -> Inputs:
        if config.compile:
            refuse_without_compiler()
        return action()

    return Opened.by(open_here, launched_world())


def agreed_inputs(
    config: RunConfig, processes: Processes, opened: Opened[Inputs], files: Callable[[Inputs], Mapping[str, str]]
) -> Inputs:
    """Returns what all processes of a run have opened, once it is sure that they can do the run together.

    Args:
        config: The run's configuration.
        processes: All processes of the run.
        opened: What this one has opened.
        files: Tells by the names of their fields what was opened, as hashes.

    Raises:
        Refused: Some of them cannot open it or have opened something else, their versions or configurations differ, or
            they do not share the run's folder; rank 0 tells it with the names of the hosts.
    """

    def same() -> list[Same]:
        fields = {name: json.dumps(value) for name, value in flat_fields(to_dict(config)).items()}
        read = {} if opened.inputs is None else files(opened.inputs)
        return [Same(fields, SAME_COMMAND), Same({**read, **engine_hash(config)}, SAME_DATA)]

    return preflight(processes, Path(config.out), opened, same)


def engine_hash(config: RunConfig) -> dict[str, str]:
    """Returns what tells the content of the DeepSpeed configuration, if there is one, from others of its name."""
    file = config.deepspeed_file
    return {"deepspeed": sha256_of_file(file)[:12]} if file else {}


def fingerprints(field: str, *sets: ShardSet | None) -> dict[str, str]:
    """Returns what tells the sets of a field from others."""
    return {field: ", ".join(shards.fingerprint[:12] for shards in sets if shards)}


def flat_fields(content: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Returns the fields of nested dictionaries under their full names."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= flat_fields(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat

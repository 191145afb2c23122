"""The file of a DeepSpeed configuration: read, and completed with what a run's own configuration decides."""

import json
from pathlib import Path
from typing import Any

from pretrain.engine.devices import Precision
from pretrain.errors import Refused

ZERO_STAGES = (0, 1, 2, 3)


def read_deepspeed(file: Path) -> dict[str, Any]:
    """Returns the content of a DeepSpeed file; raises `Refused` if it is none, or asks for a stage that ZeRO lacks."""
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        stage = dict(content.get("zero_optimization", {})).get("stage", 0)
    except OSError as error:
        raise Refused(f"{file}: cannot be read ({error.strerror}); name a file that every node can read") from None
    except (ValueError, TypeError) as error:
        raise Refused(f"{file}: is not a DeepSpeed configuration in JSON ({error}); mend it") from None
    if stage not in ZERO_STAGES:
        raise Refused(f"{file}: zero_optimization.stage: {stage} is no stage of ZeRO; use 0, 1, 2 or 3")
    return content


def completed(
    file: Path, precision: Precision, accumulation: int, micro_batch: int, clip_grad: float | None
) -> dict[str, Any]:
    """Returns the content of a DeepSpeed file, completed with what the run's own configuration decides."""
    content = read_deepspeed(file)
    content.setdefault("zero_optimization", {"stage": 0})  # DeepSpeed's default, which accelerate wants told
    content["train_micro_batch_size_per_gpu"] = micro_batch
    content["gradient_accumulation_steps"] = accumulation
    content["gradient_clipping"] = clip_grad or 0.0
    content["bf16"] = {"enabled": precision == "bf16"}
    content["fp16"] = {"enabled": precision == "fp16"}
    return content

"""Memory of a training process that follows from the number of parameters alone, by engine and ZeRO stage.

The rules are those of ZeRO (arXiv 1910.02054) with what DeepSpeed allocates besides: 32-bit master weights beside
Adam's two moments, 32-bit gradients while the optimiser steps, and buckets for communication whose size is set by its
configuration and not by the model. DeepSpeed's own estimators leave out the buckets, the gathered weights of ZeRO 3 and
its 16-bit gradients. Activations are counted in `activations.py`.
"""

import dataclasses
from pathlib import Path

from pretrain.engine.deepspeed_file import read_deepspeed
from pretrain.engine.devices import Precision
from pretrain.errors import Refused

FULL, HALF = 4, 2
"""Bytes of a number in fp32, and in bf16 and fp16."""
MOMENTS = 2 * FULL
"""Bytes of Adam's two moments of a parameter."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's `reduce_bucket_size` where a configuration sets none."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters` and `stage3_max_reuse_distance` where a configuration sets none."""


@dataclasses.dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed configuration decides memory; the defaults are DeepSpeed's.

    Attributes:
        stage: What is divided among the processes: nothing, the optimiser's state, gradients too, weights too.
        bucket_elements: Gradients that are reduced together.
        overlaps: Whether one bucket is filled while another is reduced; ZeRO 3 has one bucket either way.
        contiguous: Whether gradients are copied into a bucket.
        live_elements: Weights that ZeRO 3 keeps gathered at once.
        offloads_optimizer: Whether the optimiser's state lies in the host's memory.
        offloads_weights: Whether ZeRO 3's own share of the weights lies there.
    """

    stage: int
    bucket_elements: int = BUCKET_ELEMENTS
    overlaps: bool = False
    contiguous: bool = True
    live_elements: int = LIVE_ELEMENTS
    offloads_optimizer: bool = False
    offloads_weights: bool = False


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes of one process.

    Attributes:
        weights: What the forward pass reads.
        gradients: Gradients, and their 32-bit copy while the optimiser steps.
        optimizer: Adam's moments, and master weights where the model's own are shorter.
        buffers: Buckets for communication.
        host: What lies in the host's memory instead.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    host: int = 0

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.buffers


def read_zero(file: Path) -> Zero:
    """Returns what a DeepSpeed configuration says of memory; raises `Refused` if it is none."""
    content = read_deepspeed(file).get("zero_optimization", {})
    try:
        live = [content.get(f"stage3_{name}", LIVE_ELEMENTS) for name in ("max_live_parameters", "max_reuse_distance")]
        return Zero(
            content.get("stage", 0),
            int(content.get("reduce_bucket_size", BUCKET_ELEMENTS)),
            bool(content.get("overlap_comm", False)),
            bool(content.get("contiguous_gradients", True)),
            min(map(int, live)),
            _is_offloaded(content, "offload_optimizer"),
            _is_offloaded(content, "offload_param"),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise Refused(f"{file}: is not a DeepSpeed configuration in JSON ({error}); mend it") from None


def state_bytes(
    parameters: int, world: int, precision: Precision, zero: Zero | None = None, constants: int = 0
) -> StateBytes:
    """Returns the bytes of weights, gradients and AdamW's state in one process.

    Args:
        parameters: Trained numbers of the model.
        world: Processes.
        precision: Arithmetic of the forward and backward pass.
        zero: DeepSpeed's configuration; None is plain data parallelism, which keeps everything in fp32.
        constants: Numbers of the model that are not trained, such as fixed positions.
    """
    if zero is None:
        copies = FULL * parameters if world > 1 else 0  # the buckets that torch's data parallelism reduces
        return StateBytes(FULL * (parameters + constants), FULL * parameters, MOMENTS * parameters, copies)
    size = FULL if precision == "fp32" else HALF
    if zero.stage == 0:
        master = FULL * parameters if size == HALF else 0
        bucket = size * min(parameters, BUCKET_ELEMENTS) if world > 1 else 0
        return StateBytes(
            size * (parameters + constants), size * parameters + master, MOMENTS * parameters + master, bucket
        )
    share = -(-parameters // world)
    weights, gradients = size * parameters, size * share
    if zero.stage == 1:
        gradients = size * parameters
    if zero.stage == 3:  # below `live_elements` no weights are given back between forward and backward pass
        weights = size * (share + (min(parameters, zero.live_elements) if world > 1 else 0))
    copies = FULL * share
    optimizer = (MOMENTS + FULL) * share
    buckets = (2 if zero.overlaps and zero.stage < 3 else 1) if zero.contiguous else 0
    host = 0
    if zero.offloads_optimizer:
        host += optimizer + copies
        optimizer = copies = 0
    if zero.offloads_weights and zero.stage == 3:
        host += size * share
        weights -= size * share
    return StateBytes(
        weights + size * constants, gradients + copies, optimizer, buckets * size * zero.bucket_elements, host
    )


def _is_offloaded(content: dict, name: str) -> bool:
    return (content.get(name) or {}).get("device", "none") != "none"

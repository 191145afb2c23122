"""What a forward pass keeps for the backward pass, and what a step computes, counted without computing it.

torch's fake tensors go through the very operations that real ones on the CPU would, with shapes and types and no
numbers, so a model of any size is counted in seconds. A GPU's kernels keep the same tensors but for small ones of their
own (attention's statistics), so this is an estimate for it. Operations are counted on the meta device, on which
attention is two matrix products; recomputed activations count once.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pretrain.engine.distributed import Precision
from pretrain.engine.feeding import on_device

Loss = Callable[[nn.Module, Any], Tensor]
"""From a model and a batch to the loss."""


class Kept(NamedTuple):
    """Bytes that a forward pass keeps.

    Attributes:
        total: Of all tensors that the backward pass reads, without weights.
        largest: Of the one among the blocks that keeps most.
    """

    total: int
    largest: int


def fake_activations(model: nn.Module, batch: Any, loss: Loss, precision: Precision, casts: bool) -> Kept:
    """Counts what a forward pass keeps, on fake tensors.

    Args:
        model: A model on the meta device, whose blocks stand in `nn.ModuleList`s; it is left as it is.
        batch: A micro-batch, a named tuple with tensors.
        loss: Computes its loss.
        precision: Arithmetic of the forward pass.
        casts: Whether the weights themselves are in `precision`, as under DeepSpeed; else autocast converts them.
    """
    short = precision != "fp32"
    faked = copy.deepcopy(model)
    if short and casts:
        faked.to(torch.bfloat16)  # fp16 is as long, and not every kernel of the CPU knows it
    with FakeTensorMode(allow_non_fake_inputs=True):
        return kept_activations(faked.to_empty(device="cpu"), batch, loss, autocasts=short and not casts)


def kept_activations(model: nn.Module, batch: Any, loss: Loss, autocasts: bool = False) -> Kept:
    """Counts what a forward pass on the CPU keeps; arguments as for `fake_activations`."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}  # with the tensor, lest its number is used again
    of_blocks = [0]

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    def total() -> int:
        return sum(size for size, _ in kept.values())

    with (
        _around_blocks(model, total, of_blocks),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocasts),
    ):
        end = loss(model, batch)
    assert end.requires_grad, "else nothing was to be kept"
    return Kept(total(), max(of_blocks))


def step_flops(model: nn.Module, batch: Any, loss: Loss) -> int:
    """Returns the floating-point operations of forward and backward pass; arguments as for `fake_activations`."""
    counted = copy.deepcopy(model)
    (batch,) = on_device([batch], torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        loss(counted, batch).backward()
    return counter.get_total_flops()


@contextlib.contextmanager
def _around_blocks(model: nn.Module, total: Callable[[], int], grown: list[int]) -> Iterator[None]:
    """Notes by how much each block lets the total grow."""
    before: list[int] = []
    hooks = []
    for stack in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        for block in stack:
            hooks.append(block.register_forward_pre_hook(lambda *_: before.append(total())))
            hooks.append(block.register_forward_hook(lambda *_: grown.append(total() - before.pop())))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

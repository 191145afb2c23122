"""Handing batches to the device and taking figures from it, without waiting for either.

On a GPU each batch is copied while the step before it computes.

The copy runs on a stream of its own, from the pinned memory in which the loader leaves a batch, and the step waits for
it on the device, never on the CPU. One batch is taken ahead and no more: what a run has consumed is counted in steps,
so a batch that was taken and not trained on is read again after resuming.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def on_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yields batches, which are named tuples, with their tensors on the device.

    Args:
        batches: Micro-batches in memory, pinned where the device is a GPU.
        device: Where the model computes.
    """
    if device.type == "cuda":
        return _copied_ahead(batches, device)
    return (_moved(batch, device) for batch in batches)


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yields items, each once the one after it has been taken; what taking that one raises is raised in its turn."""
    taken = iter(items)
    end = object()
    error: Exception | None = None
    ready: Any = next(taken, end)
    while ready is not end:
        following: Any = end
        try:
            following = next(taken, end)
        except Exception as raised:
            error = raised
        yield ready
        ready = following
    if error:
        raise error


def begin_reading(*figures: Tensor | float) -> Callable[[], list[float]]:
    """Begins to copy scalars to the host.

    Returns:
        A function that waits for this copy, and not for what the device was given to do since, and returns the values.
    """
    copies = [
        figure.detach().to("cpu", non_blocking=True) if isinstance(figure, Tensor) else figure for figure in figures
    ]
    on_gpu = [figure.device for figure in figures if isinstance(figure, Tensor) and figure.is_cuda]
    arrived = torch.cuda.current_stream(on_gpu[0]).record_event() if on_gpu else None

    def read() -> list[float]:
        if arrived is not None:
            arrived.synchronize()
        return [float(copy) for copy in copies]

    return read


def _copied_ahead(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    copies = torch.cuda.Stream(device)

    def begun(batch: Any) -> tuple[Any, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            moved = _moved(batch, device)
        return moved, copies.record_event()

    for batch, copied in one_ahead(map(begun, batches)):
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copied)
        for tensor in _tensors(batch).values():
            tensor.record_stream(computing)  # or its memory would be free to the next copy while it is still read
        yield batch


def _moved(batch: Any, device: torch.device) -> Any:
    return batch._replace(**{name: tensor.to(device, non_blocking=True) for name, tensor in _tensors(batch).items()})


def _tensors(batch: Any) -> dict[str, Tensor]:
    return {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor)}

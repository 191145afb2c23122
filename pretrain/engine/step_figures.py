"""What a step tells of itself beside its loss: what loading cost, what was passed over, memory, and sound weights."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

LOADER_COSTS = ("read_s", "decode_s", "cut_s", "cache_hits", "cache_misses", "places", "tokens")
"""What a batch tells of its loading: seconds, reads of remote shards, and places and tokens of packed sequences."""


def count_skipped(reports: list[dict[str, Any]]) -> tuple[int, int]:
    """Returns how many samples were found bad, and how many were not attempted, which no rule counts."""
    quarantined = sum(report.get("quarantined", False) for report in reports)
    return len(reports) - quarantined, quarantined


def loader_shares(costs: list[float]) -> dict[str, float]:
    """Returns shares: of the loader's time, of remote reads, and of the places of packed sequences."""
    read_s, decode_s, cut_s, hits, misses, places, tokens = costs
    loading_s, remote_reads = read_s + decode_s + cut_s, hits + misses
    shares = {"read_share": read_s / loading_s, "decode_share": decode_s / loading_s} if loading_s > 0 else {}
    shares |= {"cache_hit_share": hits / remote_reads} if remote_reads > 0 else {}
    return shares | ({"utilisation": tokens / places} if places > 0 else {})


def weights_are_finite(model: nn.Module, rank: int) -> bool:
    """Whether all weights that this rank holds are finite; under ZeRO 3 these are a part of each."""
    found = []
    parameters: Iterator[Any] = model.parameters()  # to which ZeRO 3 gives attributes of its own
    for parameter in parameters:
        part = parameter.detach()
        if hasattr(parameter, "ds_tensor"):
            part = parameter.ds_tensor.detach().flatten()
            part = part[: max(parameter.ds_numel - rank * part.numel(), 0)]  # the last part's end is padding
        found.append(part.isfinite().all())
    return bool(torch.stack(found).all())


def memory_gib(device: torch.device) -> float:
    """Returns the greatest memory used so far: the GPU's, or the process's own where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

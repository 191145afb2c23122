"""Multi-head self-attention (Vaswani et al., 2017) on torch's fused kernels."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        width: Width of a token, D; a multiple of `heads`.
        heads: Number of heads, Hd.
    """

    def __init__(self, width: int, heads: int) -> None:
        """Creates one projection for queries, keys and values, and the output projection."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        # Keys have no bias: softmax does not see it (VideoMAE, BEiT).
        self.query_bias = nn.Parameter(torch.zeros(width))
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.projection = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Lets every token attend to every token: `(B, N, D)` to `(B, N, D)`."""
        bias = torch.cat([self.query_bias, torch.zeros_like(self.query_bias), self.value_bias])
        qkv = functional.linear(tokens, self.qkv.weight, bias)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, Hd, N, D / Hd)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return self.projection(attended.transpose(1, 2).flatten(2))

"""The pre-norm transformer block of ViT (arXiv 2010.11929, equations 2 and 3) and stacks of it."""

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from pretrain.model.attention import Attention

LAYER_NORM_EPS = 1e-6


class Block(nn.Module):
    """z <- z + MSA(LN(z)); z <- z + MLP(LN(z)).

    Args:
        width: Width of a token, D.
        heads: Number of heads.
        mlp_ratio: Width of the MLP's hidden layer over D.
        drop_path: Probability that a clip skips a residual branch in training (stochastic depth).
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        """Creates both branches."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` to `(B, N, D)`."""
        tokens = tokens + self.drop_path(self.attention(self.attention_norm(tokens)))
        return tokens + self.drop_path(self.mlp(self.mlp_norm(tokens)))


def stack(depth: int, width: int, heads: int, mlp_ratio: float, drop_path: list[float]) -> nn.ModuleList:
    """Returns `depth` blocks; `drop_path` holds one probability for each."""
    return nn.ModuleList(Block(width, heads, mlp_ratio, drop_path[layer]) for layer in range(depth))


def drop_path_rates(depth: int, last: float) -> list[float]:
    """Returns probabilities that rise linearly from 0 to `last` over the blocks (arXiv 1603.09382)."""
    return torch.linspace(0, last, depth, device="cpu").tolist()


def initialise(module: nn.Module) -> None:
    """Initialises linear layers by Xavier and zeros, as MAE and VideoMAE do; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

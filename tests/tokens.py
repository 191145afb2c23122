"""What tests of encoders share."""

import math

import torch
from torch import Tensor, nn

from pretrain.model.attention import Attention
from pretrain.model.blocks import ResidualBlock
from pretrain.model.encoder import Encoder


def take_tokens(tokens: Tensor, numbers: Tensor) -> Tensor:
    """Returns `tokens[b, numbers[b]]` for each clip: `(B, N, D)` and `(B, K)` give `(B, K, D)`."""
    return tokens.gather(1, numbers.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


@torch.no_grad()
def attracting(encoder: Encoder) -> Encoder:
    """Sets an encoder's weights so that all queries look for white tubelets, and blocks leave tokens as they are.

    Black tubelets, class tokens and positions are 0 in all channels; a white tubelet is large in the first one, which
    every key copies and every query asks for.
    """
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, Attention):
            for parameter in module.parameters():
                parameter.zero_()
            module.query_bias.fill_(1)
            module.qkv.weight.chunk(3)[1][:, 0] = 10
        elif isinstance(module, ResidualBlock):
            module.mlp.fc2.weight.zero_()
            module.mlp.fc2.bias.zero_()
    for name, parameter in encoder.named_parameters():
        if "positions" in name or name == "class_token" or ".message." in name:
            parameter.zero_()
    projection = encoder.embedding.projection
    projection.weight.zero_()
    projection.weight[0] = 10 / projection.in_features
    projection.bias.zero_()
    black = torch.zeros(math.prod(encoder.embedding.tubelet) * 3, dtype=torch.uint8)
    projection.bias[0] = -encoder.embedding.embed(black)[0]
    return encoder

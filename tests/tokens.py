"""What tests of the model room share."""

from torch import Tensor


def take_tokens(tokens: Tensor, numbers: Tensor) -> Tensor:
    """Returns `tokens[b, numbers[b]]` for each clip: `(B, N, D)` and `(B, K)` give `(B, K, D)`."""
    return tokens.gather(1, numbers.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))

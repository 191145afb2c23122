"""Small reference models of random weights, and the comparison of gradients through the conversion.

A conversion is made of differentiable operations, so ours can be run on weights that are functions of the reference's
parameters: then each parameter of the reference has two gradients, and they must be equal. Where one of its parameters
is repeated or added to another in ours, the sum is right by construction of the chain rule.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from finetune.classifier import Classifier
from finetune.config import HeadConfig
from finetune.conversion import Preprocessing, as_classifier
from pretrain.data.clips import ClipConfig
from pretrain.model.encoder import Encoded
from pretrain.model.encoders import build_encoder
from pretrain.model.mae import MaskedAutoencoder, Reconstruction
from pretrain.model.weights.layouts import convert
from pretrain.model.weights.parts import ConvertedModel
from pretrain.model.weights.source import Source

TOLERANCE = 1e-5
FRAMES, SIZE, PATCH, CLASSES = 4, 32, 8, 5
SIZES = {
    "image_size": SIZE,
    "num_frames": FRAMES,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}


@torch.no_grad()
def perturbed(model: nn.Module) -> Any:
    """The model in evaluation, with its weights away from biases of zero and gains of one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def clips_of(frames: int, batch: int = 3) -> Tensor:
    shape = (batch, frames, SIZE, SIZE, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def pixel_values(clips: Tensor, model: ConvertedModel) -> Tensor:
    """The clips as the references' processors hand them over: normalised, (B, T, C, H, W)."""
    return ((clips / 255 - torch.tensor(model.mean)) / torch.tensor(model.std)).permute(0, 1, 4, 2, 3)


def converted(reference: nn.Module, config: Mapping[str, Any] | None = None, **options: Any) -> ConvertedModel:
    """The reference's weights by our names, as functions of its parameters."""
    if config is None:
        config = reference.config.to_dict() if hasattr(reference, "config") else {}
    return convert(Source(dict(reference.named_parameters()), config, **options))


def run_with(module: nn.Module, weights: Mapping[str, Tensor], *inputs: Any) -> Any:
    """What a module returns with these weights, which are all that it has."""
    assert set(weights) == set(module.state_dict())
    return functional_call(module.eval(), dict(weights), inputs)


def run_encoder(model: ConvertedModel, clips: Tensor, *visible: Tensor) -> Encoded:
    has_token = "class_token" in model.weights
    encoder = build_encoder(model.encoder, model.frames, model.size, model.mean, model.std, has_token)
    return run_with(encoder, model.weights, clips, *visible)


def run_autoencoder(model: ConvertedModel, clips: Tensor, visible: Tensor, masked: Tensor) -> Reconstruction:
    encoder = build_encoder(model.encoder, model.frames, model.size, model.mean, model.std)
    autoencoder = MaskedAutoencoder(encoder, model.decoder.config)
    weights = {f"encoder.{name}": weight for name, weight in model.weights.items()} | model.decoder.weights
    return run_with(autoencoder, weights, clips, visible, masked)


def run_classifier(model: ConvertedModel, clips: Tensor) -> Tensor:
    clip = ClipConfig(frames=model.frames, stride=1, size=model.size[0], mean=model.mean, std=model.std)
    classes = tuple(map(str, range(len(model.head.weights["last.bias"]))))
    weights, description = as_classifier(model, Preprocessing(clip), classes)
    classifier = Classifier(description.build_encoder(), HeadConfig(pool=model.head.pool), len(classes))
    return run_with(classifier, weights, clips)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def probe(output: Tensor) -> Tensor:
    """A number whose gradient depends on every value of an output, of order one."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    return (output * weights).sum() / output.numel() ** 0.5


def assert_same_gradients(ours: Tensor, theirs: Tensor, *within: nn.Module | Tensor) -> None:
    """Every parameter of the reference, and every input, has the same gradient through either model.

    Args:
        ours: A number that our model returned.
        theirs: The same of the reference.
        within: The reference, and inputs.
    """
    named = {}
    for number, one in enumerate(within):
        named |= dict(one.named_parameters()) if isinstance(one, nn.Module) else {f"input {number}": one}
    expected = torch.autograd.grad(theirs, list(named.values()))
    found = torch.autograd.grad(ours, list(named.values()))
    for name, mine, other in zip(named, found, expected, strict=True):
        difference, scale = (mine - other).abs().max().item(), other.abs().max().item()
        assert difference <= TOLERANCE * max(1.0, scale), f"{name}: {difference} of {scale}"
        norm = other.norm().item()
        assert (mine - other).norm().item() <= 1e-4 * norm + 1e-5, f"{name}: differs by more than rounding from {norm}"
    assert max(one.abs().max().item() for one in expected) > 0.01, "gradients this small would prove nothing"

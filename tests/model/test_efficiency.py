"""Nothing in a step depends on values: models compile whole, run on fake tensors, and recompute what they forget."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain.model.blocks import recompute_activations
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import ENCODERS, build_encoder
from pretrain.model.mae import DecoderConfig, MaskedAutoencoder
from pretrain.model.masking import MaskConfig, draw_mask

ENCODER = EncoderConfig(width=16, depth=1, heads=2, temporal_depth=1, tubelet=(2, 8, 8), positions="sincos_3d")
DECODER = DecoderConfig(width=16, depth=1, heads=2)
FRAMES, SIZE = 4, 16
NAMES = pytest.mark.parametrize("name", list(ENCODERS))
PAIRS = [(name, "joint" if name in ("joint", "cross_frame") else "cross") for name in ENCODERS]


def model_of(name: str, attention: str = "joint", **fields) -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = build_encoder(dataclasses.replace(ENCODER, name=name, **fields), FRAMES, SIZE)
    return MaskedAutoencoder(encoder, dataclasses.replace(DECODER, attention=attention))


def inputs_of(model: MaskedAutoencoder) -> tuple[Tensor, Tensor, Tensor]:
    """Clips, visible and masked token numbers of two clips, half of whose masked tokens are reconstructed."""
    clips = torch.randint(0, 256, (2, FRAMES, SIZE, SIZE, 3), dtype=torch.uint8)
    drawn = [draw_mask(MaskConfig("tube", 0.5, 0.5), model.encoder.grid, key, key) for key in range(2)]
    return clips, *(torch.stack([torch.from_numpy(one) for one in part]) for part in zip(*drawn, strict=True))


def losses_and_gradients(model: MaskedAutoencoder, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The loss of each clip, then the gradient of each parameter that has one."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(*inputs).loss
    loss.mean().backward()
    return [loss.detach(), *(one.grad.clone() for one in model.parameters() if one.grad is not None)]


def take_values_away(model: nn.Module, fake: FakeTensorMode) -> None:
    """Puts fake tensors in place of all parameters and buffers."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: fake.from_tensor(value) for name, value in held.items() if value is not None})


@pytest.mark.parametrize(("name", "attention"), PAIRS)
def test_forward_and_backward_compile_without_a_graph_break_and_change_nothing(compiling, name, attention):
    model = model_of(name, attention)
    inputs, names = inputs_of(model), list(model.state_dict())
    eager = losses_and_gradients(model, inputs)
    model.compile(fullgraph=True, backend="aot_eager")
    for one, other in zip(losses_and_gradients(model, inputs), eager, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert list(model.state_dict()) == names, "what is compiled keeps its names"


@NAMES
@pytest.mark.parametrize("attention", ["joint", "cross"])
@pytest.mark.parametrize("recomputes", [False, True], ids=["keeping", "recomputing"])
def test_a_step_reads_no_value(name, attention, recomputes):
    """Fake tensors have shapes and no values: reading one, or a shape that depends on one, raises."""
    model = model_of(name, attention, drop_path=0.3)
    if recomputes:
        recompute_activations(model)
    with FakeTensorMode() as fake:
        take_values_away(model, fake)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        shape = (2, FRAMES, SIZE, SIZE, 3)
        numbers = torch.zeros(2, 4, dtype=torch.int64)
        loss = model(torch.zeros(shape, dtype=torch.uint8), numbers, numbers).loss
        loss.mean().backward()
        optimizer.step()
        assert loss.shape == (2,)
        assert all(one.grad is not None for one in model.parameters())


@NAMES
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_an_encoder_of_all_tokens_reads_no_value(name, positions):
    config = dataclasses.replace(ENCODER, name=name, positions=positions, width=32)
    encoder = build_encoder(config, FRAMES, SIZE, class_token=True)
    with FakeTensorMode() as fake:
        take_values_away(encoder, fake)
        encoded = encoder(torch.zeros((2, FRAMES, SIZE, SIZE, 3), dtype=torch.uint8))
        (encoded.class_token.sum() + encoded.mean().sum()).backward()
        assert encoded.tokens.shape == (2, 8, 32)


def test_fake_tensors_find_a_value_that_is_read():
    """The tests above would pass if fake tensors had values."""
    with FakeTensorMode():
        for read in (torch.Tensor.item, bool, torch.nonzero):
            with pytest.raises(Exception, match=r"aten\.(_local_scalar_dense|nonzero)"):
                read(torch.ones(1).sum())


@NAMES
def test_recomputing_activations_changes_no_gradient_though_paths_are_dropped(name):
    model = model_of(name, depth=3, drop_path=0.5)
    inputs = inputs_of(model)
    kept = losses_and_gradients(model, inputs)
    recompute_activations(model)
    assert all(torch.equal(one, other) for one, other in zip(losses_and_gradients(model, inputs), kept, strict=True))
    model.eval()
    undropped = losses_and_gradients(model, inputs)
    assert not torch.equal(undropped[0], kept[0]), "no path was dropped"


@NAMES
def test_recomputing_activations_keeps_little_more_than_the_inputs_of_blocks(name):
    model = model_of(name, depth=8)
    inputs = inputs_of(model)

    def kept_bytes() -> int:
        kept = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*inputs).loss
        weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
        assert loss.requires_grad
        return sum(size for place, size in kept.items() if place not in weights)

    before = kept_bytes()
    recompute_activations(model)
    assert kept_bytes() < before / 3

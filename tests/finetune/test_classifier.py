"""The classifier and its folder: the class token, the head, layers for layer-wise decay, and weights that travel."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from finetune.classifier import Classifier, ModelDescription, load, save_classifier
from finetune.config import HeadConfig
from pretrain.data.clips import ClipConfig
from pretrain.engine.optimizer import OptimizerConfig, build_optimizer
from pretrain.errors import Refused
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import ENCODERS
from pretrain.weights import encoder_from, load_encoder_weights
from tests.runs import run

CLIP = ClipConfig(frames=4, stride=1, size=16)


def classifier(name: str, pool: str, classes: int = 3, **head) -> Classifier:
    config = EncoderConfig(name=name, width=32, depth=2, heads=2, temporal_depth=2, tubelet=(2, 8, 8))
    torch.manual_seed(0)
    encoder = encoder_from(config, CLIP, class_token=pool == "class_token")
    return Classifier(encoder, HeadConfig(pool=pool, **head), classes).eval()


@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.parametrize("pool", ["class_token", "mean", "attention"])
def test_every_encoder_with_every_pooling_gives_logits_that_depend_on_the_clip(name, pool):
    model = classifier(name, pool, hidden=(8,), init_scale=1.0)
    clips = torch.randint(0, 256, (3, 4, 16, 16, 3), dtype=torch.uint8)
    logits = model(clips)
    assert logits.shape == (3, 3)
    assert not torch.allclose(logits[0], logits[1])
    logits.sum().backward()
    unused = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not unused, "parameters without a gradient stop data-parallel training"


@pytest.mark.parametrize(
    ("name", "pool"), [*((name, "class_token") for name in ENCODERS), ("joint", "mean"), ("joint", "attention")]
)
def test_every_encoder_and_every_pooling_compile_without_a_graph_break_and_change_nothing(compiling, name, pool):
    model = classifier(name, pool, init_scale=1.0)
    clips = torch.randint(0, 256, (3, 4, 16, 16, 3), dtype=torch.uint8)
    expected, names = model(clips), list(model.state_dict())
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(clips), expected, atol=1e-6, rtol=1e-5)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.parametrize("pool", ["class_token", "mean", "attention"])
def test_every_encoder_with_every_pooling_learns_to_tell_clips_apart(name, pool):
    model = classifier(name, pool, hidden=(16,), dropout=0.1, init_scale=0.01).train()
    shade = torch.tensor([30, 128, 225], dtype=torch.uint8).view(3, 1, 1, 1, 1)
    clips = shade + torch.randint(0, 30, (3, 4, 16, 16, 3), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(clips), torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0986, abs=0.01), "even odds for three classes at first"
    assert model.eval()(clips).argmax(1).tolist() == [0, 1, 2]


def test_dropout_is_before_the_last_layer_and_in_training_alone():
    model = classifier("joint", "mean", hidden=(8,), dropout=0.5, init_scale=1.0)
    clips = torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8)
    assert [type(layer).__name__ for layer in model.head] == ["LayerNorm", "Linear", "GELU", "Dropout", "Linear"]
    assert torch.equal(model(clips), model(clips))
    model.head.train()
    assert not torch.equal(model(clips), model(clips))


@pytest.mark.parametrize("name", ["joint", "factorised_encoder"])
def test_a_class_token_is_added_to_an_encoder_that_was_pretrained_without_one(name):
    with_token = classifier(name, "class_token").encoder
    without = encoder_from(with_token.config, CLIP)
    torch.manual_seed(1)
    weights = {key: torch.randn_like(value) for key, value in without.state_dict().items()}
    fresh = with_token.class_token.detach().clone()
    load_encoder_weights(with_token, weights, Path("somewhere"))
    assert torch.equal(with_token.class_token, fresh)
    assert all(torch.equal(with_token.state_dict()[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", ["joint", "factorised_encoder"])
def test_mean_pooling_has_one_norm_behind_the_mean_in_place_of_the_encoders_last(name):
    model, clips = classifier(name, "mean", init_scale=1.0), torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8)
    last_norm = "encoder.norm." if name == "joint" else "encoder.temporal_norm."
    assert not [key for key in model.state_dict() if key.startswith(last_norm)]
    assert [key for key in classifier(name, "class_token").state_dict() if key.startswith(last_norm)]
    pooled = model.encoder(clips).mean()
    norm, _, last = model.head
    torch.testing.assert_close(model(clips), last(norm(pooled)))
    assert not torch.allclose(pooled, norm(pooled), atol=0.1), "the mean is of tokens that no norm has seen"


@pytest.mark.parametrize("name", ["joint", "factorised_encoder"])
def test_attention_pooling_is_a_learned_query_over_the_normalised_tokens(name):
    model, clips = classifier(name, "attention"), torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8)
    pool, encoded = model.pool.attention, model.encoder(clips)
    tokens = encoded.tokens if name == "joint" else encoded.temporal
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(tokens.shape[:2]), atol=1e-5, rtol=0)
    queries = pool.q(pool.latent).expand(2, -1, -1)
    keys, values = pool.kv(tokens).chunk(2, -1)
    heads = []
    for query, key, value in zip(*(part.chunk(2, -1) for part in (queries, keys, values)), strict=True):  # 2 heads
        heads.append((query @ key.transpose(1, 2) / 16**0.5).softmax(-1) @ value)
    pooled = pool.proj(torch.cat(heads, -1))
    pooled = pooled + pool.mlp(pool.norm(pooled))
    torch.testing.assert_close(model.pool(encoded), pooled[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(clips), model.head(pooled[:, 0]), atol=1e-5, rtol=1e-5)


def test_attention_pooling_learns_as_fast_as_the_head_and_its_vectors_do_not_decay():
    model = classifier("joint", "attention")
    optimizer = build_optimizer(model, OptimizerConfig(layer_decay=0.5, weight_decay=0.1), global_batch=256)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    pool = {key: groups[id(value)] for key, value in model.named_parameters() if key.startswith("pool.")}
    assert {group["lr_scale"] for group in pool.values()} == {1.0}
    matrices = ("q", "kv", "proj", "mlp.fc1", "mlp.fc2")
    assert {key for key, group in pool.items() if group["weight_decay"]} == {
        f"pool.attention.{name}.weight" for name in matrices
    }


def test_a_folder_keeps_a_classifier_with_attention_pooling(tmp_path):
    model, clips = classifier("joint", "attention"), torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8)
    head = HeadConfig(pool="attention")
    description = ModelDescription(model.encoder.config, CLIP, head, ("a", "b", "c"), short_side=16, frame_rate=None)
    save_classifier(tmp_path, model.state_dict(), description)
    loaded, read = load(tmp_path)
    assert read == description
    assert torch.equal(loaded(clips), model(clips))


@pytest.mark.parametrize(("name", "blocks"), [("joint", 2), ("factorised_encoder", 4)])
def test_layer_decay_scales_from_the_embedding_to_the_head(name, blocks):
    model = classifier(name, "class_token", hidden=(8,))
    optimizer = build_optimizer(model, OptimizerConfig(layer_decay=0.5), global_batch=256)
    scale = {id(parameter): group["lr_scale"] for group in optimizer.param_groups for parameter in group["params"]}
    scales = {key: scale[id(value)] for key, value in model.named_parameters() if value.requires_grad}
    assert {value for key, value in scales.items() if key.startswith("encoder.embedding.")} == {0.5 ** (blocks + 1)}
    assert {value for key, value in scales.items() if key.startswith(("head.", "encoder.class_token"))} == {1.0}
    for block in range(2):
        values = {value for key, value in scales.items() if key.startswith(f"encoder.blocks.{block}.")}
        assert values == {0.5 ** (blocks - block)}
    if name == "factorised_encoder":
        for block in range(2):
            values = {value for key, value in scales.items() if key.startswith(f"encoder.temporal_blocks.{block}.")}
            assert values == {0.5 ** (blocks - 2 - block)}


def test_a_copied_model_folder_gives_the_same_classes_in_a_fresh_process(finetuned, packed_shards, tmp_path):
    model, description = load(finetuned)
    assert description.classes == ("jump", "run")
    folder = Path(shutil.copytree(finetuned / "model", tmp_path / "elsewhere"))
    video = packed_shards.parent / "videos" / "run" / "2.mp4"
    told = run("launch", ["predict", video, "--model", folder], tmp_path)
    assert told.code == 0, told.text
    assert run("launch", ["predict", video, "--model", finetuned], tmp_path).text == told.text
    copied, _ = load(folder)
    clips = torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8)
    assert torch.equal(copied(clips), model(clips))


def test_a_folder_that_is_no_classifier_or_is_damaged_is_refused(finetuned, pretrained, tmp_path):
    with pytest.raises(Refused, match="is an encoder, not a classifier; finetune it first"):
        load(pretrained / "encoder")
    with pytest.raises(Refused, match=r"nowhere: has no config\.json"):
        load(tmp_path / "nowhere")
    folder = Path(shutil.copytree(finetuned / "model", tmp_path / "model"))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"classes": ["one", "two", "three"]}))
    with pytest.raises(Refused, match=r"config\.json and model\.safetensors do not fit"):
        load(folder)
    (folder / "config.json").write_text(json.dumps({key: content[key] for key in content if key != "head"}))
    with pytest.raises(Refused, match="head"):
        load(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(Refused, match="cannot be read"):
        load(folder)

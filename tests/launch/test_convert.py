"""`tubelet convert`: files that others wrote become models that pretraining, finetuning and prediction start from."""

import argparse
import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from transformers import VideoMAEForPreTraining, VivitConfig, VivitForVideoClassification

from launch.cli import main
from launch.convert import ConvertConfig, convert
from pretrain.errors import Refused
from pretrain.weights import encoder_from, fit_to_clips, load_encoder, load_encoder_weights
from tests.parity.references import SIZES, perturbed
from tests.parity.test_videomae_parity import peer_config
from tests.runs import tiny_pretraining

STANDING_STILL = ["--data.decode_limit_s=0", "--steps=4", "--optimizer.base_lr=1e-9", "--optimizer.base_min_lr=0"]


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """An image model as timm's training script leaves it: the weights among other things."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1, "mlp_ratio": 2}
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save({"model": VisionTransformer(**sizes).state_dict(), "epoch": 3, "args": argparse.Namespace(lr=1)}, path)
    return path


@pytest.fixture(scope="module")
def from_images(vit) -> Path:
    """The encoder of clips that is made of it."""
    out = vit.parent / "encoder"
    assert main(["convert", str(vit), str(out), "--frames", "4", "--size", "16"]) == 0
    return out


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A pretraining model as transformers writes it."""
    folder = tmp_path_factory.mktemp("theirs")
    perturbed(VideoMAEForPreTraining(peer_config(use_mean_pooling=False))).save_pretrained(folder)
    return folder


def refusal(capsys, command: list[str], code: int = 2) -> str:
    capsys.readouterr()
    assert main(command) == code
    return capsys.readouterr().err.splitlines()[-1]


def test_an_image_model_becomes_a_clip_model_and_the_log_tells_the_difference_and_how_to_go_on(vit, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(vit), str(out), "--frames", "4", "--size", "16"]) == 0
    said = capsys.readouterr().err
    assert "greatest difference from VisionTransformer in tokens: " in said
    assert "the head is left out: the source has no names of its classes" in said
    assert "--encoder.positions learned" in said
    assert "--encoder.biases all" in said
    content = json.loads((out / "config.json").read_text())
    assert content["encoder"]["tubelet"] == [2, 8, 8]
    assert (content["clip"]["frames"], content["clip"]["size"], content["clip"]["frame_rate"]) == (4, 16, 7.5)
    weights = load_file(out / "model.safetensors")
    assert weights["positions.table"].shape == (1, 2 * 2 * 2, 64)
    assert weights["embedding.projection.weight"].unflatten(1, (2, -1))[:, 0].abs().max() == 0, "in the central frame"


def test_the_command_that_it_prints_goes_on_pretraining(from_images, vit, packed_shards, tmp_path, capsys):
    assert main(["convert", str(vit), str(tmp_path / "out"), "--frames", "4", "--size", "16"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "tubelet pretrain" in line]
    _, pretrain, *options = shlex.split(line.split("`")[1])
    recipe = tiny_pretraining(tmp_path, packed_shards)
    command = [pretrain, "--config", str(recipe), *options, "--out", str(tmp_path / "run"), "--encoder.drop_path", "0"]
    assert main([*command, *STANDING_STILL]) == 0
    assert "class_token is left out: nothing reads it here" in capsys.readouterr().err
    found, expected = (load_encoder(folder)[0] for folder in (tmp_path / "run" / "encoder", from_images))
    for name in ("blocks.0.attention.qkv.weight", "positions.table"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pool", ["class_token", "mean"])
def test_finetuning_starts_from_it_at_another_frame_count_and_size(from_images, packed_shards, tmp_path, capsys, pool):
    recipe = tiny_pretraining(tmp_path, packed_shards)
    text = "".join(line for line in recipe.read_text().splitlines(True) if not line.startswith(("enc", "dec", "mask")))
    recipe.write_text(text)
    command = ["finetune", "--config", str(recipe), "--encoder", str(from_images), "--out", str(tmp_path / "run")]
    command += ["--head.pool", pool, "--data.clip.frames", "8", "--data.clip.size", "24"]
    assert main([*command, *STANDING_STILL]) == 0
    said = capsys.readouterr().err
    assert "its learned positions are interpolated for clips of 8 frames of 24 pixels" in said
    assert ("class_token is left out" in said) == (pool == "mean")
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert weights["encoder.positions.table"].shape == (1, 4 * 3 * 3, 64)
    token = load_file(from_images / "model.safetensors")["class_token"]
    if pool == "class_token":
        torch.testing.assert_close(weights["encoder.class_token"], token, atol=1e-5, rtol=1e-4)
    else:
        assert "encoder.class_token" not in weights


def test_a_class_token_that_comes_with_the_encoder_learns_as_slowly_as_what_stands_before_the_blocks(from_images):
    weights, architecture, clip, _ = load_encoder(from_images)
    encoder = encoder_from(architecture, clip, class_token=True)
    assert encoder.layer_of("class_token") == encoder.layers + 1
    load_encoder_weights(encoder, weights, from_images)
    assert encoder.layer_of("class_token") == 0


def test_positions_that_do_not_fit_their_description_are_refused_where_they_would_be_interpolated(from_images):
    pretrained = load_encoder(from_images)
    clip = pretrained.clip
    wrong, wanted = dataclasses.replace(clip, size=40), dataclasses.replace(clip, size=24)
    with pytest.raises(Refused, match=r"its positions do not fit its config\.json; export the encoder again"):
        fit_to_clips(pretrained._replace(clip=wrong), from_images, wanted)
    with pytest.raises(Refused, match=r"data\.clip\.mean: is \(0\.5, 0\.5, 0\.5\), but the encoder in"):
        fit_to_clips(pretrained, from_images, dataclasses.replace(clip, mean=(0.5, 0.5, 0.5)))


def test_a_classifier_with_names_of_classes_predicts_and_lends_its_encoder(packed_shards, tmp_path, capsys):
    names = {0: "run", 1: "jump"}
    config = VivitConfig(**SIZES, tubelet_size=[2, 8, 8], id2label=names, label2id={"run": 0, "jump": 1})
    perturbed(VivitForVideoClassification(config)).save_pretrained(tmp_path / "vivit")
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "vivit"), str(out)]) == 0
    assert "greatest difference from VivitForVideoClassification in logits" in capsys.readouterr().err
    video = next((packed_shards.parent / "videos").rglob("*.mp4"))
    assert main(["predict", str(video), "--model", str(out)]) == 0
    assert "jump" in capsys.readouterr().out
    weights, architecture, *_ = load_encoder(out)
    assert architecture.positions == "learned"
    assert {"class_token", "norm.weight", "blocks.1.mlp.fc2.bias"} <= weights.keys()
    assert not any(name.startswith(("encoder.", "head.")) for name in weights)


def test_plain_safetensors_hold_the_encoder_and_tell_what_it_is(from_images, tmp_path):
    out = tmp_path / "encoder.safetensors"
    assert main(["convert", str(from_images), str(out), "--to", "safetensors"]) == 0
    assert load_file(out).keys() == load_file(from_images / "model.safetensors").keys()
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["encoder"])["encoder"]["positions"] == "learned"


def test_a_file_that_could_run_code_is_refused_with_the_remedy(tmp_path, capsys):
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (ran,))

    torch.save({"model": Payload()}, tmp_path / "bad.pth")
    said = refusal(capsys, ["convert", str(tmp_path / "bad.pth"), str(tmp_path / "out")])
    assert "holds more than weights, and reading it could run code" in said
    assert "safetensors.torch.save_file" in said
    assert not ran.exists()
    assert not (tmp_path / "out").exists()


def test_weights_in_half_precision_are_converted_in_full(vit, tmp_path):
    weights = torch.load(vit, weights_only=False)["model"]
    save_file({name: 3 * value.half() for name, value in weights.items()}, tmp_path / "half.safetensors")
    assert main(["convert", str(tmp_path / "half.safetensors"), str(tmp_path / "out")]) == 0
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_nothing_is_left_behind_where_writing_fails(vit, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pretrain.weights.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(ConvertConfig(str(vit), str(tmp_path / "new" / "out")))
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("encoder", {"width": "64"}, "config.json: encoder.width cannot be '64'; export the model again"),
        ("encoder", {"name": "simple"}, "config.json: encoder.name cannot be 'simple'"),
        ("encoder", {"width": 128}, "class_token would be (1, 1, 64), but Tubelet's is (1, 1, 128)"),
        ("clip", {"sides": 3}, "config.json: clip.sides cannot be 3"),
        ("clip", {"mean": [0.5, 0.5]}, "config.json: clip.mean cannot be (0.5, 0.5)"),
        ("packing", {"group": 1.5}, "config.json: packing.group cannot be 1.5"),
    ],
)
def test_a_model_that_is_not_as_its_description_is_refused(from_images, tmp_path, group, change, message):
    folder = shutil.copytree(from_images, tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {group: content.get(group, {}) | change}))
    with pytest.raises(Refused, match=re.escape(message)):
        convert(ConvertConfig(str(folder), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": "4"}, "config.json has num_frames '4', which is no whole number greater than 0"),
        ({"image_size": [32, 32, 3]}, "config.json has image_size [32, 32, 3]"),
        ({"num_attention_heads": 5}, "heads: 5 do not divide the tokens of"),
        ({"hidden_act": ["gelu"]}, "config.json has hidden_act ['gelu'], which is no text"),
        ({"decoder_num_attention_heads": 5}, "decoder.width: 32 must be even and a multiple of decoder.heads 5"),
        ({"hidden_size": 96}, "transformers cannot put these weights into the model that config.json and they descr"),
    ],
)
def test_an_odd_configuration_is_refused_by_its_field(theirs, change, message):
    content = peer_config(use_mean_pooling=False).to_dict() | change
    (theirs / "config.json").write_text(json.dumps(content))
    with pytest.raises(Refused, match=re.escape(message)):
        convert(ConvertConfig(str(theirs), str(theirs / "out")))


def test_a_model_that_computes_something_else_than_its_reference_is_not_written(tmp_path, capsys):
    """Our decoder's norms have the authors' epsilon, which this one has not."""
    config = peer_config(use_mean_pooling=False)
    config.layer_norm_eps = 0.1
    perturbed(VideoMAEForPreTraining(config)).save_pretrained(tmp_path / "theirs")
    said = refusal(capsys, ["convert", str(tmp_path / "theirs"), str(tmp_path / "out")], code=1)
    assert "greatest difference from VideoMAEForPreTraining in reconstructions: " in said
    assert "more than 1e-04 is not the same model, nothing was written" in said
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted_is_refused_in_one_line(vit, from_images, tmp_path, capsys):
    out = str(tmp_path / "out")
    damaged, text, numbers, two = (tmp_path / name for name in ("a.safetensors", "a.pth", "b.pth", "two"))
    damaged.write_bytes(b"damage")
    text.write_bytes(b"damage")
    torch.save([1, 2], numbers)
    pointer, file = tmp_path / "c.pth", tmp_path / "file"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    file.touch()
    two.mkdir()
    for name in ("a.pth", "b.pth"):
        save_file({}, two / name)
    for command, message in (
        ([str(tmp_path / "nowhere"), out], "nowhere: there is no such file or folder"),
        ([str(two), out], "which file holds the weights? (found: a.pth, b.pth)"),
        ([str(damaged), out], "a.safetensors: cannot be read"),
        ([str(text), out], "a.pth: "),
        ([str(numbers), out], "b.pth: holds no state dict"),
        ([str(pointer), out], "c.pth: is no file of PyTorch's, but perhaps a page or a pointer to it"),
        ([str(vit), str(file / "out")], f"nothing can be written to {file}; name another"),
        ([str(vit), out, "--frame_rate", "0"], "frame_rate: 0.0 must be finite and greater than 0"),
        ([str(vit), out, "--heads", "0"], "heads: 0 must be at least 1"),
        ([str(vit), str(from_images)], "encoder: is there already; name another"),
        ([str(vit), out, "--to", "safetensors"], "out: cannot be written as safetensors; name a file NAME.safetensors"),
        (
            [str(vit), out, "--to", "huggingface"],
            "encoder.positions: is learned, but Hugging Face's VideoMAE has sincos",
        ),
        (
            [str(vit), out, "--tubelet", "[2,16,16]"],
            "tubelet: is 2 x 16 x 16, but the image model has patches of 8 x 8",
        ),
        ([str(from_images), out, "--tubelet", "[4,8,8]"], "tubelet: only image models are inflated, and this one sees"),
        ([str(vit), out, "--frames", "3"], "frames: 3 frames do not divide into tubelets of 2"),
        ([str(vit), out, "--size", "20"], "size: 20 x 20 pixels do not divide into patches of 8 x 8"),
        ([str(vit), out, "--heads", "5"], "heads: 5 do not divide the tokens of"),
        ([str(from_images), out, "--inflation", "average"], "inflation: only image models are inflated"),
        ([str(from_images), out, "--frame_rate", "5"], "frame_rate: a model of Tubelet tells it; leave it out"),
        ([str(from_images), out, "--frames", "0"], "frames: 0 must be at least 1"),
        ([str(vit)], "OUT: missing"),
    ):
        assert message in refusal(capsys, ["convert", *command]), command
        assert not (tmp_path / "out").exists()

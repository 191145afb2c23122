"""Every recipe can be read, fits together, and says what the publication says."""

import dataclasses

import pytest

from finetune.config import FinetuneConfig
from pretrain.commandline import parse, recipes_folder
from pretrain.config import PretrainConfig
from pretrain.model.masking import FITS

PRETRAIN = sorted(path.stem for path in (recipes_folder() / "pretrain").glob("*.yaml"))
FINETUNE = sorted(path.stem for path in (recipes_folder() / "finetune").glob("*.yaml"))

# Learning rate in use, least rate in use, global batch, epochs, crop, flip: VideoMAE's scripts.
PUBLISHED_PRETRAINING = {
    "videomae_s": (6e-4, 4e-5, 1024, 1600, "multi_scale", False),
    "videomae_b": (1.2e-3, 8e-5, 2048, 1600, "multi_scale", False),
    "videomae_l": (3e-4, 2e-5, 512, 1600, "multi_scale", False),
    "videomae_b_ssv2": (1.2e-3, 8e-5, 2048, 2400, "multi_scale", False),
    "videomae_b_ucf101": (2.25e-4, 7.5e-6, 192, 3200, "multi_scale", False),
}
PUBLISHED_FINETUNING = {
    "k400_s": (7.5e-4, 1.5e-6, 384, 150, "random_resized", True),
    "k400_b": (7.5e-4, 1.5e-6, 384, 75, "random_resized", True),
    "k400_l": (1e-3, 5e-7, 128, 35, "random_resized", True),
    "ssv2_b": (7.5e-4, 1.5e-6, 384, 30, "random_resized", False),
    "ucf101": (2.5e-4, 5e-6, 128, 100, "random_resized", True),
}
# Frames a second that the model sees: the stored rate over the published sampling rate.
FRAME_RATES = {"k400": 30 / 4, "ssv2": 12 / 2, "ucf101": 25 / 4}


def read(stage: str, name: str):
    config = parse(PretrainConfig if stage == "pretrain" else FinetuneConfig, stage, ["--config", name])
    data = dataclasses.replace(config.data, shards="SHARDS")
    config = dataclasses.replace(config, data=data)
    needs_encoder = stage == "finetune" and config.architecture is None
    return dataclasses.replace(config, encoder="ENCODER") if needs_encoder else config


ALL = [("pretrain", name) for name in PRETRAIN] + [("finetune", name) for name in FINETUNE]


@pytest.mark.parametrize(("stage", "name"), ALL)
def test_a_recipe_opens_with_what_it_reproduces_from_where_and_at_what_cost(stage, name):
    text = (recipes_folder() / stage / f"{name}.yaml").read_text()
    header = text[: text.index("\nout:")]
    for heading in ("Reproduces:", "Expected:", "Cost:", "Command:"):
        assert heading in header
    assert f"--config {name}" in header or "tubelet demo" in header


@pytest.mark.parametrize(("stage", "name"), ALL)
def test_a_recipe_fits_together(stage, name):
    config = read(stage, name)
    config.validate()
    assert config.data.global_batch % config.data.lanes == 0
    for world in (1, 2, 4, 8, 16):
        if config.data.global_batch % (world * config.data.micro_batch) == 0:
            assert config.accumulation(world) * world * config.data.micro_batch == config.data.global_batch
    assert config.optimizer.warmup(100) < config.total_steps(100)
    if stage == "finetune" and config.architecture:
        config.architecture.validate(config.data.clip.frames, config.data.clip.size)


@pytest.mark.parametrize("name", PRETRAIN)
def test_the_encoder_of_a_pretraining_recipe_takes_its_mask(name):
    config = read("pretrain", name)
    assert config.mask.name in FITS[config.encoder.name]


@pytest.mark.parametrize(
    ("stage", "name", "published"),
    [("pretrain", *item) for item in PUBLISHED_PRETRAINING.items()]
    + [("finetune", *item) for item in PUBLISHED_FINETUNING.items()],
)
def test_a_published_recipe_has_the_published_numbers(stage, name, published):
    config = read(stage, name)
    rate, least, batch, epochs, crop, flip = published
    assert config.data.global_batch == batch
    assert config.optimizer.learning_rate(batch) == pytest.approx(rate)
    assert config.optimizer.least_learning_rate(batch) == pytest.approx(least)
    assert (config.epochs, config.data.clip.crop, config.data.clip.flip) == (epochs, crop, flip)
    assert (config.data.clip.frames, config.data.clip.size, config.optimizer.weight_decay) == (16, 224, 0.05)
    dataset = next((part for part in FRAME_RATES if part in name), "k400")
    assert config.data.clip.frame_rate == pytest.approx(FRAME_RATES[dataset])


def test_every_published_recipe_is_compared_with_its_publication():
    assert set(PRETRAIN) - {"demo"} == set(PUBLISHED_PRETRAINING)
    assert {name for name in FINETUNE if not name.startswith("demo")} == set(PUBLISHED_FINETUNING)

"""Every recipe can be read, fits together, and says what the publication says."""

import dataclasses
import functools
import re
from typing import Any

import pytest

from finetune.config import FinetuneConfig
from pretrain.commandline import parse, recipes_folder
from pretrain.config import PretrainConfig
from pretrain.errors import Refused
from pretrain.model.compatibility import fits

PRETRAIN = sorted(path.stem for path in (recipes_folder() / "pretrain").glob("*.yaml"))
FINETUNE = sorted(path.stem for path in (recipes_folder() / "finetune").glob("*.yaml"))
ALL = [("pretrain", name) for name in PRETRAIN] + [("finetune", name) for name in FINETUNE]

# VideoMAE's scripts. Rates in use are base rates times global batch / 256; processes are GPUs, with a micro-batch each.
EVERY_PRETRAINING = {
    "data.repeats": 1,
    "data.clip.frames": 16,
    "data.clip.size": 224,
    "data.clip.crop": "multi_scale",
    "data.clip.flip": False,
    "encoder.name": "joint",
    "encoder.tubelet": (2, 16, 16),
    "encoder.positions": "sincos",
    "encoder.position_temperature": 1e4,
    "encoder.drop_path": 0.0,
    "decoder.mlp_ratio": 4.0,
    "decoder.targets": "normalised",
    "mask.name": "tube",
    "mask.decoded": 1.0,
    "optimizer.warmup_epochs": 40,
    "optimizer.warmup_lr": 0.0,
    "optimizer.weight_decay": 0.05,
    "optimizer.betas": (0.9, 0.95),
    "optimizer.eps": 1e-8,
    "optimizer.layer_decay": None,
    "optimizer.clip_grad": None,
}
PRETRAINING_COLUMNS = (
    *("encoder.variant", "processes", "data.micro_batch", "rate", "least rate", "epochs", "mask.ratio"),
    *("decoder.depth", "decoder.width", "decoder.heads", "data.clip.frame_rate"),
)
PUBLISHED_PRETRAINING = {
    "videomae_s": ("S", 32, 32, 6e-4, 4e-5, 1600, 0.9, 4, 192, 3, 30 / 4),
    "videomae_b": ("B", 64, 32, 1.2e-3, 8e-5, 1600, 0.9, 4, 384, 6, 30 / 4),
    "videomae_l": ("L", 64, 8, 3e-4, 2e-5, 1600, 0.9, 12, 512, 8, 30 / 4),
    "videomae_s_ssv2": ("S", 64, 32, 1.2e-3, 8e-5, 2400, 0.9, 4, 192, 3, 12 / 2),
    "videomae_b_ssv2": ("B", 64, 32, 1.2e-3, 8e-5, 2400, 0.9, 4, 384, 6, 12 / 2),
    "videomae_b_ucf101": ("B", 8, 24, 2.25e-4, 7.5e-6, 3200, 0.75, 4, 384, 6, 25 / 4),
}
EVERY_FINETUNING = {
    "architecture": None,  # the encoder's own
    "data.repeats": 2,
    "data.clip.frames": 16,
    "data.clip.size": 224,
    "data.clip.crop": "random_resized",
    "data.clip.scale": (0.08, 1.0),
    "data.clip.ratio": (0.75, 1.3333),
    "data.clip.stride": None,
    "data.augment.rand_augment": "rand-m7-n4-mstd0.5-inc1",
    "data.augment.colour_jitter": 0.0,
    "data.augment.grey": 0.0,
    "data.augment.erasing": 0.25,
    "data.augment.erasing_mode": "pixel",
    "data.augment.erasing_count": 1,
    "ema.decay": None,
    "freeze": None,
    "head.pool": "mean",
    "head.hidden": (),
    "head.init_scale": 0.001,
    "mixing.mixup": 0.8,
    "mixing.cutmix": 1.0,
    "mixing.probability": 1.0,
    "mixing.switch_probability": 0.5,
    "mixing.label_smoothing": 0.1,
    "optimizer.warmup_epochs": 5,
    "optimizer.weight_decay": 0.05,
    "optimizer.betas": (0.9, 0.999),
    "optimizer.eps": 1e-8,
    "optimizer.clip_grad": None,
}
FINETUNING_COLUMNS = (
    *("pretraining", "processes", "data.micro_batch", "rate", "least rate", "epochs", "optimizer.layer_decay"),
    *("drop_path", "head.dropout", "data.clip.flip", "views.temporal", "views.spatial", "data.clip.frame_rate"),
    *("data.clip.sampling", "optimizer.warmup_lr"),
)
DENSE, SEGMENTS = "time_window", "segments"
PUBLISHED_FINETUNING = {
    "k400_s": ("videomae_s", 32, 12, 7.5e-4, 1.5e-6, 150, 0.75, 0.1, 0.0, True, 5, 3, 30 / 4, DENSE, 0.0),
    "k400_b": ("videomae_b", 64, 6, 7.5e-4, 1.5e-6, 75, 0.75, 0.1, 0.0, True, 5, 3, 30 / 4, DENSE, 0.0),
    "k400_l": ("videomae_l", 64, 2, 1e-3, 5e-7, 35, 0.75, 0.1, 0.0, True, 5, 3, 30 / 4, DENSE, 0.0),
    "ssv2_s": ("videomae_s_ssv2", 32, 12, 1.5e-3, 1.5e-6, 40, 0.7, 0.1, 0.0, False, 2, 3, None, SEGMENTS, 0.0),
    "ssv2_b": ("videomae_b_ssv2", 64, 6, 7.5e-4, 1.5e-6, 30, 0.75, 0.1, 0.0, False, 2, 3, None, SEGMENTS, 0.0),
    "ucf101": ("videomae_b_ucf101", 8, 16, 2.5e-4, 5e-6, 100, 0.7, 0.2, 0.5, True, 5, 3, 25 / 4, DENSE, 1e-8),
}
OUR_OWN = {"demo", "demo_scratch", "videomae_b_cross", "hmdb51", "small_set", "ti_112"}  # no script is published
PUBLISHED = [
    *(
        ("pretrain", name, dict(zip(PRETRAINING_COLUMNS, row, strict=True)))
        for name, row in PUBLISHED_PRETRAINING.items()
    ),
    *(
        ("finetune", name, dict(zip(FINETUNING_COLUMNS, row, strict=True)))
        for name, row in PUBLISHED_FINETUNING.items()
    ),
]


@functools.cache
def read(stage: str, name: str) -> Any:
    config = parse(PretrainConfig if stage == "pretrain" else FinetuneConfig, stage, ["--config", name])
    return dataclasses.replace(config, data=dataclasses.replace(config.data, shards="SHARDS"))


def header_of(stage: str, name: str) -> str:
    text = (recipes_folder() / stage / f"{name}.yaml").read_text()
    return text[: text.index("\nout:")]


@pytest.mark.parametrize(("stage", "name"), ALL)
def test_a_recipe_opens_with_what_it_reproduces_from_where_and_at_what_cost(stage, name):
    header = header_of(stage, name)
    for heading in ("Reproduces:", "Expected:", "Cost:", "Command:"):
        assert heading in header
    assert f"--config {name}" in header or "tubelet demo" in header


@pytest.mark.parametrize(("stage", "name"), ALL)
def test_a_recipe_fits_together(stage, name):
    config = read(stage, name)
    if stage == "finetune" and config.architecture is None:
        with pytest.raises(Refused, match=r"^encoder: is missing"):
            config.validate()
        config = dataclasses.replace(config, encoder="ENCODER")
    config.validate()
    assert config.data.global_batch % config.data.lanes == 0
    assert config.optimizer.warmup(100) < config.total_steps(100)
    if stage == "finetune" and config.architecture:
        config.architecture.validate(config.data.clip.frames, config.data.clip.size)


def test_only_the_demo_trains_from_scratch():
    assert [name for name in FINETUNE if read("finetune", name).architecture] == ["demo_scratch"]


@pytest.mark.parametrize("name", PRETRAIN)
def test_the_encoder_of_a_pretraining_recipe_takes_its_mask(name):
    config = read("pretrain", name)
    assert fits(config.encoder.name, config.mask.kind)


def test_the_cheap_decoders_recipe_is_videomaes_but_for_what_it_says():
    cheap = read("pretrain", "videomae_b_cross")
    decoder = dataclasses.replace(cheap.decoder, attention="joint")
    as_published = dataclasses.replace(cheap, decoder=decoder, mask=dataclasses.replace(cheap.mask, decoded=1.0))
    assert (cheap.decoder.attention, cheap.mask.decoded) == ("cross", 0.25)
    published = read("pretrain", "videomae_b")
    assert dataclasses.replace(as_published, out=published.out, precision=published.precision) == published


@pytest.mark.parametrize(("stage", "name", "row"), PUBLISHED)
def test_a_published_recipe_has_the_published_numbers(stage, name, row):
    config = read(stage, name)
    batch = config.data.global_batch
    derived = {
        "pretraining": row.get("pretraining"),  # named by the command alone, below
        "processes": batch / config.data.micro_batch,
        "rate": pytest.approx(config.optimizer.learning_rate(batch)),
        "least rate": pytest.approx(config.optimizer.least_learning_rate(batch)),
    }
    expected = (EVERY_PRETRAINING if stage == "pretrain" else EVERY_FINETUNING) | row
    fields = [field for field in expected if field not in derived]
    found = derived | {field: functools.reduce(getattr, field.split("."), config) for field in fields}
    assert {field: found[field] for field in expected} == expected


@pytest.mark.parametrize(("stage", "name", "row"), PUBLISHED)
def test_a_published_recipe_runs_on_the_published_processes_and_on_one_or_eight(stage, name, row):
    config = read(stage, name)
    assert config.accumulation(row["processes"]) == 1
    for world in (1, 8):
        assert config.accumulation(world) * world * row["data.micro_batch"] == config.data.global_batch


@pytest.mark.parametrize(("stage", "name", "row"), PUBLISHED)
def test_the_command_of_a_published_recipe_starts_the_published_processes(stage, name, row):
    header = header_of(stage, name)
    nodes = re.search(r"--nnodes (\d+) --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500\n", header)
    assert (int(nodes[1]) if nodes else 1) * 8 == row["processes"]
    assert "torchrun --nnodes" in header or "torchrun --nproc-per-node 8 -m" in header
    if stage == "finetune":
        assert f"--encoder {read('pretrain', row['pretraining']).out}\n" in header


def test_every_published_recipe_is_compared_with_its_publication():
    assert set(PRETRAIN) - OUR_OWN == set(PUBLISHED_PRETRAINING)
    assert set(FINETUNE) - OUR_OWN == set(PUBLISHED_FINETUNING)


@pytest.mark.parametrize("name", PUBLISHED_FINETUNING)
def test_a_published_recipe_says_in_what_it_differs(name):
    header = " ".join(header_of("finetune", name).replace("#", "").split())
    assert "published code augments the whole frame" in header
    assert (
        "published recipe averages the probabilities of a video's views, where this one averages their logits" in header
    )


def test_the_recipe_for_hmdb51_is_that_for_ucf101_at_its_frame_rate():
    ours, theirs = read("finetune", "hmdb51"), read("finetune", "ucf101")
    clip = dataclasses.replace(ours.data.clip, frame_rate=theirs.data.clip.frame_rate)
    assert ours.data.clip.frame_rate == 30 / 4
    data = dataclasses.replace(ours.data, clip=clip)
    assert dataclasses.replace(ours, out=theirs.out, data=data) == theirs


def test_the_recipe_for_small_sets_trains_no_weight_of_the_encoder_and_reads_sets_of_a_few_hundred():
    config = read("finetune", "small_set")
    assert (config.freeze, config.head.pool) == ("encoder", "attention")
    assert config.data.global_batch <= 32
    assert config.accumulation(1) * config.data.micro_batch == config.data.global_batch

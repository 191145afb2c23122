"""The one table of what fits what: against masks that are drawn, in the check of a configuration, in the README."""

import subprocess
import sys
import typing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.errors import Refused
from pretrain.model.compatibility import DECODERS, GUARANTEES, NEEDS, fits, table
from pretrain.model.encoder import EncoderConfig
from pretrain.model.encoders import ENCODERS, build_encoder
from pretrain.model.mae import DecoderConfig, MaskedAutoencoder
from pretrain.model.masking import MaskConfig, MaskName, draw_mask, mask_counts
from pretrain.model.tubelets import Grid

ROOT = Path(__file__).parents[2]
GRID = Grid(6, 4, 6)
MASKS = {
    **{name: MaskConfig(name, 0.5) for name in MaskName.__args__},
    "short block": MaskConfig("block", 0.5, block_slots=2),
}


def slots_of(visible: np.ndarray) -> list[np.ndarray]:
    """Returns the visible positions of each visible slot."""
    slots = (visible[visible // GRID.positions == slot] % GRID.positions for slot in range(GRID.slots))
    return [positions for positions in slots if len(positions)]


def has_equal_counts(masks: list[list[np.ndarray]]) -> bool:
    """Whether (B, Nv, D) can be viewed as (B, S, Nv / S, D), slot by slot."""
    counts = {len(positions) for slots in masks for positions in slots}
    return len(counts) == 1 and len({len(slots) for slots in masks}) == 1


def is_a_product(masks: list[list[np.ndarray]]) -> bool:
    """Whether in that view index k of each slot is one position, too."""
    return has_equal_counts(masks) and all(
        np.array_equal(one, other) for slots in masks for one, other in pairwise(slots)
    )


WORKS = {
    "joint": lambda masks: True,
    "factorised_encoder": has_equal_counts,
    "factorised_self_attention": is_a_product,
    "factorised_dot_product": is_a_product,
    "cross_frame": has_equal_counts,
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("encoder", WORKS)
def test_an_encoder_takes_a_mask_exactly_if_it_works_with_all_that_are_drawn(encoder, kind):
    config = MASKS[kind]
    works = WORKS[encoder]([slots_of(draw_mask(config, GRID, key, 0)[0]) for key in range(30)])
    assert fits(encoder, kind) == works
    if works:
        config.validate(encoder, GRID)
    else:
        with pytest.raises(Refused, match=rf"mask\.\w+: the {encoder} encoder cannot take a {kind} mask; "):
            config.validate(encoder, GRID)


PAIRS = [(encoder, kind) for encoder in NEEDS for kind in GUARANTEES if fits(encoder, kind)]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("encoder", "kind"), PAIRS)
def test_what_the_table_allows_learns_from_every_clip_as_if_it_were_alone(encoder, kind, decoder):
    torch.manual_seed(0)
    sizes = EncoderConfig(encoder, width=24, depth=2, heads=2, temporal_depth=1, tubelet=(1, 2, 2))
    visible_slots = mask_counts(MASKS[kind], GRID).visible_slots
    config = DecoderConfig(width=16, depth=1, heads=2, attention=decoder)
    model = MaskedAutoencoder(build_encoder(sizes, 6, (8, 12)), config, visible_slots)
    drawn = [draw_mask(MASKS[kind], GRID, key, key) for key in range(3)]
    visible, masked = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
    clips = torch.randint(0, 256, (3, 6, 8, 12, 3), dtype=torch.uint8)
    together = model(clips, visible, masked)
    for clip in range(3):
        one = slice(clip, clip + 1)
        alone = model(clips[one], visible[one], masked[one])
        torch.testing.assert_close(alone.prediction, together.prediction[one], rtol=1e-4, atol=1e-5)
    together.loss.sum().backward()
    unmoved = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    assert not unmoved


def test_the_table_knows_every_encoder_mask_and_decoder():
    assert ENCODERS.keys() == NEEDS.keys() == WORKS.keys()
    assert GUARANTEES.keys() == MASKS.keys()
    assert typing.get_type_hints(DecoderConfig)["attention"].__args__ == DECODERS
    assert all(config.kind == kind for kind, config in MASKS.items())


@pytest.mark.parametrize(
    ("encoder", "config", "message"),
    [
        (
            "factorised_encoder",
            MaskConfig("random"),
            "mask.name: the factorised_encoder encoder cannot take a random mask; use random_per_slot, tube, frame, "
            "block or causal",
        ),
        (
            "factorised_dot_product",
            MaskConfig("random_per_slot"),
            "mask.name: the factorised_dot_product encoder cannot take a random_per_slot mask; use tube, frame, block "
            "or causal",
        ),
        (
            "cross_frame",
            MaskConfig("block", block_slots=2),
            "mask.block_slots: the cross_frame encoder cannot take a short block mask; leave it out for blocks of full "
            "duration",
        ),
    ],
)
def test_a_refusal_names_encoder_and_mask_and_what_to_use(encoder, config, message):
    with pytest.raises(Refused) as refusal:
        config.validate(encoder, GRID)
    assert str(refusal.value) == message


def test_the_readme_holds_the_table_that_the_command_prints():
    command = [sys.executable, "-m", "pretrain.model.compatibility"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == table()
    readme = (ROOT / "pretrain/model/README.md").read_text()
    _, between, _ = readme.split("compatibility -->\n")
    assert between == f"{printed}<!-- /"


def test_the_table_says_what_the_check_does():
    header, _, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table().splitlines())
    assert header[2:] == list(GUARANTEES)
    for row in rows:
        encoder = row[0].strip("`")
        assert [cell != "-" for cell in row[2:]] == [fits(encoder, kind) for kind in GUARANTEES]
    assert [row[0].strip("`") for row in rows] == list(NEEDS)

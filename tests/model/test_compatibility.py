"""The one table of what fits what: against masks that are drawn, in the check of a configuration, in the README."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import Refused
from pretrain.model.compatibility import GUARANTEES, NEEDS, fits, table
from pretrain.model.encoder import ENCODERS
from pretrain.model.masking import MaskConfig, MaskName, draw_mask
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


def test_the_table_knows_every_encoder_and_every_mask():
    assert ENCODERS.keys() <= NEEDS.keys() == WORKS.keys()
    assert GUARANTEES.keys() == MASKS.keys()
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

"""Which encoder takes which mask, with which decoder: the one table that checks, tests and the README are made from.

A mask guarantees a structure of the visible tokens, an encoder needs one, and a pair fits where the mask guarantees
what the encoder needs. `python -m pretrain.model.compatibility` prints the table.
"""

import enum


class Structure(enum.IntEnum):
    """How visible tokens lie in the grid; each structure has what those before it have."""

    ANY = 0
    """Anywhere."""
    EQUAL_COUNTS = 1
    """Equally many in each visible slot, and equally many visible slots whatever the key."""
    PRODUCT = 2
    """The same positions in each visible slot: visible slots x visible positions, equally many whatever the key."""


NEEDS = {
    "joint": Structure.ANY,
    "factorised_encoder": Structure.EQUAL_COUNTS,
    "factorised_self_attention": Structure.PRODUCT,
    "factorised_dot_product": Structure.PRODUCT,
    "cross_frame": Structure.EQUAL_COUNTS,
}
"""What each encoder needs."""

GUARANTEES = {
    "random": Structure.ANY,
    "random_per_slot": Structure.EQUAL_COUNTS,
    "tube": Structure.PRODUCT,
    "frame": Structure.PRODUCT,
    "block": Structure.PRODUCT,
    "short block": Structure.ANY,
    "causal": Structure.PRODUCT,
}
"""What each kind of mask guarantees; a short block is a block mask with `mask.block_slots`."""

DECODERS = ("joint", "cross")
"""Attention of the decoders; both decode any part of the masked tokens, from any encoder."""

_IN_WORDS = {
    Structure.ANY: "any",
    Structure.EQUAL_COUNTS: "equal counts",
    Structure.PRODUCT: "product",
}


def fits(encoder: str, kind: str) -> bool:
    """Returns whether an encoder takes a kind of mask."""
    return GUARANTEES[kind] >= NEEDS[encoder]


def table() -> str:
    """Returns encoders x masks as lines of Markdown; a cell names the decoders that the pair works with."""
    cells = [["encoder", "needs", *GUARANTEES], ["---"] * (2 + len(GUARANTEES))]
    cells.append(["", "*guaranteed:*", *(f"*{_IN_WORDS[structure]}*" for structure in GUARANTEES.values())])
    for encoder, needed in NEEDS.items():
        pairs = (", ".join(DECODERS) if fits(encoder, kind) else "-" for kind in GUARANTEES)
        cells.append([f"`{encoder}`", _IN_WORDS[needed], *pairs])
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


if __name__ == "__main__":
    print(table(), end="")

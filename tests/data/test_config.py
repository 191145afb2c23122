"""The configuration of the data path refuses numbers that cannot be, by the name of their field."""

import dataclasses

import pytest

from pretrain.data.config import DataConfig
from pretrain.errors import Refused

CONFIG = DataConfig()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repeats", 0),
        ("global_batch", 0),
        ("micro_batch", -1),
        ("lanes", 0),
        ("workers", -1),
        ("max_bad_share", 1.5),
        ("decode_limit_s", -1.0),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_their_field(field, value):
    CONFIG.validate()
    with pytest.raises(Refused, match=rf"data\.{field}: {value}"):
        dataclasses.replace(CONFIG, **{field: value}).validate()

"""The list of samples that are not attempted: what its lines name, and files that are none."""

import pytest

from pretrain.data.config import DataConfig
from pretrain.data.quarantine import read_quarantine
from pretrain.errors import Refused


def test_a_quarantine_holds_in_the_set_it_names_or_in_all(tmp_path):
    file = tmp_path / "list.jsonl"
    file.write_text('{"key": "a", "set": 1, "reason": "bad"}\n\n{"key": "b"}\n')
    found = read_quarantine(str(file))
    assert [(number, key) in found for number in (0, 1) for key in "abc"] == [False, True, False, True, True, False]


@pytest.mark.parametrize("content", [None, b"a-key", b'{"reason": "bad"}', b'{"key": 3}', b"[]", b"\xff"])
def test_a_file_that_is_no_quarantine_is_refused_in_one_sentence(tmp_path, content):
    file = tmp_path / "list.jsonl"
    if content is not None:
        file.write_bytes(b'{"key": "a"}\n' + content)
    with pytest.raises(
        Refused, match=r"data\.quarantine: (line 2 of )?\S+list\.jsonl .+; give the skipped\.jsonl of a run"
    ):
        DataConfig(quarantine=str(file)).validate()

"""W&B files that a kill cut off are cut back to whole records, and folders that hold nothing are removed."""

import random
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.engine.wandb_files import mend_folders, whole_records
from tests.wandb_server import records_of

HEADER = b":W&B\xbb\xee\x00"[:7]


def written(records: list[bytes]) -> tuple[bytes, list[int]]:
    """A .wandb file as LevelDB's log format has it, and where each of its records ends."""
    content, ends = HEADER, []
    for record in records:
        first = True
        while first or record:
            room = 32768 - len(content) % 32768
            if room < 7:
                content += bytes(room)
                continue
            part, record = record[: room - 7], record[room - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not record]
            content += struct.pack("<IHB", 0, len(part), kind) + part
            first = False
        ends.append(len(content))
    return content, ends


@given(
    sizes=st.lists(st.integers(1, 200) | st.sampled_from([32747, 32754, 32755, 70_000]), min_size=1, max_size=8),
    cut=st.floats(0, 1),
)
def test_whatever_is_cut_off_the_records_before_it_are_kept_and_nothing_of_the_torn_one(sizes, cut):
    content, ends = written([random.Random(size).randbytes(size) for size in sizes])
    torn = content[: round(cut * len(content))]
    whole = [end for end in ends if end <= len(torn)]
    assert whole_records(torn) == (len(whole), whole[-1] if whole else 7)
    assert len(list(records_of(torn))) == len(whole)


@pytest.fixture
def folder(tmp_path) -> Path:
    content, ends = written([b"header", b"run", b"history", b"history"])
    states = {"offline-run-1": content, "run-2": content[: ends[2] + 3], "offline-run-3": HEADER, "run-4": content[:-1]}
    for name, state in states.items():
        for identity in ("mine", "other"):
            path = tmp_path / f"{name}-{identity}" / f"run-{identity}.wandb"
            path.parent.mkdir()
            path.write_bytes(state)
    return tmp_path


def test_only_torn_files_of_the_runs_other_attempts_are_mended(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*.wandb")}
    mend_folders(folder, "mine", own=folder / "run-4-mine")
    after = {path: path.read_bytes() for path in folder.rglob("*.wandb")}
    changed = {path.parent.name for path in before if after.get(path) != before[path]}
    assert changed == {"run-2-mine", "offline-run-3-mine"}
    assert whole_records(after[folder / "run-2-mine" / "run-mine.wandb"]) == (3, 7 + 3 * 7 + 6 + 3 + 7)
    assert not (folder / "offline-run-3-mine").exists()

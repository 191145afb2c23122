"""Traces of a few steps: of those that were asked for, by whichever attempt makes them."""

import json
import logging
import re

import pytest

from launch.cli import main
from pretrain.config import PretrainConfig
from pretrain.data.config import DataConfig
from pretrain.engine.profiling import profiled, steps_to_profile
from pretrain.errors import Refused
from tests.runs import tiny_pretraining


def steps_in(path) -> set[int]:
    """Returns the steps that a trace names."""
    events = json.loads(path.read_text())["traceEvents"]
    named = (re.fullmatch(r"step (\d+)", event.get("name", "")) for event in events)
    return {int(name[1]) for name in named if name}


def test_a_run_writes_a_trace_of_the_very_steps_asked_for(packed_shards, tmp_path):
    out = tmp_path / "run"
    command = ["pretrain", "--config", str(tiny_pretraining(tmp_path, packed_shards)), "--out", str(out)]
    assert main([*command, "--steps", "4", "--profile", "2:3"]) == 0
    (trace,) = (out / "profile").iterdir()
    assert trace.name == "steps-2-3.json"
    assert steps_in(trace) == {2, 3}
    assert "aten::" in trace.read_text()


def test_an_attempt_traces_what_it_makes_of_the_steps_and_says_where_that_is_none(tmp_path, caplog):
    with profiled(range(3, 8), range(2, 6), tmp_path / "middle") as steps:
        assert list(steps) == [3, 4, 5, 6, 7]
    assert steps_in(tmp_path / "middle" / "steps-4-5.json") == {4, 5}
    with caplog.at_level(logging.WARNING, "pretrain"), profiled(range(5, 8), range(2, 6), tmp_path / "past") as steps:
        assert list(steps) == [5, 6, 7]
    assert "profile: steps 2 to 5 are none of this attempt; no trace" in caplog.text
    assert not (tmp_path / "past").exists()


def test_a_run_that_ends_in_the_middle_leaves_a_trace_of_the_steps_so_far(tmp_path):
    def run() -> None:
        with profiled(range(8), range(2, 6), tmp_path / "ended") as steps:
            assert all(step < 3 for step in steps)

    with pytest.raises(AssertionError):
        run()
    assert steps_in(tmp_path / "ended" / "steps-2-4.json") >= {2, 3}


def test_a_trace_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "profile").write_text("in the way")
    with profiled(range(2), range(1, 2), tmp_path / "profile") as steps:
        assert list(steps) == [0, 1]
    assert "steps-1-1.json cannot be written" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("10", "profile: '10' names no steps; give the first and the last, such as 10:12"),
        ("a:b", "names no steps"),
        ("-1:2", "names no steps"),
        ("0:2", "profile: 0:2 names no steps; they count from 1"),
        ("5:4", "the first comes first"),
        ("1:101", "profile: 1:101 are 101 steps; give 100 at most"),
    ],
)
def test_what_names_no_steps_or_too_many_is_refused(wanted, said):
    with pytest.raises(Refused, match=re.escape(said)):
        steps_to_profile(wanted)


def test_steps_that_a_run_never_makes_are_refused():
    config = PretrainConfig(steps=20, profile="15:20", data=DataConfig(shards="shards"))
    assert config.total_steps(5) == 20
    with pytest.raises(Refused, match="profile: 15:21 goes past step 20, the last of the run"):
        PretrainConfig(steps=20, profile="15:21", data=DataConfig(shards="shards")).total_steps(5)

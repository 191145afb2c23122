"""From arguments to a configuration, and from an error to one line of one rank."""

import errno
import os
import socket

import pytest

from finetune.config import FinetuneConfig
from pretrain.commandline import met_by_every_rank, parse, run_command
from pretrain.config import PretrainConfig
from pretrain.errors import BadSample, DiskFull, Refused, StoppedByRule, TubeletError


@pytest.fixture(params=[0, 3])
def rank(request, monkeypatch) -> int:
    monkeypatch.setenv("RANK", str(request.param))
    monkeypatch.setenv("WORLD_SIZE", "4")
    return request.param


def said_of(error: BaseException, capsys) -> tuple[int, str]:
    def command() -> None:
        raise error

    code = run_command(command)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [(Refused("/shards: no such folder"), 2), (TubeletError("torn"), 1), (BadSample("bad"), 1), (DiskFull("full"), 2)],
)
def test_what_a_rank_alone_meets_it_tells_with_its_number_and_host(rank, capsys, error, code):
    speaker = f"rank {rank} on {socket.gethostname()}: " if rank else ""
    assert said_of(error, capsys) == (code, f"tubelet: {speaker}{error}\n")


def test_what_all_ranks_meet_together_rank_0_tells(rank, capsys):
    with pytest.raises(Refused) as caught, met_by_every_rank():
        raise Refused("steps: must be greater than 0")
    assert said_of(caught.value, capsys) == (2, "" if rank else "tubelet: steps: must be greater than 0\n")
    assert said_of(StoppedByRule("too bad"), capsys) == (3, "" if rank else "tubelet: too bad\n")


def test_a_command_line_that_cannot_be_parsed_is_told_by_rank_0(rank, capsys):
    code = run_command(lambda: parse(PretrainConfig, "pretrain", ["--step", "3"]))
    assert code == 2
    assert ("did you mean steps?" in capsys.readouterr().err) == (rank == 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data.packing.grup", "4"], "data.packing.grup: there is no such field; did you mean data.packing.group?"),
        (["--data.packing.zzz", "4"], "data.packing.zzz: there is no such field; its fields are group, tokens, aspect"),
        (["--data.packing.group", "2.5"], "data.packing.group: expected int, got 2.5"),
        (["--data.packing", "4"], "data.packing: holds fields of its own, got 4; see --help"),
        (["--mask", "tube"], "mask: holds fields of its own, got tube; see --help"),
    ],
)
def test_a_wrong_field_of_a_group_that_may_be_null_is_told_by_its_own_name(arguments, said):
    with pytest.raises(Refused) as refused:
        parse(PretrainConfig, "pretrain", arguments)
    assert str(refused.value) == said


def test_a_full_disk_ends_any_command_with_one_line_and_2(capsys):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/out/evaluation.json")
    said = "tubelet: /out/evaluation.json: no space left on the disk; free some and start again\n"
    assert said_of(full, capsys) == (2, said)
    with pytest.raises(PermissionError):
        said_of(PermissionError(errno.EACCES, "Permission denied"), capsys)


@pytest.mark.parametrize("form", [["--steps", "100"], ["--steps=100"]])
@pytest.mark.parametrize(("config", "recipe"), [(PretrainConfig, "videomae_b"), (FinetuneConfig, "ucf101")])
def test_steps_on_the_command_line_replace_the_epochs_of_a_recipe_wherever_they_stand(config, recipe, form):
    stage = "pretrain" if config is PretrainConfig else "finetune"
    for arguments in (["--config", recipe, *form], [*form, "--config", recipe]):
        parsed = parse(config, stage, arguments)
        assert (parsed.steps, parsed.epochs) == (100, None)


def test_each_field_of_a_pair_replaces_the_other_and_a_cleared_one_replaces_nothing():
    recipe = ["--config", "videomae_b"]
    parsed = parse(PretrainConfig, "pretrain", [*recipe, "--data.clip.stride", "4", "--optimizer.warmup-steps", "9"])
    assert (parsed.data.clip.stride, parsed.data.clip.frame_rate) == (4, None)
    assert (parsed.optimizer.warmup_steps, parsed.optimizer.warmup_epochs) == (9, None)
    parsed = parse(PretrainConfig, "pretrain", [*recipe, "--steps", "null"])
    assert (parsed.steps, parsed.epochs) == (None, 1600)
    parsed = parse(PretrainConfig, "pretrain", [*recipe, "--steps", "5", "--epochs", "2", "--data.shards", "shards"])
    with pytest.raises(Refused, match="steps, epochs: give exactly one of them"):
        parsed.validate_run()


@pytest.mark.parametrize("config", [PretrainConfig, FinetuneConfig])
def test_the_rank_that_deepspeeds_launcher_appends_is_passed_over(config):
    stage = "pretrain" if config is PretrainConfig else "finetune"
    assert parse(config, stage, ["--local_rank=1", "--steps", "7"]).steps == 7


def test_no_arguments_at_all_are_the_defaults():
    assert parse(PretrainConfig, "pretrain", []) == PretrainConfig()

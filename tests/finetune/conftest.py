"""A tiny pretrained encoder and a tiny classifier made from it, once for all tests of finetuning."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import TINY, tiny_pretraining

AUGMENTED = "augment: {rand_augment: rand-m7-n4-mstd0.5-inc1, erasing: 0.25}"
TINY_FINETUNING = """
steps: 6
drop_path: 0.2
mixing: {mixup: 0.8, cutmix: 1.0}
checkpoint: {every: 3}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests that share the runs below on one worker, which then makes them once."""
    for item in items:
        if item.path.parent == Path(__file__).parent and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group("finetuning"))


@pytest.fixture(scope="session")
def pretrained(packed_shards, tmp_path_factory) -> Path:
    from launch.cli import main

    out = tmp_path_factory.mktemp("pretrained") / "run"
    recipe = tiny_pretraining(out.parent, packed_shards)
    assert main(["pretrain", "--config", str(recipe), "--out", str(out), "--steps", "4"]) == 0
    return out


@pytest.fixture(scope="session")
def finetuning(packed_shards, pretrained, tmp_path_factory) -> list[str]:
    """The command line of a finetuning run, without --out."""
    recipe = tmp_path_factory.mktemp("finetuning") / "tiny.yaml"
    data = f"data:\n  shards: {packed_shards}\n  {AUGMENTED}"
    recipe.write_text(TINY.replace("data:", data) + TINY_FINETUNING)
    held_out = ["--validation.shards", str(packed_shards), "--validation.every", "3"]
    return ["finetune", "--config", str(recipe), "--encoder", str(pretrained), *held_out]


@pytest.fixture(scope="session")
def finetuned(finetuning, tmp_path_factory) -> Path:
    from launch.cli import main

    out = tmp_path_factory.mktemp("finetuned") / "run"
    assert main([*finetuning, "--out", str(out)]) == 0
    return out


@pytest.fixture
def refused(finetuning, tmp_path, capsys) -> Callable[[list[str]], str]:
    """Returns the one line that a finetuning run of a tiny encoder with further options is refused in."""
    from launch.cli import main

    def line(options: list[str]) -> str:
        capsys.readouterr()
        given = ["--architecture", "{width: 32, depth: 1, heads: 2, tubelet: [2, 8, 8]}"]
        assert main([*finetuning, *given, "--out", str(tmp_path / "run"), *options]) == 2
        assert not (tmp_path / "run").exists()
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    return line

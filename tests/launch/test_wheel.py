"""The wheel holds all that an installed Tubelet reads: the packages, the recipes, the page's template, the command."""

import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_wheel_carries_recipes_template_and_command(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path))
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
        commands = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    files = [
        path.relative_to(ROOT)
        for folder in ("pretrain", "finetune", "launch")
        for path in (ROOT / folder).rglob("*.py")
    ]
    recipes = [Path("pretrain", path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.*")]
    assert len(recipes) > 10
    assert {str(path) for path in [*files, *recipes, Path("pretrain/report.html.jinja")]} <= names
    assert "tubelet = launch.cli:main" in commands[0]

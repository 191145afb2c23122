"""The wheel holds all that an installed Tubelet reads and asks for all that it imports."""

import ast
import importlib.metadata
import re
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pretrain", "finetune", "launch")
MODULES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (built,) = builder.build(directory=str(tmp_path_factory.mktemp("wheel")))
    return zipfile.ZipFile(built)


def read(wheel: zipfile.ZipFile, ending: str) -> str:
    (name,) = (name for name in wheel.namelist() if name.endswith(ending))
    return wheel.read(name).decode()


def test_a_wheel_carries_recipes_batch_scripts_template_and_command(wheel):
    recipes = [Path("pretrain", path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.*")]
    assert len(recipes) > 10
    scripts = [Path("launch/batch", path.name) for path in (ROOT / "slurm").iterdir()]
    assert len(scripts) > 4
    modules = [path.relative_to(ROOT) for path in MODULES]
    assert {str(path) for path in [*modules, *recipes, *scripts, Path("pretrain/report.html.jinja")]} <= set(
        wheel.namelist()
    )
    assert "tubelet = launch.cli:main" in read(wheel, "entry_points.txt")


def test_a_wheel_asks_for_every_distribution_that_it_imports(wheel):
    """Those of an extra are imported by what asks for the extra where they are missing."""
    needed = r"^Requires-Dist: ([\w-]+)(?!.*extra == ['\"]dev)"
    asked = {name.lower() for name in re.findall(needed, read(wheel, "METADATA"), re.M)}
    providers = importlib.metadata.packages_distributions()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for package in {name.split(".")[0] for name in names} - {*PACKAGES, *sys.stdlib_module_names, "_typeshed"}:
                assert asked & {name.lower() for name in providers[package]}, f"{path} imports {package}"

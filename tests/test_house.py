"""The house rules of the repository: which room may import which, what lies at the top, and what no file may hold."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pretrain", "finetune", "launch")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "Makefile", *PACKAGES, "configs", "slurm", "tests"}

# The rooms, innermost first, with what each may import of the house besides itself.
FREE_FOR_ALL = ("pretrain.errors", "pretrain.files")
MAY_IMPORT = {
    "pretrain.errors": (),
    "pretrain.files": (),
    "pretrain.data": FREE_FOR_ALL,
    "pretrain.model": FREE_FOR_ALL,
    "pretrain.engine": FREE_FOR_ALL,
    "pretrain": ("pretrain",),
    "finetune": ("pretrain",),
    "launch": ("pretrain", "finetune"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_of(name: str) -> str:
    return next(room for room in MAY_IMPORT if is_inside(name, room))


def imported_by(path: Path) -> Iterator[str]:
    """Yields each absolute name that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room they reach into"
            # `from pretrain import data` reaches the room `data`, `from pretrain.errors import Refused` no further.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names_of_files() -> list[str]:
    """Names of all files that are committed or would be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


@pytest.mark.parametrize("path", MODULES, ids=[module_name(path) for path in MODULES])
def test_a_room_imports_only_what_it_may(path):
    room = room_of(module_name(path))
    for name in imported_by(path):
        assert not is_inside(name, "tests"), f"{path} imports the tests"
        if name.split(".")[0] in PACKAGES and not is_inside(name, room):
            assert any(is_inside(name, allowed) for allowed in MAY_IMPORT[room]), f"{room} may not import {name}"


def test_the_arrows_are_read_from_the_files():
    """The test above would pass on files that it cannot read."""
    assert {room_of(module_name(path)) for path in MODULES} == set(MAY_IMPORT)
    seen = set(imported_by(ROOT / "pretrain/data/loader.py"))
    assert {"pretrain.data.balanced.SampleOrder", "pretrain.errors.TubeletError", "torch"} <= seen
    assert room_of("pretrain.data.order.Order") == "pretrain.data"
    assert room_of("pretrain.data") == "pretrain.data"
    assert room_of("pretrain.config.RunConfig") == "pretrain"


def test_the_tests_that_the_readme_names_as_proofs_are_there():
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", (ROOT / "README.md").read_text())
    assert len(named) > 10
    for name, function in named:
        (path,) = (ROOT / "tests").rglob(name)
        assert f"def {function}(" in path.read_text() or not function, f"{name}::{function}"


def test_the_model_touches_no_files_and_no_processes():
    forbidden = {"os", "pathlib", "subprocess", "multiprocessing", "threading", "shutil", "socket", "tempfile"}
    for path in (ROOT / "pretrain/model").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported_by(path)}
        assert not roots & forbidden, f"{path} imports {roots & forbidden}"


def modules_after(statement: str) -> set[str]:
    """Names of the modules that a fresh process holds after a statement."""
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


SLOW = ("timm", "torchvision", "deepspeed", "accelerate", "transformers", "torchmetrics", "wandb", "decord")


def test_the_model_is_imported_without_data_engine_or_slow_libraries():
    names = [module_name(path) for path in (ROOT / "pretrain/model").rglob("*.py")]
    loaded = modules_after(f"import {', '.join(names)}")
    assert set(names) <= loaded
    unwanted = ("pretrain.data", "pretrain.engine", "finetune", "launch", *SLOW)
    assert not {name for name in loaded if any(is_inside(name, room) for room in unwanted)}


def test_a_configuration_is_read_without_slow_libraries_and_a_loader_worker_starts_without_them():
    """What each loader worker imports of the program that uses it is `__main__`."""
    loaded = modules_after("import pretrain.commandline, pretrain.data.loader, finetune.config, launch.launching")
    assert {"finetune.config", "pretrain.config", "torch"} <= loaded
    assert not {name for name in loaded if any(is_inside(name, library) for library in SLOW)}
    assert not {"torch", "pretrain.config"} & modules_after("import pretrain.__main__, finetune.__main__, launch.cli")


def test_worker_processes_on_videos_start_without_torch():
    loaded = modules_after("import pretrain.data.pack_worker")
    assert "av" in loaded
    assert not {"torch", "webdataset", "decord"} & loaded
    loaded = modules_after("import pretrain.data.check_worker, pretrain.data.index_worker, pretrain.data.contact_sheet")
    assert not {"torch", "webdataset", "decord"} & loaded


def test_the_top_level_holds_only_what_the_design_names():
    top = {name.split("/")[0] for name in names_of_files()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_pretrain_itself_imports_nothing():
    assert (ROOT / "pretrain/__init__.py").read_text() == ""


def test_no_file_names_a_developers_machine_or_the_tool_that_wrote_it():
    # In pieces, or this file would name them.
    places = [r"(?<![\w.:/])/" + folder + "/" for folder in ("work", "root", "tmp/dev" + "venv")]
    places += [r"/home/" + r"(?!user|you|me)\w+/", r"/Users/" + r"\w+/"]
    tools = [
        "co-authored" + "-by:",
        r"(generated|written|made) (with|by|using) " + r"(an? )?(ai|llm|claude|chatgpt|copilot|cursor|gemini)\b",
    ]
    pattern = re.compile("|".join(places + tools), re.IGNORECASE)
    names = names_of_files()
    assert "pyproject.toml" in names
    found = {}
    for name in names:
        match = pattern.search((ROOT / name).read_bytes().decode(errors="ignore"))
        if match:
            found[name] = match.group()
    assert not found


def public_without_docstring(tree: ast.Module) -> Iterator[str]:
    """Yields public functions and classes of a module, and public methods of public classes, that say nothing."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield node.name
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{name}" for name in public_without_docstring(node))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", MODULES, ids=[module_name(path) for path in MODULES])
def test_what_is_public_says_what_it_is_for(path):
    tree = ast.parse(path.read_text())
    assert not list(public_without_docstring(tree))
    assert ast.get_docstring(tree) is not None or not tree.body, "a file opens with what it is"


def test_a_missing_docstring_is_found():
    source = 'class A:\n    """A."""\n    def b(self): ...\n    def _c(self): ...\ndef d(): ...\n'
    assert list(public_without_docstring(ast.parse(source))) == ["A.b", "d"]

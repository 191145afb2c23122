"""Where torchcodec cannot work, the user is told what to do; its frames are tested in `test_decoders.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import own_environment, tiny_pretraining

ROOT = Path(__file__).parents[2]
FFMPEG_VERSIONS = range(54, 66)  # of all its libraries, in FFmpeg 4 to 9


def test_a_run_with_torchcodec_that_is_not_installed_is_refused_in_one_line(packed_shards, tmp_path):
    """By the decode child, which finds its modules where its user does."""
    (tmp_path / "modules" / "torchcodec").mkdir(parents=True)
    (tmp_path / "modules" / "torchcodec" / "__init__.py").write_text("raise ImportError('no torchcodec')")
    recipe = tiny_pretraining(tmp_path, packed_shards)
    options = ["--config", recipe, "--out", tmp_path / "run", "--steps", 4, "--data.decoder", "torchcodec"]
    environment = own_environment() | {"PYTHONPATH": f"{tmp_path / 'modules'}:{ROOT}"}
    command = [sys.executable, "-m", "pretrain", *map(str, options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = done.stderr
    assert done.returncode == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("tubelet: ")]
    assert line.startswith("tubelet: data.decoder: torchcodec cannot be imported (no torchcodec); pip install ")
    assert line.endswith(", or take pyav")
    assert "Traceback" not in said


def test_torchcodec_is_imported_before_the_time_of_the_first_decode_counts():
    program = """if True:
        import contextlib, sys
        from pretrain.data.video import load_decoder
        from pretrain.errors import Refused
        with contextlib.suppress(Refused):
            load_decoder("torchcodec")
        print("torchcodec" in sys.modules)"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=own_environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.fixture
def broken_ffmpeg(tmp_path) -> Path:
    """A folder of libraries that the linker finds first, and cannot load, whichever FFmpeg the machine has."""
    for name in ("avutil", "avcodec", "avformat", "avdevice", "avfilter", "swscale", "swresample"):
        for version in (*range(3, 12), *FFMPEG_VERSIONS):
            (tmp_path / f"lib{name}.so.{version}").touch()
    return tmp_path


def test_torchcodec_without_ffmpeg_is_refused_with_the_remedy(broken_ffmpeg):
    program = (
        "from pretrain.data.video import open_video; from pretrain.errors import Refused\n"
        "try: open_video(b'', 'torchcodec')\n"
        "except Refused as error: print(error)"
    )
    environment = own_environment() | {"LD_LIBRARY_PATH": str(broken_ffmpeg)}
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.startswith("data.decoder: torchcodec does not find the libraries of FFmpeg")
    assert "or take pyav" in said

"""Where torchcodec cannot work, the user is told what to do; its frames are tested in `test_decoders.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from pretrain.data.torchcodec_reader import _decoders
from tests.runs import own_environment, tiny_pretraining

ROOT = Path(__file__).parents[2]
FFMPEG_VERSIONS = range(54, 66)  # of all its libraries, in FFmpeg 4 to 9


def test_a_run_with_torchcodec_that_is_not_installed_is_refused(packed_shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    _decoders.cache_clear()
    recipe = tiny_pretraining(tmp_path, packed_shards)
    out = ["--out", str(tmp_path / "run"), "--steps", "4"]
    assert main(["pretrain", "--config", str(recipe), *out, "--data.decoder", "torchcodec"]) == 2
    said = capsys.readouterr().err
    assert "data.decoder: torchcodec cannot be imported" in said
    assert "pip install 'tubelet[torchcodec]'" in said
    assert "Traceback" not in said


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

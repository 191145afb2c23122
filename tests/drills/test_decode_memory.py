"""What a decode child holds: nothing of the files before, and nothing that decoding does not need."""

import subprocess
import sys

import numpy as np
import pytest

from pretrain.data.shards import ShardSet
from tests.runs import own_environment

LEAK = """
import os, sys
import numpy as np, psutil
from pretrain.data.decode_client import open_video_apart
from pretrain.errors import BadSample

video, broken = open(sys.argv[1], "rb").read(), open(sys.argv[2], "rb").read()
limit_s = float(sys.argv[3])
me = psutil.Process()
grown, first = 0, None
for number in range(300):
    bad = number % 5 == 4
    try:
        open_video_apart(broken if bad else video, "decord", limit_s).read(np.arange(2))
        assert not bad
    except BadSample:
        assert bad
    if number >= 10 and number % 5 == 0:
        resident = sum(one.memory_info().rss for one in [me, *me.children()])
        first = first or resident
        grown = max(grown, resident - first)
print(grown)
"""


def test_memory_stays_flat_over_broken_files_that_decord_keeps(packed_shards, tmp_path):
    good = ShardSet.open(packed_shards).read(0).video
    (tmp_path / "good.mp4").write_bytes(good)
    (tmp_path / "broken.mp4").write_bytes(good[:200] + np.random.default_rng(0).bytes(3 * 2**20))
    grown = []
    for limit_s in (0, 60):
        files = [str(tmp_path / name) for name in ("good.mp4", "broken.mp4")]
        command = [sys.executable, "-c", LEAK, *files, str(limit_s)]
        done = subprocess.run(command, env=own_environment(), capture_output=True, text=True, check=True)
        grown.append(int(done.stdout))
    same_process, apart = grown
    assert same_process > 60 * 2**20, "60 files of 3 MiB"
    assert apart < same_process / 2, grown


@pytest.mark.parametrize(("decoder", "imported", "other"), [("auto", "av", "decord"), ("decord", "decord", "av")])
def test_a_child_imports_only_what_decoding_needs(decoder, imported, other):
    program = f"import sys, pretrain.data.decode_child as child; child.load_decoder('{decoder}'); print(*sys.modules)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=own_environment(), capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert imported in loaded
    assert not {other, "torch", "torchvision", "nvidia"} & loaded

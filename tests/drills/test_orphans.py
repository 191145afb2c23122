"""Nothing of a killed trainer stays behind."""

import signal
import subprocess
import sys

import psutil

from tests.runs import ROOT

TRAINER = """
import sys, time
from pretrain.data.clips import ClipConfig
from pretrain.data.config import DataConfig
from pretrain.data.loader import MicroBatches, training_batches
from pretrain.data.training_clips import TrainingClips
from pretrain.data.order import Order
from pretrain.data.shards import ShardSet

if __name__ == "__main__":
    shards = ShardSet.open(sys.argv[1])
    clip = ClipConfig(frames=2, stride=1, size=16, crop="center")
    clips = TrainingClips(shards, DataConfig(clip=clip, global_batch=2, micro_batch=2, lanes=1, workers=2), seed=0)
    order = Order(shards.samples_per_shard, 0, 1, 1, 2)
    batches = iter(training_batches(clips, MicroBatches(order, range(1000), 2, 1, 0)))
    next(batches)
    print("reading", flush=True)
    time.sleep(1000)
"""


def test_loader_workers_end_when_their_trainer_is_killed(packed_shards, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    command = [sys.executable, str(script), str(getattr(packed_shards, "folder", packed_shards))]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=None)
    assert trainer.stdout.readline() == "reading\n"
    workers = psutil.Process(trainer.pid).children(recursive=True)
    assert len(workers) >= 3, "a fork server and two workers"
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive

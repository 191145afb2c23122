"""Two processes, of which one waits longer for its data and holds more memory: the record tells of both as it says."""

import subprocess
import sys

from pretrain.engine.tracking import read_metrics
from tests.runs import free_port, own_environment

RANK = """
import sys, time
from pathlib import Path
import torch
from pretrain.engine.distributed import Processes
from pretrain.engine.step_figures import memory_gib
from tests.engine.test_trainer import batches, trainer_of

def slowly(rank):
    for batch in batches([]):
        time.sleep(0.2 + 0.6 * rank)
        yield batch

with Processes() as processes:
    rank = processes.rank
    ballast = torch.ones(rank * 1000 * 2**18)  # 1000 MiB of rank 1, far more than what rank 0 alone does takes
    Path(f"rank-{rank}").mkdir()
    loss = lambda model, batch: rank + 1 + 0 * model(batch.clips).sum()
    trainer_of(Path(f"rank-{rank}"), processes, loss, checkpoint_every=0).train(slowly(rank), "test")
    Path(f"memory-{rank}").write_text(str(memory_gib(processes.device)))
"""


def test_the_record_holds_the_mean_over_ranks_and_the_worst_rank_where_that_one_matters(tmp_path):
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            cwd=tmp_path,
            env=own_environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    less, more = (float((tmp_path / f"memory-{rank}").read_text()) for rank in (0, 1))
    entries = read_metrics(tmp_path / "rank-0" / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2], "without a checkpoint the last step is not waited for"
    for entry in entries:
        assert entry["loss"] == 1.5
        assert entry["data_wait_max_s"] >= 0.8
        assert 0.5 <= entry["data_wait_s"] <= entry["data_wait_max_s"] - 0.2
        assert less + 0.5 < entry["memory_gib"] <= more

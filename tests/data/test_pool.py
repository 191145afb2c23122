"""What the packer's workers leave behind when packing stops halfway."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

STOPS_WHILE_RESULTS_ARE_SENT = """
import time
from pretrain.data.pool import WorkerPool
def large(number):
    return bytes(60_000_000)
if __name__ == "__main__":
    for attempt in range(8):
        try:
            with WorkerPool(large, 1) as pool:
                for _ in pool.map(range(6)):
                    time.sleep(0.004 * attempt)
                    raise KeyError
        except KeyError:
            print("ended")
"""


def test_a_pool_ends_though_a_worker_dies_halfway_through_sending_a_result(tmp_path):
    script = tmp_path / "stops.py"
    script.write_text(STOPS_WHILE_RESULTS_ARE_SENT)
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("ended") == 8

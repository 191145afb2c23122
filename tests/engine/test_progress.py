"""Progress and log lines, as a file and as a terminal see them."""

import os
import pty
import re
import subprocess
import sys
import textwrap
from collections import deque
from pathlib import Path

import pytest

from pretrain.engine.progress import duration, remaining_s

REPOSITORY = Path(__file__).parents[2]
TRAINING = """
    import logging, sys, time
    from pretrain.engine.progress import Progress, set_up_logging
    main = "rank1" not in sys.argv
    set_up_logging("INFO", main)
    with Progress(50, 10, "pretrain", main, 20) as progress:
        for step in range(11, 51):
            time.sleep(0.005)
            progress.update(step, 1 / step, 31.24)
            if step == 25:
                logging.getLogger("pretrain.engine.trainer").info("checkpoint [25] written")
                logging.getLogger("somebody.else").info("chatter")
    logging.getLogger("pretrain.engine.trainer").warning("trained")
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "100"}


def run_to_files(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(TRAINING), *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=True)


def run_on_terminal() -> tuple[str, str]:
    """Returns standard output, and what a terminal on standard error was sent."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", textwrap.dedent(TRAINING)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while content := os.read(ours, 65536):
            shown += content
    except OSError:  # how Linux says that the other end of a terminal is closed
        pass
    os.close(ours)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0
    return output, shown.decode()


def test_a_file_gets_plain_lines_every_few_steps_and_at_the_last_one():
    done = run_to_files()
    assert done.stdout == ""
    lines = [re.fullmatch(r"\d\d:\d\d:\d\d (\S+)  (.*)", line).groups() for line in done.stderr.splitlines()]
    assert [text for name, text in lines if name == "pretrain.engine.trainer"] == [
        "checkpoint [25] written",
        "WARNING: trained",
    ]
    progress = [text for name, text in lines if name == "pretrain.engine.progress"]
    assert [re.sub(r"\S+ left", "? left", text) for text in progress] == [
        "step 20/50  loss 0.0500  31.2 clips/s  ? left",
        "step 40/50  loss 0.0250  31.2 clips/s  ? left",
        "step 50/50  loss 0.0200  31.2 clips/s  ? left",
    ]
    assert progress[-1].endswith("0s left")


def test_other_ranks_show_warnings_only():
    lines = run_to_files("rank1").stderr.splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == ["WARNING: trained"]


def test_a_terminal_gets_a_bar_and_log_lines_that_stand_on_lines_of_their_own():
    output, shown = run_on_terminal()
    assert output == ""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "━" in plain
    assert re.search(r"50/50  loss 0\.0200  31\.2 clips/s  0s left", plain)
    assert "step 20/50" not in plain
    rows = [row.strip() for row in re.split(r"[\r\n]+", plain)]
    assert [row for row in rows if "checkpoint" in row] == [
        row for row in rows if row.endswith("checkpoint [25] written")
    ]
    assert sum("checkpoint [25] written" in row for row in rows) == 1
    assert not any("━" in row and "checkpoint" in row for row in rows)


def test_the_time_left_follows_the_pace_since_the_oldest_update_remembered():
    timeline = deque([(100.0, 10), (101.0, 11), (110.0, 30)])
    assert remaining_s(timeline, 50) == pytest.approx(10.0)
    assert remaining_s(deque([(100.0, 10)]), 50) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0, "0s"), (45.4, "45s"), (59.6, "1m00s"), (130, "2m10s"), (11100, "3h05m"), (187300, "2d04h")],
)
def test_durations_read_in_their_two_largest_units(seconds, text):
    assert duration(seconds) == text

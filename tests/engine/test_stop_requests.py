"""What a run makes of signals and of the time, without the run."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from pretrain.engine.preemption import (
    END_MARGIN_S,
    JOB_END,
    TIME_LIMIT,
    Cause,
    StoppingConfig,
    StopRequests,
    first_cause,
    job_end,
)
from pretrain.engine.signals import STOP_SIGNALS
from pretrain.errors import Refused


def test_a_job_is_left_two_minutes_before_its_end_and_a_short_one_in_its_last_tenth():
    assert job_end({"SLURM_JOB_END_TIME": "100000"}, now_s=1000) == 100000 - END_MARGIN_S
    assert job_end({"SLURM_JOB_END_TIME": "1060"}, now_s=1000) == 1054
    assert job_end({"SLURM_JOB_END_TIME": "Unknown"}, now_s=1000) is None
    assert job_end({}, now_s=1000) is None
    at_its_end = StopRequests(environment={"SLURM_JOB_END_TIME": str(int(time.time()))})
    assert (at_its_end.code, StopRequests(environment={}).code) == (JOB_END, 0)


def test_all_ranks_find_the_same_cause_whichever_of_them_met_something():
    assert first_cause(torch.zeros(4)) is None
    assert first_cause(torch.tensor([0.0, 0.0, TIME_LIMIT, signal.SIGTERM])) == Cause(TIME_LIMIT, 2)
    assert str(first_cause(torch.tensor([0.0, signal.SIGUSR2]))) == "SIGUSR2 (rank 1)"


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """What a shell starts in the background is deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_once_however_often_it_is_heard_and_the_handlers_come_back(number):
    before = [signal.getsignal(one) for one in STOP_SIGNALS]
    with StopRequests(environment={}) as stop:
        for _ in range(3):  # from the process group, from the launcher, from srun
            os.kill(os.getpid(), number)
        deadline = time.monotonic() + 10
        while not stop.code and time.monotonic() < deadline:
            time.sleep(0.001)
        assert stop.code == number
    assert [signal.getsignal(one) for one in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert "signals" not in [thread.name for thread in threading.enumerate()]


def test_limits_of_time_that_cannot_be_are_refused_by_name():
    StoppingConfig().validate()
    StoppingConfig(time_limit_s=1.5, hang_limit_s=0).validate()
    with pytest.raises(Refused, match=r"stopping\.time_limit_s: 0 must be greater than 0; drop it for no limit"):
        StoppingConfig(time_limit_s=0).validate()
    with pytest.raises(Refused, match=r"stopping\.hang_limit_s: -1 must not be negative; 0 sets no limit"):
        StoppingConfig(hang_limit_s=-1).validate()

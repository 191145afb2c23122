"""Decoders that hang, crash, leak or are left behind cost a sample at most: never the run, the order or the memory."""

import array
import concurrent.futures
import dataclasses
import fcntl
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

import numpy as np
import psutil
import pytest

from pretrain.data import decode_client
from pretrain.data.clips import ClipConfig
from pretrain.data.config import DataConfig
from pretrain.data.decode_child import Decoder, SharedBuffer
from pretrain.data.decode_client import client_of_thread, open_video_apart
from pretrain.data.loader import MicroBatches, training_batches
from pretrain.data.order import Order
from pretrain.data.shards import ShardSet
from pretrain.data.training_clips import Request, TrainingClips
from pretrain.data.transcode import transcode
from pretrain.data.video import open_video
from pretrain.data.views import EvaluationViews
from pretrain.errors import BadSample, Refused, TubeletError
from tests.runs import own_environment
from tests.videos import make_video

LIMIT_S = 1.0
CLIP = ClipConfig(frames=2, stride=1, size=16, crop="center")
CONFIG = DataConfig(clip=CLIP, global_batch=2, micro_batch=2, lanes=1, workers=0, decode_limit_s=LIMIT_S)


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> bytes:
    """A packed video that takes a while to decode whole."""
    source = make_video(tmp_path_factory.mktemp("video") / "video.mp4", frames=300, height=256, width=340)
    return transcode(source).video


def decode_children(process: int, recursive: bool = False) -> list[psutil.Process]:
    """The decode children of a process, and of its loader workers if asked for."""
    found = []
    for one in psutil.Process(process).children(recursive):
        try:
            found += [one] * ("pretrain.data.decode_child" in one.cmdline())
        except psutil.NoSuchProcess:
            continue
    return found


def own_child(video: bytes) -> psutil.Process:
    """The decode child of this process, ready to decode."""
    open_video_apart(video).read(np.arange(2))
    (child,) = decode_children(os.getpid())
    return child


def child_in_use(workers: int) -> psutil.Process:
    """The decode child of the only loader worker, or of this process where there is no worker."""
    (child,) = (one for one in decode_children(os.getpid(), True) if (one.ppid() != os.getpid()) == bool(workers))
    return child


def test_frames_are_those_of_the_same_process_and_lie_in_shared_memory(video):
    indices = np.array([3, 4, 4, 200])
    for decoder in ("decord", "pyav"):
        reader = open_video_apart(video, decoder)
        frames = reader.read(indices)
        assert np.array_equal(frames, open_video(video, decoder).read(indices))
        assert len(reader) == 300
        assert len(open_video_apart(video[:5000] + video[5000:], decoder)) == 300
        assert np.array_equal(reader.read(indices[1:]), open_video(video, decoder).read(indices[1:])), "opened again"
        assert not frames.flags.owndata


def test_clips_and_views_are_copies_of_what_lies_in_shared_memory(packed_shards):
    """Nothing need be cropped or resized of a clip of whole frames: it might change with the next video."""
    shards = ShardSet.open(packed_shards)
    whole = dataclasses.replace(CLIP, size=48)
    square = dataclasses.replace(CONFIG, clip=whole)
    cutters = TrainingClips(shards, square, 0), EvaluationViews(shards, whole, decode_limit_s=LIMIT_S)
    for cutter, items in zip(cutters, ((Request(0, 0, 0), Request(1, 0, 1)), ((0, True), (1, True))), strict=True):
        first = cutter[items[0]].clips
        before = [clip.clone() for clip in first]
        cutter[items[1]]
        assert all(clip.equal(copied) for clip, copied in zip(first, before, strict=True))


def test_the_shared_memory_grows_with_the_frames_and_ends_at_a_bound(video):
    every = open_video_apart(video).read(np.arange(300))
    assert every.nbytes == 300 * 256 * 340 * 3
    assert np.array_equal(open_video_apart(video).read(np.arange(2)), every[:2].copy())
    too_many = np.repeat(np.arange(300), 60)
    with pytest.raises(BadSample, match=r"its frames and its file take 4\.4 GiB, more than 4 GiB"):
        open_video_apart(video).read(too_many)
    assert len(open_video_apart(video)) == 300


def test_a_decoder_that_hangs_is_killed_and_replaced(video):
    child = own_child(video)
    child.suspend()
    started = time.monotonic()
    with pytest.raises(BadSample, match="took longer than the 1 s that decode_limit_s allows"):
        open_video_apart(video, limit_s=LIMIT_S).read(np.arange(2))
    assert LIMIT_S <= time.monotonic() - started < LIMIT_S + 5
    assert not child.is_running()
    assert own_child(video) != child


def test_a_decoder_that_crashes_names_its_signal_and_is_replaced(video):
    child = own_child(video)
    child.suspend()
    while child.status() != psutil.STATUS_STOPPED:
        time.sleep(0.001)
    requests = client_of_thread()._requests

    def crash() -> None:
        waiting = array.array("i", [0])
        while not waiting[0]:  # bytes of a request that nobody has read
            fcntl.ioctl(requests, termios.FIONREAD, waiting)
        child.send_signal(signal.SIGSEGV)
        child.resume()

    crashing = threading.Thread(target=crash)
    crashing.start()
    with pytest.raises(BadSample, match="its decoder was ended by SIGSEGV"):
        open_video_apart(video).read(np.arange(300))
    crashing.join()
    assert own_child(video) != child


def test_a_child_that_dies_between_two_videos_costs_neither(video):
    child = own_child(video)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert open_video_apart(video).read(np.arange(2)).shape == (2, 256, 340, 3)


def interrupted(reader, is_there) -> None:
    """Reads, and is interrupted as by Ctrl-C where `is_there` holds of a frame of the client and an event in it."""

    def trace(frame, event, argument):
        if frame.f_code.co_filename != decode_client.__file__:
            return None
        if is_there(frame, event):
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            reader.read(np.arange(2))
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    "is_there",
    [
        lambda frame, event: frame.f_code.co_name == "_send" and "request" in frame.f_locals,
        lambda frame, event: (frame.f_code.co_name, event) == ("_send", "return"),
    ],
    ids=["before the request", "before the answer"],
)
def test_an_interruption_gives_no_video_the_frames_of_another(video, packed_shards, is_there):
    small = ShardSet.open(packed_shards).read(0).video
    expected = {one: open_video(one).read(np.arange(2)) for one in (video, small)}
    open_video_apart(small).read(np.arange(2))
    reader = open_video_apart(video)
    interrupted(reader, is_there)
    assert np.array_equal(reader.read(np.arange(2)), expected[video])
    assert np.array_equal(open_video_apart(small).read(np.arange(2)), expected[small])


def test_time_in_which_all_is_suspended_does_not_count(video, tmp_path):
    """As Ctrl-Z does, and a scheduler that lets two jobs take turns."""
    (tmp_path / "video.mp4").write_bytes(video)
    program = READER.replace("time.sleep(1000)", "sys.stdin.readline()\nprint(next_video().read(np.arange(2)).shape)")
    reader = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "video.mp4")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=own_environment(),
    )
    assert reader.stdout.readline() == b"read\n"
    (child,) = decode_children(reader.pid)
    child.suspend()
    reader.stdin.write(b"\n")
    reader.stdin.flush()
    time.sleep(0.3)
    reader.send_signal(signal.SIGSTOP)
    time.sleep(1.2 * LIMIT_S)
    reader.send_signal(signal.SIGCONT)
    time.sleep(0.1)
    child.resume()
    assert reader.communicate(timeout=20)[0] == b"(2, 256, 340, 3)\n"


def test_files_of_the_current_folder_are_not_taken_for_modules(video, tmp_path, monkeypatch):
    for name in ("json", "random", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is no module of Python')")
    monkeypatch.chdir(tmp_path)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        assert thread.submit(lambda: open_video_apart(video).read(np.arange(2)).shape).result() == (2, 256, 340, 3)


@pytest.mark.parametrize("left", [0, 1])
def test_a_child_that_cannot_be_started_is_told_in_one_line_and_leaves_nothing_open(video, left):
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = decode_client.DecodeClient()
    before = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + left, hard))
    try:
        with pytest.raises(TubeletError, match=r"no process that decodes can be started \(Too many open files\)"):
            client.ask(open_video_apart(video), np.arange(2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_memory_of_a_large_file_is_given_back(video):
    box = struct.pack(">I4s", 80 * 2**20, b"free").ljust(80 * 2**20, b"x")
    frames = open_video_apart(video + box).read(np.arange(2)).copy()
    assert np.array_equal(open_video_apart(video).read(np.arange(2)), frames)
    held_bytes = os.fstat(client_of_thread().buffer.descriptor).st_blocks * 512
    assert held_bytes <= decode_client.KEPT_BYTES


LIMITED = """
import resource, sys
import numpy as np, psutil
from pretrain.data.decode_client import open_video_apart
from pretrain.errors import TubeletError

reader = open_video_apart(open(sys.argv[1], "rb").read())
reader.read(np.arange(1))
resource.prlimit(psutil.Process().children()[0].pid, resource.RLIMIT_FSIZE, (2**24, 2**24))
try:
    reader.read(np.arange(300))
except TubeletError as error:
    print(type(error).__name__, error)
"""


def test_a_child_that_is_given_too_little_memory_to_share_says_so_and_blames_no_video(video, tmp_path):
    (tmp_path / "video.mp4").write_bytes(video)
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "video.mp4")]
    done = subprocess.run(command, env=own_environment(), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("TubeletError data.decode_limit_s: no 93 MiB of memory to share"), done.stdout


@pytest.mark.parametrize("kind", [ValueError, BadSample, Refused, TubeletError])
def test_an_answer_fits_into_what_a_pipe_never_splits(video, monkeypatch, kind):
    def cannot(*_: object) -> None:
        raise kind("\U0001f600" * 2000)

    monkeypatch.setattr("pretrain.data.decode_child.open_video", cannot)
    buffer = SharedBuffer(os.memfd_create("test"))
    answer = Decoder(buffer).answer({"indices": None, "video_bytes": 3, "decoder": "auto"})
    assert len(json.dumps(answer).encode()) < select.PIPE_BUF
    os.close(buffer.descriptor)


def test_a_limit_of_nothing_decodes_in_this_process(video):
    before = decode_children(os.getpid())
    for limit_s in (None, 0):
        assert open_video_apart(video, limit_s=limit_s).read(np.arange(2)).flags.owndata
    assert decode_children(os.getpid()) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_hang_in_training_costs_one_sample_and_shifts_no_other(packed_shards, workers):
    shards = ShardSet.open(packed_shards)
    order = Order(shards.samples_per_shard, 0, 1, 1, 2)
    requests = MicroBatches(order, range(40), 2, 1, 0)
    config = dataclasses.replace(CONFIG, workers=workers)
    batches = training_batches(TrainingClips(shards, config, seed=0), requests)
    keys, skipped = [], []
    for step, batch in enumerate(batches):
        keys += batch.keys
        skipped += batch.skipped
        if step == 0:
            child_in_use(workers).suspend()
    asked = [(shards.key(request.sample), request.position, request.epoch) for batch in requests for request in batch]
    assert len(skipped) == 1, "the worker went on with another child"
    assert "took longer than the 1 s" in skipped[0]["reason"]
    lost = (skipped[0]["key"], skipped[0]["position"], skipped[0]["epoch"])
    assert [key for key, one in zip(keys, asked, strict=True) if one != lost] == [
        one[0] for one in asked if one != lost
    ]


READER = """
import signal, sys, time
import numpy as np
from pretrain.data.decode_client import open_video_apart

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts deaf

def next_video():
    return open_video_apart(open(sys.argv[1], "rb").read(), limit_s=1.0)

next_video().read(np.arange(2))
print("read", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_child_outlives_a_process_that_is_killed_or_interrupted(video, tmp_path, how):
    (tmp_path / "video.mp4").write_bytes(video)
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(tmp_path / "video.mp4")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=own_environment(),
        start_new_session=True,
    )
    assert reader.stdout.readline() == b"read\n"
    (child,) = decode_children(reader.pid)
    if how == signal.SIGKILL:
        child.suspend()  # as if its decoder hung: it cannot notice by itself that its user is gone
        reader.kill()
    else:
        os.killpg(reader.pid, how)  # as a terminal does
    reader.wait(20)
    _, alive = psutil.wait_procs([child], timeout=20)
    assert not alive


def test_a_killed_worker_takes_its_child_along_even_one_that_hangs(packed_shards):
    shards = ShardSet.open(packed_shards)
    requests = MicroBatches(Order(shards.samples_per_shard, 0, 1, 1, 2), range(1000), 2, 1, 0)
    batches = training_batches(TrainingClips(shards, dataclasses.replace(CONFIG, workers=1), seed=0), requests)
    next(batches)
    child = child_in_use(workers=1)
    child.suspend()
    psutil.Process(child.ppid()).kill()
    _, alive = psutil.wait_procs([child], timeout=20)
    assert not alive
    with pytest.raises(
        TubeletError, match=r"^data\.workers: a loader worker died; .* goes on from the last checkpoint"
    ):
        list(batches)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_child_is_deaf_to_what_is_meant_for_the_run(video, name):
    child = own_child(video)
    child.send_signal(getattr(signal, name))
    assert own_child(video) == child

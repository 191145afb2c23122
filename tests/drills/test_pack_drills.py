"""Packing under fire, in real processes: killed, starved of disk, its worker shot, interrupted, started twice."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pretrain.data.pack_merge import MergeConfig, merge
from pretrain.data.pool import Died, WorkerPool
from pretrain.errors import Refused
from tests.videos import make_video

pytestmark = pytest.mark.xdist_group("pack drills")  # one worker, which makes once what these tests share

ROOT = Path(__file__).parents[2]
PACK = """
import resource, sys
from pretrain.data.pack import PackConfig, pack
from pretrain.errors import TubeletError
if __name__ == "__main__":
    limit = int(sys.argv[3])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        part = sys.argv[4] if len(sys.argv) > 4 else None
        pack(PackConfig(source=sys.argv[1], out=sys.argv[2], samples_per_shard=3, jobs=1, part=part))
    except TubeletError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(15):
        make_video(
            folder / f"{number}.mp4", frames=90, height=96, width=128, seed=number, options={"preset": "ultrafast"}
        )
    return folder


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    script = tmp_path_factory.mktemp("script") / "pack_drill.py"
    script.write_text(PACK)
    return [sys.executable, str(script)]


@pytest.fixture(scope="module")
def uninterrupted(videos, command, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("uninterrupted") / "shards"
    assert run(command, videos, out).returncode == 0
    return content(out)


def run(command: list[str], videos: Path, out: Path, limit_bytes: int = 0) -> subprocess.CompletedProcess[str]:
    arguments = [*command, str(videos), str(out), str(limit_bytes)]
    return subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


def start(command: list[str], videos: Path, out: Path, *part: str) -> subprocess.Popen[str]:
    arguments = [*command, str(videos), str(out), "0", *part]
    return subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, process_group=0)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for_shards(out: Path, shards: int, process: subprocess.Popen[str]) -> None:
    while len(list(out.glob(".packing/*.tar.json"))) < shards:
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.002)


def children_of(process: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]


def descendants_of(process: int) -> list[int]:
    return [found for child in children_of(process) for found in (child, *descendants_of(child))]


def test_three_kills_and_a_last_start_give_the_bytes_of_an_uninterrupted_pack(videos, command, uninterrupted, tmp_path):
    out = tmp_path / "shards"
    for shards in (0, 2, 4):
        process = start(command, videos, out)
        wait_for_shards(out, shards, process)
        family = descendants_of(process.pid)
        process.kill()
        process.wait()
        process.stderr.close()
        assert not (out / "index.json").exists()
        assert all_end(family), "workers outlive no one"
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.idx")}
    again = run(command, videos, out)
    assert again.returncode == 0, again.stderr
    assert content(out) == uninterrupted
    assert "going on after 12 of 15 videos" in again.stderr
    kept = [name for name, written in finished.items() if (out / name).stat().st_mtime_ns == written]
    assert len(kept) >= 4, "a finished shard is not written again"


def all_end(processes: list[int], within_s: float = 10) -> bool:
    end_s = time.monotonic() + within_s
    while any(Path(f"/proc/{pid}").exists() and not is_zombie(pid) for pid in processes):
        if time.monotonic() > end_s:
            return False
        time.sleep(0.01)
    return True


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_second_pack_is_refused_and_an_interrupted_one_goes_on(videos, command, uninterrupted, tmp_path):
    out = tmp_path / "shards"
    process = start(command, videos, out)
    wait_for_shards(out, 1, process)
    process.send_signal(signal.SIGSTOP)
    second = run(command, videos, out)
    assert second.returncode == 2
    assert "another `tubelet pack` is writing there" in second.stderr
    process.send_signal(signal.SIGCONT)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to every process at the terminal
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = [line for line in errors.splitlines() if "interrupted" in line]
    assert "run the same command again to go on" in line
    assert "Traceback" not in errors
    assert run(command, videos, out).returncode == 0
    assert content(out) == uninterrupted


def test_a_pack_whose_whole_job_step_is_told_to_stop_ends_in_order_to_go_on_later(
    videos, command, uninterrupted, tmp_path
):
    out = tmp_path / "shards"
    process = start(command, videos, out)
    wait_for_shards(out, 1, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert re.search(r"stopped by SIGTERM; [1-4] of 5 shards are finished and stay; run the same command again", errors)
    assert "Traceback" not in errors
    assert run(command, videos, out).returncode == 0
    assert content(out) == uninterrupted


def test_parts_at_the_same_time_survive_a_kill_and_make_the_set_of_one_process(
    videos, command, uninterrupted, tmp_path
):
    out = tmp_path / "shards"
    killed = start(command, videos, out, "0/2")
    wait_for_shards(out, 1, killed)
    killed.send_signal(signal.SIGSTOP)
    for part, words in (
        ("0/2", "of part 0/2, or of all parts, is writing there"),
        ("0/3", "in 2 parts, now in 3 parts"),
    ):
        second = start(command, videos, out, part)
        assert words in second.communicate(timeout=60)[1]
        assert second.returncode == 2
    beside = start(command, videos, out, "1/2")
    with pytest.raises(Refused, match=r"of 2 parts, 0(-1)? (is|are) not finished"):
        merge(MergeConfig(str(out)))
    killed.kill()
    killed.communicate()
    again = start(command, videos, out, "0/2")
    for process in (again, beside):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert not (out / "index.json").exists()
    merge(MergeConfig(str(out)))
    assert content(out) == uninterrupted


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[bool]:
    """Mounts a disk of that size at the folder; yields False where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tubelet-drill", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_gives_one_line_and_keeps_the_finished_shards(videos, command, uninterrupted, tmp_path):
    total_bytes = sum(len(value) for value in uninterrupted.values())
    largest_bytes = max(len(value) for value in uninterrupted.values())
    out = tmp_path / "disk" / "shards"
    with small_disk(out.parent, total_bytes * 2 // 3) as mounted:
        # Without root no disk can be filled: then the kernel refuses to let a file grow past a limit instead.
        result = run(command, videos, out, limit_bytes=0 if mounted else largest_bytes - 1000)
        assert result.returncode == 2, result.stderr
        assert "DiskFull: " in result.stderr
        assert "no space left on the disk" in result.stderr
        assert "run the same command again to go on" in result.stderr
        assert "Traceback" not in result.stderr
        assert "Exception ignored" not in result.stderr
        kept = content(out)
        assert not [name for name in kept if ".tmp-" in name]
        assert all(kept[name] == uninterrupted[name] for name in kept if name.startswith("shard-"))
        if mounted:
            assert any(name.endswith(".tar") for name in kept)
            subprocess.run(["mount", "-o", f"remount,size={total_bytes * 4}", str(out.parent)], check=True)
        assert run(command, videos, out).returncode == 0
        assert content(out) == uninterrupted


def square_or_die(number: int) -> int:
    if number % 7 == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    return number * number


def test_a_task_that_kills_its_worker_costs_itself_alone():
    with WorkerPool(square_or_die, 2) as pool:
        results = list(pool.map(range(20)))
    assert [None if isinstance(result, Died) else result for result in results] == [
        None if number % 7 == 3 else number * number for number in range(20)
    ]

"""`tubelet doctor`: one line a check, exit code 0 if nothing failed, and what is broken is told with its remedy."""

import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.cli import main
from launch.doctor import HANGING
from launch.doctor_checks import CHECKS
from pretrain.engine.all_reduce import ended_after
from pretrain.engine.wandb_server import unreachable_because
from tests.runs import run, tiny_pretraining
from tests.videos import make_video


@pytest.fixture(scope="module")
def recipe(packed_shards, tmp_path_factory) -> Path:
    return tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)


def examined(text: str) -> dict[str, tuple[str, str]]:
    """Status and text of each check."""
    pattern = rf"^(ok|warning|failed|not checked) +({'|'.join(map(re.escape, CHECKS))}) +(.*)$"
    return {name: (status, found) for status, name, found in re.findall(pattern, text, re.M)}


def doctor(capsys, *arguments: object) -> tuple[int, dict[str, tuple[str, str]]]:
    capsys.readouterr()
    code = main(["doctor", *map(str, arguments)])
    said = capsys.readouterr()
    found = examined(said.out)
    failed = [name for name, (status, _) in found.items() if status == "failed"]
    assert code == (2 if failed else 0)
    assert ("checks failed; mend what their lines tell" in said.err) == bool(failed)
    return code, found


def test_a_healthy_machine_passes_all_checks_and_nothing_is_left_behind(recipe, tmp_path, capsys):
    code, found = doctor(capsys, "--config", recipe, "--steps", 6, "--out", tmp_path / "runs" / "a")
    assert code == 0
    assert list(found) == list(CHECKS)
    assert {name for name, (status, _) in found.items() if status != "ok"} == {"all-reduce", "shared memory"}
    assert found["shards"][1].startswith("11 samples in 3 shards")
    assert not list(tmp_path.iterdir())


def test_without_arguments_what_needs_them_is_not_checked(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, found = doctor(capsys)
    assert code == 0
    assert {name for name, (status, _) in found.items() if status == "not checked"} == {
        *("configuration", "all-reduce", "shards", "checkpoints")
    }


@pytest.mark.parametrize(
    ("options", "check", "words"),
    [
        (["--data.shards", "/nowhere"], "shards", "data.shards: /nowhere: no such folder; make it with"),
        (["--data.micro_batch", "3"], "configuration", "data.micro_batch: 1 processes x 3 samples do not divide"),
        (["--encoder.heads", "5"], "configuration", "encoder.heads: 5 heads do not divide encoder.width 32"),
        (["--deepspeed", "zero4"], "configuration", "zero4: is no file and no recipe of configs/deepspeed"),
        (["--init", "/nowhere"], "configuration", "/nowhere: holds no encoder"),
        (["--precision", "fp16"], "devices", "precision: fp16 needs a GPU; use bf16 or fp32"),
        (["--out", "/proc/run"], "run folder", "out: /proc/run: cannot be written"),
    ],
)
def test_what_is_wrong_is_told_in_the_line_of_its_check(recipe, tmp_path, capsys, monkeypatch, options, check, words):
    monkeypatch.setenv("PATH", "/nowhere")  # no login node of a cluster, whatever this machine is
    code, found = doctor(capsys, "--config", recipe, "--steps", 6, "--out", tmp_path / "run", *options)
    assert code == 2
    assert found[check][0] == "failed"
    assert words in found[check][1]


def test_a_stage_that_zero_does_not_have_is_refused(recipe, tmp_path, capsys):
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 5}}')
    _, found = doctor(capsys, "--config", recipe, "--steps", 6, "--out", tmp_path / "run", "--deepspeed", file)
    assert found["configuration"] == (
        "failed",
        f"{file}: zero_optimization.stage: 5 is no stage of ZeRO; use 0, 1, 2 or 3",
    )


def test_the_disk_is_asked_for_all_checkpoints_that_the_run_will_keep(recipe, tmp_path, capsys):
    options = ["--config", recipe, "--epochs", 6, "--out", tmp_path / "run", "--checkpoint.every", 1]
    _, found = doctor(capsys, *options)
    assert found["disk"][1].endswith("up to 3 at a time")
    _, found = doctor(capsys, *options, "--checkpoint.keep_every", 2)
    assert found["disk"][1].endswith("up to 7 at a time")  # 2, 4, 6, 8 for good, and 10, 11, 12


def test_a_damaged_shard_is_found_where_a_sample_of_it_is_read(recipe, tmp_path, capsys):
    from pretrain.data.pack import PackConfig, pack

    make_video(tmp_path / "videos" / "a.mp4", frames=12)
    pack(PackConfig(source=str(tmp_path / "videos"), out=str(tmp_path / "shards"), jobs=1))
    (shard,) = (tmp_path / "shards").glob("*.tar")
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 255
    shard.write_bytes(content)
    small = ["--data.global_batch", 1, "--data.micro_batch", 1, "--data.lanes", 1]
    options = ["--config", recipe, "--steps", 6, "--out", tmp_path / "run", "--data.shards", tmp_path / "shards"]
    _, found = doctor(capsys, *options, *small)
    status, text = found["shards"]
    assert status == "failed"
    assert "is damaged" in text
    assert f"`tubelet check {tmp_path / 'shards'}` lists all that is damaged" in text


@pytest.fixture
def silent_server(monkeypatch):
    """A server that accepts and never answers; W&B is to use it."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server


def test_a_wandb_server_that_never_answers_is_given_up_in_time(silent_server):
    started = time.monotonic()
    assert unreachable_because(within_s=0.3) is not None
    assert time.monotonic() - started < 2


def test_a_wandb_server_that_answers_whatever_it_says_is_reached(silent_server):
    def answer() -> None:
        connection, _ = silent_server.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    threading.Thread(target=answer, daemon=True).start()
    assert unreachable_because() is None


def test_an_unreachable_wandb_server_is_a_warning_since_runs_go_on_offline(recipe, tmp_path, capsys, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://user:secret@127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    code, found = doctor(capsys, "--config", recipe, "--steps", 6, "--out", tmp_path / "run", "--tracking", "wandb")
    assert code == 0
    assert found["W&B"][0] == "warning"
    assert f"http://127.0.0.1:{port} cannot be reached (Connection refused); runs are kept offline" in found["W&B"][1]


def test_two_processes_sum_a_tensor_and_see_each_others_files(recipe, tmp_path):
    command = ["doctor", "--config", recipe, "--steps", 6, "--out", tmp_path / "run"]
    ended = run("launch", command, tmp_path, world=2)
    assert ended.codes == [0, 0], ended.text
    found = examined(ended.text)
    assert list(found) == list(CHECKS)
    assert re.fullmatch(
        r"\S+: gloo, the sum is right, \d+ us for one number, \d+\.\d\d GB/s for 8 MiB", found["all-reduce"][1]
    )
    assert found["run folder"][1].endswith(f"{tmp_path / 'run'} can be written and all see it")
    assert ended.outputs[1].read_text() == ""
    assert not (tmp_path / "run").exists()


def test_a_network_interface_that_is_not_there_is_refused_in_one_line_with_its_name(tmp_path):
    ended = run("launch", ["doctor"], tmp_path, world=2, environment={"GLOO_SOCKET_IFNAME": "nowhere0"})
    assert ended.codes == [2, 2], ended.text
    (line,) = [line for line in ended.text.splitlines() if line.startswith("tubelet:")]
    assert line.startswith("tubelet: network: GLOO_SOCKET_IFNAME names nowhere0, which this node lacks (it has ")
    assert line.endswith("; name the interface that joins the nodes")
    assert "Traceback" not in ended.text


def test_a_check_that_hangs_ends_its_process_and_tells_what_to_look_at():
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        sys.stderr = os.fdopen(writing, "w")
        with ended_after(0.1, "disk", HANGING["disk"]):
            time.sleep(60)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert text.startswith("tubelet: disk: no answer within 0.1 s on ")
    assert text.endswith("; see whether the file system of --out answers on all nodes\n")

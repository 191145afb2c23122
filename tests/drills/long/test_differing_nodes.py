"""Nodes that cannot do a run together, each way to differ with two real processes; and a rank that never answers."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.test_preflight import assert_refused_by_rank_0_alone, other_timm
from tests.launch.test_doctor import examined
from tests.runs import free_port, own_environment, run, start, tiny_pretraining


@pytest.fixture(scope="module")
def recipe(packed_shards, tmp_path_factory) -> Path:
    return tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)


def test_a_finetuning_on_nodes_with_different_versions_is_refused_too(recipe, tmp_path):
    lines = recipe.read_text().splitlines()
    (tmp_path / "finetune.yaml").write_text(
        "\n".join(line for line in lines if line.split(":")[0] not in ("encoder", "decoder", "mask"))
    )
    command = ["--config", tmp_path / "finetune.yaml", "--steps", 6, "--out", tmp_path / "run"]
    command += ["--architecture.width", 32, "--architecture.depth", 1, "--architecture.heads", 2]
    command += ["--architecture.tubelet", "[2, 8, 8]"]
    ended = run("finetune", command, tmp_path, world=2, last={"path": other_timm(tmp_path)})
    assert_refused_by_rank_0_alone(ended, "; install the same environment on all nodes")
    assert not (tmp_path / "run").exists()


def test_shards_that_are_others_on_one_node_are_refused(recipe, packed_shards, other_shards, tmp_path):
    for place, shards in (("here", packed_shards), ("there", other_shards)):
        (tmp_path / place).mkdir()
        os.symlink(shards, tmp_path / place / "shards")
    os.symlink(packed_shards, tmp_path / "shards")
    command = ["--config", recipe, "--steps", 6, "--out", tmp_path / "run", "--data.shards", "shards"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "here")
        ended = run("pretrain", command, tmp_path, world=2, last={"place": tmp_path / "there"})
    assert_refused_by_rank_0_alone(ended, "; copy the same files to all nodes, or name a folder that all of them share")
    assert "data.shards: is " in ended.text


def test_processes_that_were_given_different_commands_are_refused(recipe, tmp_path):
    command = ["--config", recipe, "--steps", 6, "--out", tmp_path / "run"]
    ended = run("pretrain", command, tmp_path, world=2, last={"arguments": ["--seed", "3"]})
    assert_refused_by_rank_0_alone(ended, "; start all processes with the same command line and the same recipe")
    assert "seed: is 0 on " in ended.text


def test_a_device_that_cannot_do_what_is_asked_for_ends_all_before_they_meet_in_a_group(recipe, tmp_path):
    command = ["--config", recipe, "--steps", 6, "--out", tmp_path / "run"]
    ended = run("pretrain", command, tmp_path, world=2, last={"arguments": ["--precision", "fp16"]})
    assert_refused_by_rank_0_alone(ended, f"{socket.gethostname()} (rank 1): precision: fp16 needs a GPU; use bf16")


def test_a_deepspeed_file_that_one_node_lacks_or_has_with_other_content_is_refused(recipe, tmp_path, monkeypatch):
    for place, content in (("here", "{}"), ("lacking", None), ("other", '{"zero_optimization": {"stage": 2}}')):
        (tmp_path / place).mkdir()
        if content:
            (tmp_path / place / "own.json").write_text(content)
    monkeypatch.chdir(tmp_path / "here")
    command = ["--config", recipe, "--steps", 6, "--out", tmp_path / "run", "--deepspeed", "own.json"]
    ended = run("pretrain", command, tmp_path, world=2, last={"place": tmp_path / "lacking"})
    assert_refused_by_rank_0_alone(ended, f"{socket.gethostname()} (rank 1): own.json: is no file and no recipe of")
    ended = run("pretrain", command, tmp_path, world=2, last={"place": tmp_path / "other"})
    assert_refused_by_rank_0_alone(ended, "; copy the same files to all nodes, or name a folder that all of them share")
    assert "deepspeed: is " in ended.text
    assert not (tmp_path / "run").exists()


def test_a_port_that_another_program_has_taken_is_refused_whoever_started_the_ranks(recipe, tmp_path):
    command = ["--config", recipe, "--steps", 6, "--out", tmp_path / "run"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        started = start("pretrain", command, tmp_path, world=2, environment={"MASTER_PORT": str(port)})
        assert started.wait_for(lambda: started.is_over() or started.code is not None)
        started.kill()
    assert started.code == 2, started.text
    assert f"tubelet: MASTER_PORT: 127.0.0.1:{port} cannot be used (Address already in use); set it to a free one" in (
        started.text
    )


def test_a_run_folder_that_one_node_does_not_share_is_refused(recipe, tmp_path, monkeypatch):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    command = ["--config", recipe, "--steps", 6, "--out", "runs/a"]
    ended = run("pretrain", command, tmp_path, world=2, last={"place": tmp_path / "there"})
    assert_refused_by_rank_0_alone(
        ended,
        f"out: {socket.gethostname()} (rank 1): cannot see what rank 0 wrote to runs/a ({tmp_path}/there/runs/a here)",
    )
    assert not list((tmp_path / "here").iterdir())
    assert not list((tmp_path / "there").iterdir())


def test_a_run_folder_that_one_node_may_only_read_is_refused(recipe, tmp_path):
    """Mounted read-only, in a place of its own, since root may write wherever a file system lets it."""
    (tmp_path / "shared" / "run").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    bind = ["mount", "--bind", tmp_path / "shared", tmp_path / "there"]
    if subprocess.run(bind, capture_output=True).returncode:
        pytest.fail("this test mounts a folder a second time; run it as root, or in a user namespace")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", tmp_path / "there"], check=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path / "shared")
            command = ["--config", recipe, "--steps", 6, "--out", "run"]
            ended = run("pretrain", command, tmp_path, world=2, last={"place": tmp_path / "there"})
    finally:
        subprocess.run(["umount", "--lazy", tmp_path / "there"], check=True)
    assert_refused_by_rank_0_alone(
        ended, "run: cannot be written (Read-only file system); mend its permissions or give"
    )
    assert not list((tmp_path / "shared" / "run").iterdir())


def test_two_runs_in_one_folder_do_not_take_each_others_probes_away(recipe, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".preflight-of-another-0").write_text("of another")
    (out / ".preflight-long-ago-0").write_text("long ago")
    os.utime(out / ".preflight-long-ago-0", (0, 0))
    ended = run("launch", ["doctor", "--out", out], tmp_path, world=2)
    assert ended.codes == [0, 0], ended.text
    assert [path.name for path in out.iterdir()] == [".preflight-of-another-0"]


def test_of_two_processes_the_one_with_other_versions_is_named(recipe, tmp_path):
    command = ["doctor", "--config", recipe, "--steps", 6, "--out", tmp_path / "run"]
    ended = run("launch", command, tmp_path, world=2, last={"path": other_timm(tmp_path)})
    assert ended.codes == [2, 2], ended.text
    status, text = examined(ended.text)["versions"]
    assert status == "failed"
    assert re.search(r"timm: is .* on \S+ \(rank 0\), but 9\.9 on \S+ \(rank 1\); install the same environment", text)
    assert "tubelet: doctor: 1 of 11 checks failed" in ended.text
    assert ended.outputs[1].read_text() == ""


SILENT = """
import time
from pretrain.engine.all_reduce import measure_all_reduce
from pretrain.engine.distributed import Processes
with Processes() as processes:
    time.sleep(600) if processes.rank else measure_all_reduce(processes, within_s=1)
"""


def test_a_rank_that_never_comes_to_the_all_reduce_ends_the_others_with_a_line():
    shared = own_environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SILENT], env=shared | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE
        )
        for rank in ("1", "0")
    ]
    try:
        _, said = ranks[1].communicate(timeout=300)
    finally:
        ranks[0].kill()
        ranks[0].communicate()
    assert ranks[1].returncode == 2, said
    assert f"tubelet: all-reduce: no answer within 1 s on {socket.gethostname()}; see that the nodes" in said.decode()

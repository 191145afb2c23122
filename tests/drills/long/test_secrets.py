"""Real runs with secrets planted around them: none of these reaches the run folder, the terminal or W&B's server."""

from pathlib import Path

import pytest

from pretrain.engine.tracking import read_metrics
from tests.runs import run, tiny_pretraining
from tests.wandb_server import WandbServer

PLANTED = {
    "WANDB_API_KEY": "0f1e2d3c4b" * 4,
    "HF_TOKEN": "hf_" + "AbCdEfGhIj" * 3,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "SLURM_JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJtZSJ9.c2lnbmF0dXJlc2ln",
    "NCCL_PROXY_PASSWORD": "correct horse battery",
    "TORCH_HOME": "https://me:0penSesame@models.example.org/hub?signature=deadbeefcafe",
    "SLURM_COMMENT": "notify https://hooks.example.org/?token=s3cr3tT0ken",
}
SECRETS = [*list(PLANTED.values())[:5], "0penSesame", "deadbeefcafe", "s3cr3tT0ken"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, packed_shards) -> Path:
    return tiny_pretraining(tmp_path_factory.mktemp("recipe"), packed_shards)


def command(recipe: Path, out: Path) -> list[object]:
    return ["--config", recipe, "--out", out, "--steps", 10, "--tracking", "auto"]


def test_no_secret_of_the_environment_reaches_the_run_folder_or_the_server(recipe, tmp_path):
    out = tmp_path / "run"
    with WandbServer() as server:
        done = run("pretrain", command(recipe, out), tmp_path, environment=PLANTED | {"WANDB_BASE_URL": server.url})
        assert done.code == 0, done.text
        received = server.received
    assert b'"environment' in received.replace(b"\\", b"")
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (attempt,) = read_metrics(out / "environment.jsonl")
    assert attempt["variables"]["SLURM_COMMENT"] == "notify https://hooks.example.org/?[removed]"
    for secret in map(str.encode, SECRETS):
        assert secret not in received
        assert not [path for path, content in written.items() if secret in content]
    assert not [secret for secret in SECRETS if secret in done.text]


def test_credentials_in_the_url_of_the_data_are_refused_before_anything_is_written(recipe, tmp_path):
    out = tmp_path / "run"
    url = "https://me:0penSesame@data.example.org/shards"
    done = run(
        "pretrain", [*command(recipe, out), "--data.shards", url], tmp_path, environment={"WANDB_MODE": "offline"}
    )
    assert done.code == 2
    assert "0penSesame" not in done.text
    assert not out.exists()

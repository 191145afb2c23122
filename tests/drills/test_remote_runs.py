"""Runs on shards behind URLs: the very run of the folder, over a full disk, and from S3."""

import os
import resource
import shutil
import subprocess
from pathlib import Path

import boto3
import pytest
import s3fs
import yaml
from moto.server import ThreadedMotoServer

from launch.cli import main
from pretrain.data import remote, transfer
from pretrain.data.remote import RemoteFolder
from pretrain.data.shard_cache import CacheConfig
from pretrain.data.shards import ShardSet
from pretrain.engine.tracking import METRICS, read_metrics
from pretrain.errors import DiskFull, Refused, TubeletError
from tests import shard_server as tricks
from tests.runs import free_port, run, tiny_pretraining
from tests.shard_server import serving

BUCKET = "videos"


def test_a_run_from_a_url_is_the_run_from_the_folder_and_goes_on_from_there(packed_shards, tmp_path):
    """Losses and weights equal to the bit: the same clips and masks in the same steps."""
    recipe = tiny_pretraining(tmp_path, packed_shards)
    common = ["--config", recipe, "--steps", 8, "--checkpoint.every", 4, "--data.cache.folder", tmp_path / "cache"]

    def record_of(out: Path, *options: object) -> tuple:
        done = run("pretrain", [*common, "--out", out, *options], tmp_path)
        assert done.code == 0, done.text
        metrics = [[entry[name] for name in ("step", "loss", "gradient_norm")] for entry in read_metrics(out / METRICS)]
        return metrics, (out / "encoder" / "model.safetensors").read_bytes(), done.text

    expected = record_of(tmp_path / "local")[:2]
    assert len(expected[0]) == 8
    out = tmp_path / "remote"
    with serving(packed_shards) as server:
        server.tricks["shard-000001.tar"] = [tricks.truncate]
        assert record_of(out, "--data.shards", server.url)[:2] == expected
        assert server.sent["shard-000001.tar"] == 1
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    *moved, text = record_of(out)
    assert "going on from step 4" in text
    assert tuple(moved) == expected


def test_a_run_on_a_mixture_of_a_folder_and_a_url_is_the_run_on_folders(packed_shards, other_shards, tmp_path):
    recipe = tiny_pretraining(tmp_path, packed_shards)
    content = yaml.safe_load(recipe.read_text())
    del content["data"]["shards"]

    def weights_of(name: str, *places: object) -> bytes:
        content["data"] |= {"mixture": dict(zip(map(str, places), (2, 1), strict=True)), "global_batch": 6, "lanes": 3}
        recipe.write_text(yaml.safe_dump(content, sort_keys=False))
        folders = ["--out", str(tmp_path / name), "--data.cache.folder", str(tmp_path / "cache")]
        assert main(["pretrain", "--config", str(recipe), *folders, "--steps", "4"]) == 0
        return (tmp_path / name / "encoder" / "model.safetensors").read_bytes()

    expected = weights_of("folders", packed_shards, other_shards)
    with serving(other_shards) as server:
        assert weights_of("both", packed_shards, server.url) == expected
        assert {times for name, times in server.sent.items() if name != "index.json"} == {1}


@pytest.fixture
def small_disk(packed_shards, tmp_path):
    """A disk that holds one shard of three, or None where the tests may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = max(shard.bytes for shard in ShardSet.open(packed_shards).shards) + (160 << 10)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tubelet-drill", str(folder)]
    is_mounted = not os.geteuid() and not subprocess.run(mount, capture_output=True).returncode
    yield folder if is_mounted else None
    if is_mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_gets_room_from_what_is_cached_and_is_one_line_when_nothing_is(packed_shards, small_disk, tmp_path):
    """Without a disk of its own, a largest file size stands in for the end of the disk."""
    words = r"/cache: the disk of the cache is full: a shard of .* GB does not fit .*; free some, or give"
    local = ShardSet.open(packed_shards)
    with serving(packed_shards) as server:
        if small_disk:
            shards = ShardSet.open(server.url, cache=CacheConfig(str(small_disk / "cache")))
            assert [shards.read(number) for number in range(11)] == [local.read(number) for number in range(11)]
            shutil.rmtree(small_disk / "cache")
            room_bytes = min(shard.bytes for shard in shards.shards) // 2
            (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - room_bytes))
            with pytest.raises(DiskFull, match=words):
                shards.read(0)
        shards = ShardSet.open(server.url, cache=CacheConfig(str(tmp_path / "cache")))
        shards.labels()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(DiskFull, match=words):
                shards.read(0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert shards.read(0) == local.read(0)


@pytest.fixture
def s3(packed_shards, monkeypatch):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (("ACCESS_KEY_ID", "me"), ("SECRET_ACCESS_KEY", "hunter2"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    for path in packed_shards.iterdir():
        if path.is_file():
            client.upload_file(str(path), BUCKET, f"sets/my set/{path.name}")
    yield client
    server.stop()


def test_a_set_is_read_from_s3_and_what_is_not_there_is_refused_by_name(s3, packed_shards, tmp_path, monkeypatch):
    cache = CacheConfig(str(tmp_path / "cache"))
    shards, local = ShardSet.open(f"s3://{BUCKET}/sets/my set/", cache=cache), ShardSet.open(packed_shards)
    assert shards.fingerprint == local.fingerprint
    monkeypatch.setattr(transfer, "S3_BLOCK_BYTES", 1000)
    assert [shards.read(number) for number in range(11)] == [local.read(number) for number in range(11)]
    s3.put_object(Bucket=BUCKET, Key="sets/my set/shard-000001.tar", Body=b"another")
    shutil.rmtree(cache.path)
    with pytest.raises(Refused, match=r"s3://videos/sets/my set/shard-000001\.tar: it is 7 bytes long"):
        shards.read(4)
    with pytest.raises(Refused, match=r"s3://videos/none/index\.json: is not there \(no such key or bucket\)"):
        ShardSet.open(f"s3://{BUCKET}/none", cache=cache)
    with pytest.raises(Refused, match=r"s3://nowhere/set/index\.json: is not there \(no such key or bucket\)"):
        ShardSet.open("s3://nowhere/set", cache=cache)
    with pytest.raises(Refused, match=r"s3://No_Bucket/set/index\.json: is not there"):
        ShardSet.open("s3://No_Bucket/set", cache=cache)


def test_an_s3_that_refuses_the_key_or_is_away_is_one_line_without_the_key(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_AFTER_S", (0.01,))
    for name, value in (("ACCESS_KEY_ID", "me"), ("SECRET_ACCESS_KEY", "hunter2"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    folder = RemoteFolder(f"s3://{BUCKET}/set", CacheConfig(str(tmp_path / "cache")))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TubeletError, match=r"index\.json: cannot be fetched \(.+\), not even after") as away:
        folder.read_index()
    (tmp_path / BUCKET / "set").mkdir(parents=True)
    (tmp_path / BUCKET / "set" / "index.json").write_text("{" + " " * 1000 + "}")
    s3fs.S3FileSystem.clear_instance_cache()  # it knows the other server
    with serving(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with pytest.raises(
            Refused, match=r"index\.json: is not given to us \(access denied: Forbidden\); put the key"
        ) as refused:
            folder.read_index()
        server.head = 400
        with pytest.raises(Refused, match=r"S3 refuses the request \(.+\); check that the login has not expired"):
            folder.read_index()
        server.head = 200
        monkeypatch.setattr(transfer, "S3_BLOCK_S", 0.3)
        server.tricks[f"{BUCKET}/set/index.json"] = [tricks.creep(3)] * 2
        with pytest.raises(
            TubeletError, match=r"cannot be fetched \(it sent nothing, or next to nothing, for too long"
        ):
            folder.read_index()
    assert "hunter2" not in str(away.value) + str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", "Invalid endpoint: localhost:9000"),
        ("AWS_PROFILE", "nobody", r"The config profile \(nobody\) could not be found"),
    ],
)
def test_settings_of_aws_that_cannot_be_are_told_at_once(tmp_path, monkeypatch, name, value, reason):
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv(name, value)
    with pytest.raises(Refused, match=rf"^s3://videos/set/index\.json: S3 cannot be asked \({reason}\); check the AWS"):
        RemoteFolder(f"s3://{BUCKET}/set", CacheConfig(str(tmp_path / "cache"))).read_index()

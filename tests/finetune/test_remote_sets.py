"""Finetuning and evaluation on shards behind URLs find what they find in the folder."""

import json
from pathlib import Path

from launch.cli import main
from tests.shard_server import serving


def test_finetuning_behind_a_url_is_that_in_the_folder(finetuning, finetuned, packed_shards, tmp_path):
    with serving(packed_shards) as server:
        command = [server.url if part == str(packed_shards) else part for part in finetuning]
        options = ["--data.shards", server.url, "--data.cache.folder", str(tmp_path / "cache")]
        assert main([*command, *options, "--out", str(tmp_path / "run")]) == 0
        assert {times for name, times in server.sent.items() if name != "index.json"} == {1}
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (finetuned, tmp_path / "run")]
    assert weights[0] == weights[1]


def test_evaluation_behind_a_url_is_that_in_the_folder(finetuned, packed_shards, tmp_path):
    def evaluated(place: object, out: Path) -> tuple[dict, str]:
        command = ["evaluate", "--model", finetuned, "--shards", place, "--out", out, "--workers", 0]
        assert main([*map(str, command), "--cache.folder", str(tmp_path / "cache")]) == 0
        return json.loads(Path(out, "evaluation.json").read_text()), Path(out, "predictions.jsonl").read_text()

    expected, predictions = evaluated(packed_shards, tmp_path / "local")
    with serving(packed_shards) as server:
        assert evaluated(server.url, tmp_path / "remote") == (expected | {"shards": server.url}, predictions)

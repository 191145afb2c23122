"""Export of classifiers, with each encoder and each kind of head: a file computes its model's logits for any batch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy
import onnxruntime
import pytest
import torch
from torch import Tensor

import finetune
from finetune.export import random_clips
from launch.cli import main
from pretrain.model.encoders import ENCODERS
from tests.classifiers import tiny_classifier

ROOT = Path(__file__).parents[3]
MODELS = [(name, "class_token") for name in ENCODERS] + [("joint", "mean"), ("factorised_encoder", "attention")]
README = (ROOT / "finetune/README.md").read_text()


def clips_and_logits(folder: Path, batch: int) -> tuple[Tensor, Tensor]:
    """Clips, and what the model in a folder gives for them."""
    model = finetune.load(folder)
    clips = random_clips(model.description, batch)
    with torch.no_grad():
        logits = model.model.cpu()(clips)
    assert logits.std() > 0.01
    return clips, logits


@pytest.mark.parametrize(("encoder", "pool"), MODELS)
def test_a_program_gives_the_logits_of_its_model_for_any_number_of_clips(encoder, pool, tmp_path):
    tiny_classifier(tmp_path / "model", encoder, pool)
    out = tmp_path / "model.pt2"
    assert main(["export", str(tmp_path / "model"), str(out)]) == 0
    told = {"tubelet.json": ""}
    program = torch.export.load(out, extra_files=told).module()
    assert json.loads(told["tubelet.json"])["classes"] == ["jump", "run", "sit"]
    clips, expected = clips_and_logits(tmp_path / "model", 5)
    with torch.no_grad():
        torch.testing.assert_close(program(clips), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("encoder", "pool"), MODELS)
def test_a_graph_of_onnx_gives_the_logits_of_its_model_for_any_number_of_clips(encoder, pool, tmp_path):
    tiny_classifier(tmp_path / "model", encoder, pool)
    out = tmp_path / "model.onnx"
    assert main(["export", str(tmp_path / "model"), str(out)]) == 0
    clips, expected = clips_and_logits(tmp_path / "model", 5)
    (logits,) = onnxruntime.InferenceSession(out).run(["logits"], {"clips": clips.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=0)


def test_rotary_positions_are_exported_to_onnx(tmp_path):
    """The others are tables in the file; these are computed from where a token stands."""
    tiny_classifier(tmp_path / "model", "factorised_encoder", positions="rotary")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "model.onnx")]) == 0


def test_an_export_to_onnx_says_one_line_and_its_file_names_no_folder_of_this_machine(tmp_path, capfd):
    tiny_classifier(tmp_path / "model")
    out = tmp_path / "model.onnx"
    assert main(["export", str(tmp_path / "model"), str(out)]) == 0
    said = capfd.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"[^\n]* wrote \S*model\.onnx; greatest difference from [^\n]*\n", said.err)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["model.onnx"]
    content = out.read_bytes()
    assert b"jump" in content
    assert str(ROOT).encode() not in content


def test_what_the_readme_shows_runs_a_file_of_onnx_with_nothing_but_onnxruntime(tmp_path):
    description = tiny_classifier(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "ucf.onnx")]) == 0
    clips, expected = clips_and_logits(tmp_path / "model", 7)
    numpy.save(tmp_path / "clips.npy", clips.numpy())
    (shown,) = re.findall(r"```python\n(import json\nimport onnxruntime\n.*?)```", README, re.DOTALL)
    program = (
        f"import sys, numpy\nclips = numpy.load('clips.npy')\n{shown}\nnumpy.save('logits.npy', logits)\n"
        "assert not {'torch', 'finetune', 'pretrain'} & set(sys.modules)\n"
    )
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([description.classes[number] for number in expected.argmax(1)])
    logits = torch.from_numpy(numpy.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

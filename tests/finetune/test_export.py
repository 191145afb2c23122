"""Export: a file of another model, or of none, is not written. That a file's logits are right, a drill tells."""

import dataclasses
import sys

import pytest

import finetune
from finetune import export as export_module
from finetune import export_onnx
from launch.cli import main
from pretrain.data.sequence_plan import PackingConfig
from tests.classifiers import tiny_classifier


def test_a_program_that_differs_from_its_model_is_not_kept(finetuned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_module, "TOLERANCE", -1.0)  # which no difference reaches
    out = tmp_path / "model.pt2"
    assert main(["export", str(finetuned), str(out)]) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_file_that_is_there_one_in_no_folder_and_an_encoder_are_refused(
    suffix, finetuned, pretrained, tmp_path, capsys
):
    there = tmp_path / f"there{suffix}"
    there.touch()
    for model, out, message in (
        (finetuned, there, "is there already"),
        (finetuned, tmp_path / "none" / f"model{suffix}", "cannot be written"),
        (pretrained / "encoder", tmp_path / f"model{suffix}", "is an encoder, not a classifier"),
    ):
        assert main(["export", str(model), str(out)]) == 2
        assert message in capsys.readouterr().err
    assert [(path, path.stat().st_size) for path in tmp_path.iterdir()] == [(there, 0)]


@pytest.mark.parametrize("name", ["model.pt", "model.ONNX", "model"])
def test_a_name_of_another_suffix_is_refused_with_both_that_there_are(name, finetuned, tmp_path, capsys):
    assert main(["export", str(finetuned), str(tmp_path / name)]) == 2
    assert "give NAME.pt2 or NAME.onnx" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_model_of_packed_clips_is_refused(suffix, tmp_path, capsys):
    tiny_classifier(tmp_path / "model", pool="mean", positions="factorised", packing=PackingConfig(group=2, tokens=32))
    assert main(["export", str(tmp_path / "model"), str(tmp_path / f"model{suffix}")]) == 2
    assert "was trained on packed clips" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_onnx_without_its_extra_is_refused_with_what_to_install(missing, finetuned, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)  # with which Python says that there is no such module
    assert main(["export", str(finetuned), str(tmp_path / "model.onnx")]) == 2
    said = capsys.readouterr().err
    assert missing in said
    assert "pip install 'tubelet[onnx]'" in said
    assert not list(tmp_path.iterdir())


def test_weights_that_one_file_of_onnx_cannot_hold_are_refused(finetuned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_onnx, "LARGEST_WEIGHTS_BYTES", 1000)
    assert main(["export", str(finetuned), str(tmp_path / "model.onnx")]) == 2
    assert "that a file of ONNX holds; name a file NAME.pt2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_tells_how_clips_are_cut_and_what_makes_probabilities_of_its_logits(finetuned):
    description = finetune.load(finetuned).description
    told = export_module.told_of(description)
    assert (told["sampling"], told["probabilities"]) == ("time_window", "softmax")
    assert export_module.told_of(dataclasses.replace(description, multi_label=True))["probabilities"] == "sigmoid"

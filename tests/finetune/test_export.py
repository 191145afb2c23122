"""Export: a file of another model, or of none, is not written. That a program's logits are right, a drill tells."""

import dataclasses

import finetune
from finetune import export as export_module
from launch.cli import main


def test_a_program_that_differs_from_its_model_is_not_kept(finetuned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_module, "TOLERANCE", -1.0)  # which no difference reaches
    out = tmp_path / "model.pt2"
    assert main(["export", str(finetuned), str(out)]) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_name_one_that_is_there_and_an_encoder_are_refused(finetuned, pretrained, tmp_path, capsys):
    there = tmp_path / "there.pt2"
    there.touch()
    for model, out, message in (
        (finetuned, tmp_path / "model.onnx", "give NAME.pt2"),
        (finetuned, there, "is there already"),
        (finetuned, tmp_path / "none" / "model.pt2", "cannot be written"),
        (pretrained / "encoder", tmp_path / "model.pt2", "is an encoder, not a classifier"),
    ):
        assert main(["export", str(model), str(out)]) == 2
        assert message in capsys.readouterr().err
    assert there.stat().st_size == 0


def test_a_program_tells_how_clips_are_cut_and_what_makes_probabilities_of_its_logits(finetuned):
    description = finetune.load(finetuned).description
    told = export_module.told_of(description)
    assert (told["sampling"], told["probabilities"]) == ("time_window", "softmax")
    assert export_module.told_of(dataclasses.replace(description, multi_label=True))["probabilities"] == "sigmoid"

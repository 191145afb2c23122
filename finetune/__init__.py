"""Finetuning a pretrained encoder to classify clips, and everything that is done with the classifier."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.predict import Predictor


def load(folder: str) -> "Predictor":
    """Loads a model folder, or the model of a finetuning run, to predict with: `finetune.load("runs/b")`.

    Raises:
        Refused: The folder holds no classifier, or one that is damaged.
    """
    from finetune.predict import load_predictor  # takes seconds to import, which other commands need not wait for

    return load_predictor(folder)

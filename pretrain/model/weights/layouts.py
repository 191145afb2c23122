"""Which layout a state dict has, and its conversion, checked weight by weight against our own models."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.errors import Refused
from pretrain.model.encoders import build_encoder
from pretrain.model.mae import MaskedAutoencoder
from pretrain.model.weights.image import from_image
from pretrain.model.weights.parts import ConvertedModel
from pretrain.model.weights.source import Source
from pretrain.model.weights.videomae import from_authors, from_videomae
from pretrain.model.weights.vivit import from_vivit
from pretrain.model.weights.xclip import from_xclip


class Layout(NamedTuple):
    """A layout: keys of which one gives it away, with the number of dimensions of the weight, and its conversion."""

    keys: tuple[str, ...]
    dimensions: int
    convert: Callable[[Source], ConvertedModel]


LAYOUTS = (
    Layout(("vivit.embeddings.cls_token", "embeddings.cls_token"), 3, from_vivit),
    Layout(
        (
            "videomae.embeddings.patch_embeddings.projection.weight",
            "embeddings.patch_embeddings.projection.weight",
        ),
        5,
        from_videomae,
    ),
    Layout(("encoder.patch_embed.proj.weight", "patch_embed.proj.weight"), 5, from_authors),
    Layout(("patch_embed.proj.weight",), 4, from_image),
    Layout(("vision_model.embeddings.class_embedding", "embeddings.class_embedding"), 1, from_xclip),
)


def convert(source: Source) -> ConvertedModel:
    """Converts a state dict of any layout that Tubelet knows.

    Raises:
        Refused: The layout is unknown, or a key of it was not used, is missing, or has another shape than its place.
    """
    for layout in LAYOUTS:
        if any(key in source and source.take(key).ndim == layout.dimensions for key in layout.keys):
            model = _converted(layout, source)
            source.finish()
            check(model, source.name)
            return model
    raise Refused(
        f"{source.name}: is of no layout that Tubelet knows; give VideoMAE (Hugging Face or MCG-NJU), ViViT or X-CLIP "
        f"(Hugging Face), ViT (timm) or MAE (facebookresearch/mae)"
    )


def _converted(layout: Layout, source: Source) -> ConvertedModel:
    """Converts; whatever breaks on the way was not in the file that the layout promises."""
    try:
        return layout.convert(source)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        problem = " ".join(str(error).split())[:120]
        raise Refused(
            f"{source.name}: its weights or its config.json are not as its layout has them ({problem}); download both"
        ) from error


def check(model: ConvertedModel, name: str) -> None:
    """Raises `Refused`, calling the source `name`, unless the weights fill our models, each in its shape."""
    model.encoder.validate(model.frames, model.size, field=f"{name}: encoder")
    if model.decoder is not None:
        model.decoder.config.validate()
    with torch.device("meta"):
        encoder = build_encoder(
            model.encoder, model.frames, model.size, model.mean, model.std, class_token="class_token" in model.weights
        )
        _check_against(encoder, model.weights, name)
        if model.decoder is not None:
            autoencoder = MaskedAutoencoder(encoder, model.decoder.config)
            autoencoder.encoder = nn.Identity()  # type: ignore[assignment]
            _check_against(autoencoder, model.decoder.weights, name)


def _check_against(ours: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    wanted = ours.state_dict()
    for key in wanted:
        if key not in weights:
            raise Refused(f"{name}: fills nothing of {key}; it is incomplete, or a variant that Tubelet does not know")
        if wanted[key].shape != weights[key].shape:
            raise Refused(
                f"{name}: {key} would be {tuple(weights[key].shape)}, but Tubelet's is {tuple(wanted[key].shape)}; "
                f"the weights are no model of one size"
            )
    for key in weights:
        if key not in wanted:
            raise Refused(f"{name}: {key} has no place here; it is a variant that Tubelet does not know")

"""What a configuration means for packed clips: sizes from the data room and masks from the model room, together."""

import functools

import torch

from pretrain.data.config import DataConfig
from pretrain.data.packed_clips import PackedBatch
from pretrain.data.packed_sequences import Sequences
from pretrain.data.sequence_plan import NO_MASKS, ClipSizing, Masks, Packing
from pretrain.model.encoder import EncoderConfig
from pretrain.model.masking import MaskConfig
from pretrain.model.packing import PackedTokens, decoded_places, draw_packed_mask, packed_counts, refuse_unpackable
from pretrain.model.tubelets import Grid


def packing_of(data: DataConfig, tubelet: tuple[int, int, int], mask: MaskConfig | None = None) -> Packing:
    """Returns how the clips of a run with `data.packing` are sized, masked and packed.

    Args:
        data: The data path.
        tubelet: Frames, height and width of a tubelet.
        mask: The mask of pretraining; None where the model sees all tokens.
    """
    assert data.packing is not None, "only packed runs ask"
    sizing = ClipSizing(data.clip, data.packing.aspect, tubelet)
    if mask is None:
        return Packing(sizing, data.packing.group, data.packing.tokens, 0, NO_MASKS)
    masks = Masks(functools.partial(packed_counts, mask), functools.partial(draw_packed_mask, mask))
    decoded = decoded_places(mask, data.packing.tokens)
    return Packing(sizing, data.packing.group, data.packing.tokens, decoded, masks)


def validate_packed(data: DataConfig, encoder: EncoderConfig, field: str, mask: MaskConfig | None = None) -> None:
    """Checks that an encoder can be trained on packed clips.

    Args:
        data: The data path, with `data.packing`.
        encoder: The architecture.
        field: The name that its fields have in the run's configuration.
        mask: The mask of pretraining; None where the model sees all tokens.

    Raises:
        Refused: Encoder, positions or mask are for clips of one size, a size does not divide, or sequences are too
            short for clips.
    """
    encoder.validate(data.clip.frames, encoder.tubelet[1:], field)  # height and width of clips follow the tubelet
    refuse_unpackable(encoder, field, mask)
    assert data.packing is not None, "only packed runs ask"
    sizing = ClipSizing(data.clip, data.packing.aspect, encoder.tubelet)
    sizing.validate()
    if mask is not None:
        mask.validate(encoder.name, Grid(1, 1, sizing.positions))
    packing_of(data, encoder.tubelet, mask).validate()


def visible_tokens(batch: PackedBatch | Sequences) -> PackedTokens:
    """Returns what the encoder sees of a batch."""
    return PackedTokens(batch.tubelets, batch.coordinates, batch.segments)


def decoded_tokens(batch: PackedBatch | Sequences) -> PackedTokens:
    """Returns what the decoder reconstructs of a batch."""
    return PackedTokens(batch.decoded_tubelets, batch.decoded_coordinates, batch.decoded_segments)


def joined(parts: list[Sequences], device: torch.device) -> Sequences:
    """Returns the sequences of several samples together, on the device."""
    return Sequences(*(torch.cat(tensors).to(device) for tensors in zip(*parts, strict=True)))

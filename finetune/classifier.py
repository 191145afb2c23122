"""The classifier: an encoder, a class token or pooling, and an MLP head (ViT, arXiv 2010.11929, section 3.1).

The pretrained encoder has no class token; finetuning adds a fresh one, which stands where the encoder's design wants
it: in the sequence of a joint encoder, in the temporal transformer of a factorised one. With mean pooling the last
layer norm is a fresh one behind the mean in place of the encoder's own, as in VideoMAE (arXiv 2203.12602). With
attention pooling a learned query attends to the encoder's normalised tokens (arXiv 2106.04560, section 3.2).
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from finetune.config import HeadConfig
from pretrain.data.clips import ClipConfig
from pretrain.data.config import DataConfig
from pretrain.data.sequence_plan import Packing, PackingConfig
from pretrain.errors import Refused
from pretrain.model.blocks import LAYER_NORM_EPS, initialise
from pretrain.model.encoder import Encoded, Encoder, EncoderConfig
from pretrain.model.packing import PackedTokens, encode_packed, pool_segments
from pretrain.model.rollout import Compared
from pretrain.packing import packing_of
from pretrain.weights import (
    configs_from,
    describe_encoder,
    described,
    encoder_from,
    load_model_folder,
    packing_from,
    save_model_folder,
)


class Classifier(nn.Module):
    """An encoder with a head.

    What a head reads of each encoder (all that finetuning adds is in the layer of the head for layer-wise decay):

        encoder                      class_token                     mean                  attention
        joint                        the token of the sequence       all tokens            all tokens
        factorised_encoder           that of the temporal            the temporal tokens,  the temporal tokens
                                     transformer                     one for each slot
        factorised_self_attention,   the token outside of the grid   all tokens            all tokens
        factorised_dot_product
        cross_frame                  the mean of the slots' tokens   all but those tokens  all but those tokens

    Args:
        encoder: The encoder; it must have a class token if the head reads one, and loses its last norm if not.
        head: The head.
        classes: Number of classes.
    """

    def __init__(self, encoder: Encoder, head: HeadConfig, classes: int) -> None:
        """Creates the head; the encoder keeps its other weights."""
        super().__init__()
        self.encoder = encoder
        self.frozen: list[nn.Module] = []  # modules of the encoder that stay in evaluation mode
        self.pool: Callable[[Encoded], Tensor] = class_token_of
        widths = [encoder.width, *head.hidden]
        layers: list[nn.Module] = []
        if head.pool == "class_token":
            encoder.leave_out_other_tokens()
        elif head.pool == "mean":
            self.pool = Encoded.mean
            encoder.leave_out_last_norm()
            layers.append(nn.LayerNorm(encoder.width, eps=LAYER_NORM_EPS))
        elif head.pool == "attention":
            self.pool = AttentionPool(encoder)
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        last = nn.Linear(widths[-1], classes)
        self.head = nn.Sequential(*layers, nn.Dropout(head.dropout), last)
        self.head.apply(initialise)
        nn.init.trunc_normal_(last.weight, std=0.02)
        last.weight.data.mul_(head.init_scale)

    def forward(self, clips: Tensor) -> Tensor:
        """Returns logits `(B, classes)` for clips `(B, T, H, W, C)`, uint8 or normalised floats."""
        return self.head(self.pool(self.encoder(clips)))

    def train(self, mode: bool = True) -> "Classifier":
        """Sets the training mode, but for what is frozen."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def group_matcher(self, coarse: bool = False) -> Any:
        """Returns a function from parameter names to layers, for timm's layer-wise decay."""
        above = self.encoder.layers + 1
        return lambda name: (
            self.encoder.layer_of(name.removeprefix("encoder.")) if name.startswith("encoder.") else above
        )


def class_token_of(encoded: Encoded) -> Tensor:
    """Returns `(B, D)`, the class token of an encoder that has one."""
    assert encoded.class_token is not None, "the encoder of a head that reads its class token has one"
    return encoded.class_token


class AttentionPool(nn.Module):
    """Multi-head attention pooling (arXiv 2106.04560): one learned query over an encoder's tokens, then an MLP.

    V-JEPA's attentive pooling (arXiv 2404.08471) is a cross-attention block of the same parts, with two differences: it
    adds its query to what the attention returns, and it normalises the tokens once more before them. Here the tokens
    have passed the encoder's last norm, and the query is added to nothing.

    Args:
        encoder: The encoder, which sets width, heads and the ratio of the MLP.
    """

    def __init__(self, encoder: Encoder) -> None:
        """Creates the query, the projections and the MLP."""
        super().__init__()
        block = encoder.config.block()
        self.attention = AttentionPoolLatent(
            block.width, num_heads=block.heads, mlp_ratio=block.mlp_ratio, norm_layer=nn.LayerNorm
        )
        self.apply(initialise)

    def forward(self, encoded: Encoded) -> Tensor:
        """Returns `(B, D)` for what an encoder returned: of its last transformer's tokens, as the mean is."""
        return self.attention(encoded.last())

    def weights(self, encoded: Encoded) -> Tensor:
        """Returns `(B, K)`: how much the query looks at each token that `forward` reads, the mean over heads."""
        return self.compared(encoded).mean()[:, 0]

    def compared(self, encoded: Encoded) -> Compared:
        """Returns the query and the keys that `forward` compares."""
        pool, tokens = self.attention, encoded.last()
        keys, _ = pool.kv(tokens).chunk(2, -1)
        queries = pool.q(pool.latent.expand(len(tokens), -1, -1))
        queries, keys = (part.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2) for part in (queries, keys))
        return Compared(pool.q_norm(queries), pool.k_norm(keys))


class PackedClassifier(Classifier):
    """A classifier of packed clips, which pools the tokens of each; its parameters are those of `Classifier`."""

    def forward(self, tokens: PackedTokens, clips: int = 1) -> Tensor:  # type: ignore[override]
        """Returns logits `(B, clips, classes)` for sequences that hold so many clips each."""
        return self.head(pool_segments(encode_packed(self.encoder, tokens), tokens.segments, clips))


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """What a model folder says of its classifier.

    Attributes:
        encoder: Its architecture.
        clip: The clips it sees.
        head: Its head.
        classes: Names of the classes, in the order of their numbers.
        short_side: Short side of the stored videos it was trained on, in pixels.
        frame_rate: Their frame rate if packing set one, else None.
        packing: How its clips are sized and packed; None where all have one size.
        multi_label: Whether a clip has any number of classes, each with a probability of its own.
    """

    encoder: EncoderConfig
    clip: ClipConfig
    head: HeadConfig
    classes: tuple[str, ...]
    short_side: int
    frame_rate: float | None
    packing: PackingConfig | None = None
    multi_label: bool = False

    @property
    def packed(self) -> Packing | None:
        """How the data path sizes and packs its clips; None where all have one size."""
        if self.packing is None:
            return None
        return packing_of(DataConfig(clip=self.clip, packing=self.packing), self.encoder.tubelet)

    def build_encoder(self) -> Encoder:
        """Returns the encoder with fresh weights."""
        class_token = self.head.pool == "class_token"
        return encoder_from(self.encoder, self.clip, class_token, self.packing)

    def build(self, encoder: Encoder) -> Classifier:
        """Returns a classifier with a fresh head on an encoder from `build_encoder`."""
        kind = PackedClassifier if self.packing else Classifier
        return kind(encoder, self.head, len(self.classes))


def save_classifier(folder: Path, weights: dict[str, Tensor], description: ModelDescription) -> None:
    """Writes a self-contained model folder."""
    content = (
        describe_encoder(description.encoder, description.clip, description.packing)
        | {
            "head": dataclasses.asdict(description.head),
            "classes": list(description.classes),
            "short_side": description.short_side,
            "frame_rate": description.frame_rate,
        }
        | ({"multi_label": True} if description.multi_label else {})
    )
    save_model_folder(folder, weights, content)


def load(folder: str | Path) -> tuple[Classifier, ModelDescription]:
    """Loads a classifier for inference.

    Args:
        folder: A model folder, or a finetuning run that holds one.

    Raises:
        Refused: The folder holds no classifier, or one that is damaged.
    """
    folder = Path(folder)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    weights, content = load_model_folder(folder)
    if "classes" not in content:
        raise Refused(f"{folder}: is an encoder, not a classifier; finetune it first")
    encoder, clip = configs_from(content, folder)
    packing = packing_from(content, folder)
    head = described(HeadConfig, content, "head", folder)
    try:
        description = ModelDescription(
            encoder,
            clip,
            head,
            tuple(content["classes"]),
            content["short_side"],
            content["frame_rate"],
            packing,
            content.get("multi_label", False),
        )
    except (KeyError, TypeError) as error:
        raise Refused(f"{folder / 'config.json'}: does not describe a classifier ({error}); export it again") from None
    model = description.build(description.build_encoder())
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"{folder}: config.json and model.safetensors do not fit: {reason}; export it again") from None
    return model.eval(), description

"""Metadata of a scorer (its card), available before any weights are read; needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rewards.input_files import parse_json

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    Images = Tensor | Image | Sequence[Image]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTHS = (1024, 128, 64, 16)
"""Widths between the layers of ImageReward's head (rewards.head), as published."""
HEAD_DROPOUT = (0.2, 0.2, 0.1)
"""Probabilities of dropout after its first three layers, as published."""
Head = Literal["own", "mlp"]
"""Head of a scorer that is trained: its own, or a new MLP of ImageReward's shape on a CLIP."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How pixels in [0, 1] become the input of a tower: resize, then crop or pad, then (x - mean) / std."""

    size: int
    """Height and width of the result, in pixels."""
    resize: Literal["shortest", "longest", "none"] = "shortest"
    """Which side becomes `size`; the other keeps the aspect ratio."""
    interpolation: Literal["bicubic"] = "bicubic"
    antialias: bool = True
    crop: Literal["center", "pad", "none"] = "center"
    """How the other side becomes `size`: cut around the centre, or black borders."""
    crop_offset: Literal["round", "floor"] = "round"
    """Where the cut begins when the margin is odd: half to even (torchvision), or down (transformers)."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    files: Literal["own mode", "rgb", "tensor"] = "own mode"
    """What the authors resize when they read a file: the image in its own mode, converted to RGB last; the
    image in RGB; or an RGB tensor, without rounding to 8 bits.
    """


@dataclass(frozen=True, kw_only=True)
class Clip:
    """The sizes of a CLIP's two towers, and what a checkpoint does not contain: activation, epsilon, heads, tokeniser, the score."""

    embed: int
    """Width of the common space of images and texts."""
    vision_width: int
    vision_layers: int
    vision_heads: int
    patch: int
    text_width: int
    text_layers: int
    text_heads: int
    activation: Literal["gelu", "quick_gelu"]
    """Exact GELU, or x * sigmoid(1.702 x)."""
    eps: float = 1e-5
    """Of every LayerNorm."""
    tokenizer: Literal["openai", "open_clip", "transformers"]
    context: int = 77
    """Tokens of a text, start and end included; a longer one is cut and keeps its end token."""
    vocab_size: int = 49408
    scaled: bool = False
    """The score is what losses are computed on, exp(logit_scale) times the cosine or a head's output, instead of the cosine."""
    head_dropout: tuple[float, float, float] | None = None
    """There is an MLP head (rewards.head) on the two vectors, with dropout of these probabilities; None = there is none."""

    def __post_init__(self) -> None:
        if self.head_dropout is None:
            return
        if len(self.head_dropout) != 3 or not all(0 <= probability < 1 for probability in self.head_dropout):
            raise ValueError(f"head_dropout must be three numbers in [0, 1), got {self.head_dropout}")
        if not self.scaled:
            raise ValueError("the output of a head is not a cosine: with head_dropout, scaled must be true")


@dataclass(frozen=True, kw_only=True)
class ImageRewardConfig:
    """The sizes of an ImageReward and the two constants that bring its raw scores to mean 0 and deviation 1.

    The defaults are the published model's. `vocab_size` counts two tokens more than vocab.txt has lines:
    BLIP's [DEC] and [ENC], which no caption uses.
    """

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    vocab_size: int = 30524
    max_positions: int = 512
    max_length: int = 35
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_intermediate: int = 3072
    text_dropout: float = 0.1
    projection: int = 256
    head: tuple[int, int, int, int] = HEAD_WIDTHS
    head_dropout: tuple[float, float, float] = HEAD_DROPOUT
    mean: float = 0.16717362830052426
    std: float = 1.0333394966054072

    def __post_init__(self) -> None:
        for heads, width in (("vision_heads", "vision_width"), ("text_heads", "text_width")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{width} {getattr(self, width)} is not a multiple of {heads} {getattr(self, heads)}"
                )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if not 2 <= self.max_length <= self.max_positions:
            raise ValueError(
                f"max_length {self.max_length} is not in 2..max_positions ({self.max_positions})"
            )
        if self.std <= 0:
            raise ValueError(f"std must be > 0, got {self.std}")
        if not all(0 <= probability < 1 for probability in self.head_dropout):
            raise ValueError(f"head_dropout must lie in [0, 1), got {self.head_dropout}")

    @property
    def preprocess(self) -> Preprocess:
        """Return what happens to pixels before the image tower."""
        return Preprocess(size=self.image_size, mean=CLIP_MEAN, std=CLIP_STD)

    @staticmethod
    def from_json(text: str) -> "ImageRewardConfig":
        """Return the config of a config.json; ValueError names a missing or unknown key."""
        values = parse_json(text, "config.json")
        names = {field.name for field in fields(ImageRewardConfig)}
        if not isinstance(values, dict) or values.keys() != names:
            different = sorted(names.symmetric_difference(values)) if isinstance(values, dict) else "all"
            raise ValueError(
                f"config.json of an ImageReward must have exactly its fields; different: {different}"
            )
        fitting: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return ImageRewardConfig(**fitting)


@dataclass(frozen=True, kw_only=True)
class Card:
    """One scorer: what it measures, its units, its licence, and where its weights are.

    `module` is the one that implements `load_scorer(card, weights, device, dtype)`. `mean` and `std` are
    the statistics of the scores over ordinary images. They are used to normalize scorers (rewards.mix) and
    never change a score. Weights are either published (`repo` on the hub, or `source` elsewhere with `url` where there is one, `revision`, `file`,
    `num_bytes`, `sha256`) or embedded (`folder`, relative to the repository root), or the scorer has none. Where the exact
    size is not known, `about_bytes` is that of the weights in float32. `needs` names scorers whose weights are read, too.
    """

    name: str
    module: str
    summary: str
    prompted: bool
    differentiable: bool
    typical_range: tuple[float, float]
    mean: float
    std: float
    licence: str
    paper: str
    repo: str | None = None
    source: str | None = None
    url: str | None = None
    revision: str | None = None
    file: str | None = None
    num_bytes: int | None = None
    about_bytes: int | None = None
    sha256: str | None = None
    folder: str | None = None
    preprocess: Preprocess | None = None
    clip: Clip | None = None
    needs: tuple[str, ...] = ()

    @property
    def size(self) -> str:
        """Return the size of the weights file in words, such as 1.8 GB or about 3.9 GB; empty where it is not known."""
        num_bytes = self.num_bytes or self.about_bytes
        if num_bytes is None:
            return ""
        words = f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
        return words if self.num_bytes else f"about {words}"

    @property
    def has_weights(self) -> bool:
        """Return True when the scorer needs files; its module then also has `find_files(card, weights)`, which gives them."""
        return self.file is not None or self.folder is not None


class Scorer(Protocol):
    """What `rewards.load` returns: a frozen model in eval mode that scores every image on its own."""

    @property
    def card(self) -> Card:
        """Return the scorer's card."""
        ...

    def __call__(self, images: "Images", prompts: str | Sequence[str], /) -> "Tensor":
        """Return scores (B,) float32 in the card's units, higher is better, of pixels (B, 3, H, W) in [0, 1].

        There are B prompts, or one for all images. Also taken are PIL images of any sizes, prepared as the authors do, which
        pixels are not: see rewards.pixels.takes_images, also for what is refused. Gradients reach pixels when `card.differentiable` says so.
        """
        ...

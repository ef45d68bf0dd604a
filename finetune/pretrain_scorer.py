"""Pre-train a scorer on images and captions, as BLIP or CLIP, before training on preferences.

`--architecture imagereward`: the losses of BLIP (Li et al. 2022, arXiv 2201.12086, section 3.2): the
image-text contrastive loss between the two towers, image-text matching by the text tower with
cross-attention to the image, and captioning by the same tower with causal attention. The matching score is
the output of the reward head, so the head already scores whether a caption fits before it is trained on
rankings. A negative caption is taken from the data set's `near_misses` column if there is one, otherwise it
is the most similar other caption in the batch (BLIP's hard negative, without sampling).

`--architecture clip`: the contrastive loss alone (Radford et al. 2021, arXiv 2103.00020, section 2.3), with
a learned logit_scale that is kept in [0, ln 100].

Both contrasts have one more column per image in the cross-entropy over captions, its own near miss, as
NegCLIP does (Yuksekgonul et al. 2023, arXiv 2210.01936): other captions of a batch differ in so many words that a
scorer need not look at shapes.

    python finetune/pretrain_scorer.py --config finetune/configs/pretrain_scorer/tiny.yaml
    python finetune/pretrain_scorer.py --config finetune/configs/pretrain_scorer/tiny_clip.yaml
    python finetune/pretrain_scorer.py --config finetune/configs/pretrain_scorer/tiny_clip_second.yaml     # goes on from it

Left out: BLIP's momentum encoders, and the label smoothing and separate self-attention of its captioner.
Output: `OUTPUT/scorer`, from which reward_model.py starts.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, cast

import tyro

from preftune.cli import dump, exit_on_user_error, parse
from preftune.image_folders import Columns
from preftune.training.defaults import FROM_SCRATCH, filled, of_run
from preftune.training.run_config import RunConfig, check

EMBED = 64
"""Width of the space that images and captions are compared in."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the scorer that is built; both towers have heads of 32 channels."""

    image: int = 64
    """Side of the images, pixels."""
    patch: int = 8
    """Side of a patch, pixels."""
    width: int = 128
    """Width of both towers."""
    vision_layers: int = 4
    """Layers of the image tower."""
    text_layers: int = 3
    """Layers of the text tower; those of an ImageReward have cross-attention to the image."""
    max_length: int = 22
    """Maximum tokens of a caption, including the special start and end tokens."""
    head: tuple[int, int, int, int] = (128, 64, 32, 16)
    """Widths inside the linear head of an ImageReward."""

    def __post_init__(self) -> None:
        if self.patch < 1 or self.width < 1 or self.width % 32 or self.image % self.patch:
            raise ValueError(
                f"--sizes.width must be a multiple of 32 and --sizes.image of --sizes.patch, got {self}"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pre-train an ImageReward by image-text contrast, matching and captioning, or a CLIP by contrast."""

    data: Path
    """Folder of captioned images: metadata.jsonl (file_name, text and, if it has them, near_misses) or what else
    finetune/pretrain.py reads."""
    columns: Annotated[Columns, tyro.conf.arg(name="")] = field(default_factory=Columns)
    model: Path | None = None
    """Scorer folder that an earlier run wrote, to go on from with its sizes and vocabulary, as on harder images; None = random weights."""
    image_tower: Path | None = None
    """Scorer folder of a CLIP, whose image tower a new ImageReward starts from; --sizes must be its. BLIP's starts from a trained ViT, too."""
    vocab: Path | None = None
    """ImageReward: WordPiece vocab.txt, as bert-base-uncased's. CLIP: merges.txt, or the tokenizer.json of a pipeline."""
    architecture: Literal["imagereward", "clip"] = "imagereward"
    """imagereward: the text tower has cross-attention to the image; clip: the cosine of two separate towers.
    """
    sizes: Sizes = field(default_factory=Sizes)
    temperature: float = 0.07
    """Temperature of the contrastive loss: fixed for imagereward, the initial value for clip."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(output_dir=Path("runs/pretrain_scorer"))
    )

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"--temperature must be positive, got {self.temperature}")
        if (self.model is None) == (self.vocab is None):
            raise ValueError("give --vocab to start from random weights, or --model to go on from a scorer")
        if self.model is not None and self.sizes != Sizes():
            raise ValueError(f"--model {self.model} has its own sizes; leave out --sizes")
        if self.image_tower is not None and (self.model is not None or self.architecture == "clip"):
            raise ValueError(
                "--image-tower is of a new ImageReward; leave it out with --model and with --architecture clip"
            )
        if self.architecture == "clip" and self.sizes.head != Sizes().head:
            raise ValueError(
                f"--sizes.head {self.sizes.head} is of an ImageReward; leave it out with --architecture clip"
            )
        if self.run.train_batch_size < 2:
            raise ValueError(
                f"--train-batch-size must be at least 2, for captions to be told apart, got {self.run.train_batch_size}"
            )


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewards
from preftune.cli.printable import show
from preftune.files.one_writer import one_writer
from preftune.order import items_at
from preftune.records import CaptionedImage
from preftune.resolution import Resolution
from preftune.training import data
from preftune.training.decoding import images_ahead
from preftune.training.preference_losses import clamp_scale
from preftune.training.run import Run
from rewards import Clip, Preprocess
from rewards.card import ImageRewardConfig
from rewards.clip import ClipScorer
from rewards.clip_tokenizer import vocab_size
from rewards.head import apply_head
from rewards.image_tower import take_image_tower
from rewards.imagereward import ImageReward
from rewards.on_device import upload
from rewards.trained_cards import clip_card
from rewards.training import check_trainable, load_trainable


def by_row_and_column(logits: Tensor, misses: Tensor | None = None) -> Tensor:
    """Return the mean of the two cross-entropies of logits (B, B), images by captions, whose diagonal is the truth.

    `misses` (B,) are the logits of each image with its own near miss, one more column of its row; -inf where it has none.
    """
    truth = torch.arange(len(logits), device=logits.device)
    rows = logits if misses is None else torch.cat([logits, misses[:, None]], dim=1)
    return (F.cross_entropy(rows, truth) + F.cross_entropy(logits.T, truth)) / 2


def matching_loss(fits: Tensor, misses: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of logits (B,) for captions that fit and captions that do not."""
    return (F.softplus(-fits) + F.softplus(misses)).mean() / 2


def captioning_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next tokens (B, L), -100 = padding, under logits (B, L, V)."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=-100)


class Pretraining(nn.Module):
    """The three losses as one forward, so that processes share its gradients."""

    def __init__(self, scorer: ImageReward, temperature: float) -> None:
        super().__init__()
        self.scorer, self.temperature = scorer, temperature

    def forward(
        self, pixels: Tensor, captions: list[str], misses: list[str | None]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the losses, and the share of images whose caption beats its near miss."""
        scorer = self.scorer
        tokens = scorer.image_tokens(pixels)
        images = F.normalize(scorer.vision_proj(tokens[:, 0]), dim=1)
        texts = scorer.text_embedding(captions)
        wrong = negatives(misses, images, texts, captions)
        near = (images * scorer.text_embedding(wrong)).sum(1) / self.temperature
        read = scorer.read(captions + wrong, torch.cat([tokens, tokens]), pixels.device)
        fit, miss = apply_head(scorer.mlp, read).chunk(2)
        losses = {
            "contrast": by_row_and_column(images @ texts.T / self.temperature, own(near, misses)),
            "matching": matching_loss(fit, miss),
            "captioning": captioning_loss(*scorer.next_tokens(captions, tokens)),
        }
        return losses, (fit > miss).float().mean()


class Contrast(nn.Module):
    """CLIP's loss as one forward, so that processes share its gradients."""

    def __init__(self, scorer: ClipScorer) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(
        self, pixels: Tensor, captions: list[str], misses: list[str | None]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the loss, and the share of images whose caption beats its near miss."""
        scorer = self.scorer
        scale, images, texts = scorer.logit_scale.exp(), scorer.vision(pixels), scorer.texts(captions)
        logits = scale * images @ texts.T
        near = scale * (images * scorer.texts(negatives(misses, images, texts, captions))).sum(1)
        loss = by_row_and_column(logits, own(near, misses))
        return {"contrast": loss}, (logits.diagonal() > near).float().mean()


def own(near: Tensor, misses: Sequence[str | None]) -> Tensor:
    """Return the logits (B,) of images with their near misses, -inf where an image has none of its own.

    Of scaled logits: a scale that is learned would have the gradient 0 x inf otherwise.
    """
    absent = upload(torch.tensor([miss is None for miss in misses]), near.device)
    return near.masked_fill(absent, -torch.inf)


def negatives(
    misses: Sequence[str | None], images: Tensor, texts: Tensor, captions: Sequence[str]
) -> list[str]:
    """Return a wrong caption for each image: its near miss, or else the most similar other one in the batch."""
    return [
        miss or captions[other] for miss, other in zip(misses, hardest(images, texts, captions), strict=True)
    ]


@torch.no_grad()
def hardest(images: Tensor, texts: Tensor, captions: Sequence[str]) -> list[int]:
    """Return for each image the row of the most similar caption with other words than its own."""
    same = upload(torch.tensor([[one == other for other in captions] for one in captions]), images.device)
    return (images @ texts.T).masked_fill(same, -torch.inf).argmax(1).tolist()


def check_start(config: Config) -> None:
    """Raise ValueError where a file is missing or a scorer is of another architecture; reads no weights."""
    if config.image_tower is not None:
        check_trainable(str(config.image_tower))
        if rewards.find_card(str(config.image_tower)).clip is None:
            raise ValueError(f"--image-tower {config.image_tower} is no CLIP")
    if config.model is not None:
        check_trainable(str(config.model))
        kind = "imagereward" if rewards.find_card(str(config.model)).clip is None else "clip"
        if kind != config.architecture:
            raise ValueError(
                f"--model {config.model} is of --architecture {kind}, got --architecture {config.architecture}"
            )
    elif config.vocab is not None and not config.vocab.is_file():
        raise ValueError(
            f"--vocab: there is no file {config.vocab}; python assets/tiny/vocab.py writes the tiny ImageReward's, and"
            " the tiny CLIP's is assets/tiny/pipeline/tokenizer/tokenizer.json"
        )


def build(config: Config) -> ClipScorer | ImageReward:
    """Return the scorer to train."""
    if config.model is not None:
        return cast(ClipScorer | ImageReward, load_trainable(str(config.model)))
    assert config.vocab is not None
    return (build_clip if config.architecture == "clip" else build_imagereward)(config, config.vocab)


def build_clip(config: Config, vocab: Path) -> ClipScorer:
    """Return the CLIP with random weights."""
    sizes = config.sizes
    clip = Clip(
        embed=EMBED,
        vision_width=sizes.width,
        vision_layers=sizes.vision_layers,
        vision_heads=sizes.width // 32,
        patch=sizes.patch,
        text_width=sizes.width,
        text_layers=sizes.text_layers,
        text_heads=sizes.width // 32,
        activation="gelu",
        tokenizer="transformers",
        context=sizes.max_length,
        vocab_size=vocab_size(vocab),
    )
    card = clip_card("random weights", clip, Preprocess(size=sizes.image))
    return ClipScorer.build(card, vocab, config.run.seed, config.temperature)


def build_imagereward(config: Config, vocab: Path) -> ImageReward:
    """Return the ImageReward with random weights, but for an image tower that is given."""
    sizes = config.sizes
    layout = ImageRewardConfig(
        image_size=sizes.image,
        patch_size=sizes.patch,
        vision_width=sizes.width,
        vision_layers=sizes.vision_layers,
        vision_heads=sizes.width // 32,
        vocab_size=len(vocab.read_text().split()) + 2,
        max_positions=sizes.max_length,
        max_length=sizes.max_length,
        text_width=sizes.width,
        text_layers=sizes.text_layers,
        text_heads=sizes.width // 32,
        text_intermediate=4 * sizes.width,
        text_dropout=0.0,
        projection=EMBED,
        head=sizes.head,
        head_dropout=(0.0, 0.0, 0.0),
        mean=0.0,
        std=1.0,
    )
    scorer = ImageReward.build(layout, vocab, config.run.seed)
    if config.image_tower is not None:
        take_image_tower(scorer, cast(ClipScorer, load_trainable(str(config.image_tower))))
    return scorer


@one_writer
def main(config: Config) -> int:
    """Train and save the scorer."""
    with exit_on_user_error():
        check(config.run)
        rate = FROM_SCRATCH["pretrain_scorer"]
        config = filled(config, of_run(rate), "pretrain_scorer")
        check_start(config)
        samples, skipped = data.read(config.data, config.columns)
        settings = data.as_setting(skipped)
        run = Run(config.run, driver="pretrain_scorer", config_text=dump(config), settings=settings)
        scorer = build(config)
        losses_of = (
            Contrast(scorer) if isinstance(scorer, ClipScorer) else Pretraining(scorer, config.temperature)
        )
        module = run.prepare(losses_of, learning_rate=rate)

    if run.is_main:
        data.write_report(run.folder, skipped)

    def write(folder: Path) -> None:
        with run.ema_weights():
            scorer.save(folder / "scorer")

    paths = [sample.path for sample in samples]
    assert scorer.card.preprocess is not None
    size = scorer.card.preprocess.size
    with images_ahead(run, paths, Resolution(size, size)) as load:
        for step in run.steps():
            for micro_batch in run.passes():
                indices = run.image_indices(step, micro_batch)
                rows = items_at(samples, indices, config.run.seed)
                misses = [near_miss(row, run.generator(i)) for row, i in zip(rows, indices, strict=True)]
                with run.accumulate():
                    pixels = load([row.path for row in rows])
                    losses, right = module(pixels, [row.text for row in rows], misses)
                    run.update(sum(losses.values()), **losses, matched=right)
            if isinstance(scorer, ClipScorer):
                clamp_scale(scorer.logit_scale)
            if run.due("checkpointing_steps", step):
                run.save(step, write=write)
    if run.is_main and not run.interrupted:
        write(run.folder)
        show(f"scorer and metrics: {run.folder}")
    return run.finish()


def near_miss(row: CaptionedImage, generator: torch.Generator) -> str | None:
    """Return one of the row's near misses, or None where it has none."""
    misses = row.extra.get("near_misses", [])
    return misses[int(torch.randint(len(misses), (), generator=generator))] if misses else None


if __name__ == "__main__":
    sys.exit(main(CONFIG))

r"""Fine-tune on pairs of images of which people prefer one, without a reward model and without sampling: Diffusion-DPO
(Wallace et al. 2023, arXiv 2311.12908) and its relatives.

| `--loss` | loss of a pair | from |
|---|---|---|
| `dpo` (default) | -log p, p = sigmoid(margin) | Diffusion-DPO, eq. 14 |
| `dpo --poly-alpha A` | -log p + A (1 - p) | Poly-DPO (ViPO, arXiv 2604.24953): 8 for noisy labels, below 0 for easy pairs |
| `ipo` | (margin - 1/2)^2 | IPO (arXiv 2310.12036), eq. 17 |
| `mapo` | error of the preferred image, and its odds against the other | MaPO (arXiv 2406.06424), without a reference |

margin = beta / 2 ((m_l - m_l_ref) - (m_w - m_w_ref)): m is the denoising error, the mean over all elements, of the preferred (w) and the
other image (l), both with the same noise at the same timestep; _ref is the model before tuning, which is the LoRA switched off, or with
--train full a second, frozen model.

    python finetune/dpo.py --model SD_FOLDER --data data/pickapic --output-dir runs/dpo
    python finetune/dpo.py --model SD_FOLDER --data images --raters hpsv2.1 imagereward pickscore --labels majority

The first command reads rankings (`preftune preferences` writes them of published data), the second captioned images with scores
(`preftune score --add-to-metadata`). Judge a run by `implicit_accuracy` and images: the loss of a good one falls from .69 to .66. If `error`
grows far above `reference_error`, both images become unlikely: lower the learning rate. Left out: mirrored images ("left of" becomes
wrong; the released script mirrors each image of a pair by itself), Adafactor. Hardware: Stable Diffusion 1.x at 512 px needs a GPU.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from preftune.cli import dump, exit_on_user_error, parse
from preftune.cli.given_once import check_given_once
from preftune.training.cache_config import CacheConfig
from preftune.training.config import ModelConfig, RewardConfig, ValidationConfig, check_dropout
from preftune.training.defaults import of_model
from preftune.training.run_config import RunConfig

BETAS = {"dpo": 5000.0, "ipo": 5000.0, "mapo": 0.1}
"""Loss -> beta: Diffusion-DPO, section 5.1, for both models; the same for IPO; MaPO's released script."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a model on pairs of images of which one is preferred. An image of --train-batch-size is a pair here."""

    data: tuple[Path, ...]
    """Folders with rankings.jsonl (prompt, generations, ranking), or of captioned images whose table has columns of scores."""
    raters: tuple[str, ...] = ()
    """Whose rankings count, by their `source`, and which columns of scores order captioned images; empty = all rankings."""
    labels: Literal["each", "majority", "soft"] = "each"
    """Several raters of two images: each gives a pair, their majority gives one, or one has the share of raters as a soft label."""
    ties: Literal["drop", "half"] = "drop"
    """Pairs that are ties: left out, or half a preference each way."""
    loss: Literal["dpo", "ipo", "mapo"] = "dpo"
    """Diffusion-DPO or, with --poly-alpha, Poly-DPO; IPO, whose margin has a target; MaPO, which has no reference."""
    beta: float | None = None
    """How hard a margin counts, and how near the model stays to the reference; of mapo the weight of its odds. None = 5000, of mapo 0.1."""
    poly_alpha: float = 0.0
    """Poly-DPO's alpha, -1 or more: 8 was best on noisy labels; 0 = Diffusion-DPO."""
    fixed_noise: int = 0
    """Give each pair so many timesteps and noises, in turn, and work out their reference errors once; 0 = new ones each time."""
    caption_dropout: float = 0.2
    """Share of pairs with an empty caption, in [0, 1); 0.2 in Diffusion-DPO's script."""
    validation_share: float = 0.0
    """Share of prompts whose pairs are held out, to measure `validation_accuracy` every --validation-steps; in [0, 1)."""
    cache: Annotated[CacheConfig, tyro.conf.arg(name="")] = field(default_factory=CacheConfig)
    model: Annotated[ModelConfig, tyro.conf.arg(name="")]
    reward: Annotated[RewardConfig, tyro.conf.arg(name="")] = field(default_factory=RewardConfig)
    validation: Annotated[ValidationConfig, tyro.conf.arg(name="")] = field(default_factory=ValidationConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(output_dir=Path("runs/dpo"), max_train_steps=2000)
    )

    def __post_init__(self) -> None:
        check_given_once("--data", self.data, "folder", "its pairs would count twice")
        if len(set(self.raters)) < len(self.raters):
            twice = max(self.raters, key=self.raters.count)
            raise ValueError(f"--raters names {twice} twice; its pairs would count twice")
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise ValueError(f"--beta must be above 0 and finite, got {self.beta}")
        if not -1 <= self.poly_alpha < math.inf:
            raise ValueError(
                f"--poly-alpha must be -1 or more and finite, got {self.poly_alpha}: below, pairs that are right would be unlearnt"
            )
        if self.poly_alpha and self.loss != "dpo":
            raise ValueError(f"--poly-alpha {self.poly_alpha:g} is for --loss dpo, not {self.loss}")
        if self.fixed_noise < 0:
            raise ValueError(f"--fixed-noise must be 0 or more, got {self.fixed_noise}")
        if self.fixed_noise and self.loss == "mapo":
            raise ValueError(
                "--fixed-noise saves passes of the reference, which --loss mapo has not; leave it out"
            )
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"--validation-share must lie in [0, 1), got {self.validation_share}")
        check_dropout(self.caption_dropout)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(
        Config,
        needs="--data is what `preftune preferences --layout pickapic --input FILES --output-dir data/pickapic` makes of published preferences",
    )

import torch
from torch import Generator, Tensor

from preftune.captioned_inputs import CaptionedInputs
from preftune.diffusion_loss import diffusion_loss
from preftune.families.base import Cond, Family
from preftune.files.one_writer import one_writer
from preftune.order import items_at
from preftune.records import CaptionedImage
from preftune.training import labelled_pairs, rankings, workspace
from preftune.training.before_tuning import BeforeTuning
from preftune.training.dpo_losses import (
    agreement,
    dpo_losses,
    implicit_margins,
    ipo_losses,
    labelled,
    mapo_losses,
)
from preftune.training.labelled_pairs import Pair
from preftune.training.run import Run
from preftune.training.workspace import Workspace
from rewards.on_device import upload

Draw = Callable[[int], list[Generator]]
"""From a stream to fresh generators of N pairs: 0 for timestep and noise, 1 and 2 for the latents of the first and second images."""
HELD_OUT = 3
"""What is added to the streams of held-out pairs."""


def drawing(run: Run, places: Sequence[int], first: int = 0) -> Draw:
    """Return the generators of pairs, which are functions of their places."""
    return lambda stream: [run.generator(place, first + stream) for place in places]


def losses_of(
    errors: Tensor, reference: Tensor | None, labels: Tensor, config: Config, num_train_timesteps: int
) -> tuple[Tensor, Tensor]:
    """Return losses (N,) and what the model prefers the first image by, (N,), of the errors (2, N) of the images of N pairs.

    `reference` are those of the model before tuning, (2, N); None with --loss mapo. labels (N,): share of raters for the first.
    """
    assert config.beta is not None, "main fills it"
    if config.loss == "mapo":
        one = partial(mapo_losses, weight=config.beta, num_train_timesteps=num_train_timesteps)
        return labelled(one(*errors), one(*errors.flip(0)), labels), errors[1] - errors[0]
    assert reference is not None
    margins = implicit_margins(errors, reference, config.beta)
    if config.loss == "ipo":
        return labelled(ipo_losses(margins), ipo_losses(-margins), labels), margins
    alpha = config.poly_alpha
    return labelled(dpo_losses(margins, alpha), dpo_losses(-margins, alpha), labels), margins


def inputs_of(
    inputs: CaptionedInputs, pairs: Sequence[Pair], draw: Draw, caption_dropout: float, stream: int = 0
) -> tuple[Tensor, Cond]:
    """Return latents (2 N, C, h, w), the preferred images first, and encoded captions with each image's own size."""
    first, second = draw(1), draw(2)
    kept = [float(torch.rand((), generator=generator)) >= caption_dropout for generator in first]
    texts = [pair.prompt if keep else "" for pair, keep in zip(pairs, kept, strict=True)]
    preferred, framings = inputs.latents([pair.first for pair in pairs], first, stream)
    other, more = inputs.latents([pair.second for pair in pairs], second, stream + 1)
    cond = inputs.cond(texts, framings)
    twice = {name: torch.cat([value, value]) for name, value in cond.positive.items()}
    cond = inputs.family.framed(Cond(positive=twice, negative=cond.negative), framings + more)
    return torch.cat([preferred, other]), cond


def errors_of(family: Family, x0: Tensor, cond: Cond, draw: Draw) -> Tensor:
    """Return the denoising errors (2, N) of the images of N pairs, with one timestep and one noise for both of a pair."""
    generators = [*draw(0), *draw(0)]
    return diffusion_loss(family, lambda x, t: family.predict(x, t, cond).output, x0, generators).view(2, -1)


class Reference:
    """The errors of the model before tuning; with --fixed-noise each is worked out once, and kept in checkpoints."""

    def __init__(self, w: Workspace, config: Config, number: int) -> None:
        self.run, self.family = w.run, w.family
        self.before = None if config.loss == "mapo" else BeforeTuning(w)
        unknown = torch.full((number * config.fixed_noise, 2), torch.nan)
        self.known: Tensor = w.run.resumed_state.get("reference_errors", unknown)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {"reference_errors": self.known} if len(self.known) else {}

    @torch.no_grad()
    def errors(self, x0: Tensor, cond: Cond, draw: Draw) -> Tensor | None:
        """Return `errors_of` of the model before tuning; None where the loss has no reference."""
        if self.before is None:
            return None
        with self.before():
            return errors_of(self.family, x0, cond, draw)

    def errors_once(self, x0: Tensor, cond: Cond, draw: Draw, places: Sequence[int]) -> Tensor | None:
        """Return `errors`, those of fixed noise from the table where they are known; what one process finds, all learn."""
        if not len(self.known):
            return self.errors(x0, cond, draw)
        complete = not self.known.isnan().any()  # the same on all processes
        mine = self.known[[*places]].T
        found = self.errors(x0, cond, draw) if mine.isnan().any() else upload(mine, x0.device)
        assert found is not None, "mapo has no fixed noise"
        if not complete:
            rows = torch.cat([torch.tensor(places)[:, None], found.T.cpu()], 1).double()
            table = self.run.gather(upload(rows, x0.device)).cpu()
            self.known[table[:, 0].long()] = table[:, 1:].float()
        return found


@torch.no_grad()
def validate(w: Workspace, reference: Reference, held: Sequence[Pair], config: Config) -> dict[str, float]:
    """Return the mean loss and implicit accuracy on held-out pairs, each with a timestep and noise that stay the same."""
    run, number = w.run, w.run.config.train_batch_size
    own, totals = range(run.rank, len(held), run.world), torch.zeros(2, dtype=torch.float64)
    with run.ema_weights():
        for start in range(0, len(own), number):
            places = own[start : start + number]
            draw = drawing(run, places, HELD_OUT)
            pairs = [held[place] for place in places]
            x0, cond = inputs_of(w.inputs, pairs, draw, 0.0, HELD_OUT)
            before = reference.errors(x0, cond, draw)
            labels = upload(torch.tensor([pair.label for pair in pairs]), x0.device)
            errors, levels = errors_of(w.family, x0, cond, draw), w.family.defaults.num_train_timesteps
            losses, margins = losses_of(errors, before, labels, config, levels)
            totals += torch.stack([losses.sum(), agreement(margins, labels).sum()]).double().cpu()
    loss, accuracy = (run.gather(upload(totals[None], run.device)).sum(0) / len(held)).tolist()
    return {"validation_loss": loss, "validation_accuracy": accuracy}


def metrics_of(errors: Tensor, reference: Tensor | None, margins: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return what is logged of a pass: how far the model, and the reference, tell the images apart, and their mean errors."""
    found: dict[str, Any] = {"implicit_accuracy": agreement(margins, labels).mean()}
    for name, both in {"": errors, "reference_": reference}.items():
        if both is not None:
            found |= {f"{name}margin": (both[1] - both[0]).mean(), f"{name}error": both.mean()}
    return found


@one_writer
def main(config: Config) -> int:
    """Tune, validate and save."""
    groups = config.model, config.reward, config.validation, config.run
    with exit_on_user_error():
        labelled_pairs.check(config.data, config.raters)
        named = config.validation.named()
        defaults = workspace.check(*groups)
        config = of_model(config, "dpo", defaults, {"beta": BETAS[config.loss]})
        groups = config.model, config.reward, config.validation, config.run
        ranked, skipped = labelled_pairs.read(config.data, config.raters)
        pairs, equal = labelled_pairs.label(ranked, config.labels, config.ties)
        held = list[Pair]()
        if config.validation_share:
            pairs, held = rankings.split(pairs, config.validation_share, config.run.seed)
        prompts = named or config.validation.first([pair.prompt for pair in held + pairs])
    with workspace.open(
        *groups, driver="dpo", config_text=dump(config), prompts=prompts, skipped=skipped + equal, cache=config.cache
    ) as w:  # fmt: skip
        run, reference = w.run, Reference(w, config, len(pairs))
        for stream, side in enumerate(("first", "second")):
            images = [CaptionedImage(path=getattr(pair, side), text=pair.prompt, extra={}) for pair in pairs]
            w.decode_ahead(images, stream)
        for step in run.steps():
            for micro_batch in run.passes():
                indices = run.image_indices(step, micro_batch)
                rows = items_at(range(len(pairs)), indices, config.run.seed)
                chosen = [pairs[row] for row in rows]
                places = places_of(rows, indices, len(pairs), config.fixed_noise)
                draw = drawing(run, places)
                with run.accumulate():
                    x0, cond = inputs_of(w.inputs, chosen, draw, config.caption_dropout)
                    before = reference.errors_once(x0, cond, draw, places)
                    errors = errors_of(w.family, x0, cond, draw)
                    labels, weights = upload(
                        torch.tensor([[pair.label, pair.weight] for pair in chosen]).T, x0.device
                    )
                    losses, margins = losses_of(errors, before, labels, config, defaults.num_train_timesteps)
                    noted = metrics_of(errors.detach(), before, margins.detach(), labels)
                    run.update((weights * losses).mean(), **noted)
            if held and run.due("validation_steps", step):
                run.log(step, **validate(w, reference, held, config))
            w.after(step, state=reference.state())
        return w.finish()


def places_of(rows: Sequence[int], indices: Sequence[int], number: int, fixed_noise: int) -> list[int]:
    """Return what the random numbers of pairs are functions of: the index in the run, or with --fixed-noise the pair's row of
    `number`, and which of its noises has its turn in this epoch.
    """
    if not fixed_noise:
        return list(indices)
    turns = [index // number % fixed_noise for index in indices]
    return [row * fixed_noise + turn for row, turn in zip(rows, turns, strict=True)]


if __name__ == "__main__":
    sys.exit(main(CONFIG))

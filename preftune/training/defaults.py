"""Defaults that depend on the program, the model and what is trained, in one table, each with its source.

A flag that is left out is None in the configuration until the model is known; `filled` then puts the value of this table there. The
program says in one line which values these are, and config.yaml has them as if they had been typed. A run that resumes takes
what is left out from the run itself, so that it does not change where this table has.

A LoRA changes a weight by at most about lr x updates / sqrt(rank): AdamW moves each element of B by about lr, and A has standard
deviation 1 / rank. For 400 updates at 1e-4 and rank 4 that is 0.02, where the weights of Stable Diffusion's attention are about 0.03; for
100 updates at 1e-5 it is 0.0005, next to nothing. Measured in 12 updates of ReFL on the embedded model: 0.35 of it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

from preftune.cli.notes import say
from preftune.families.base import Defaults
from preftune.files import manifest
from preftune.training.config import ModelConfig
from preftune.training.run_config import RunConfig, forced_to_cpu

Precision = Literal["no", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Peak learning rates of AdamW."""

    lora: float
    full: float


RATES: Mapping[str, Mapping[str, Rates]] = {
    # LoRA: ImageReward's ReFL_SDXL_LoRA.py (1e-4, rank 4); TRL's and AlignProp's LoRA of the same kind have 1e-3 for some 25 updates of
    # 128 images, DDPO's 3e-4. Full: the paper, section 4.2, and train_refl.sh (1e-5); train_refl_sdxl.sh (1e-5).
    "refl": {"sd": Rates(lora=1e-4, full=1e-5), "sdxl": Rates(lora=1e-4, full=1e-5)},
    # LoRA: NeMo-Aligner's DRaFT+, draftp_sd.yaml (1e-4 at K = 1, rank 32) and its guide for SDXL (2.5e-4); AlignProp's released 1e-3 is for
    # rank 4 and 128 images an update, and lost the embedded model when all steps were live. Full: ours, as FlowBP's DRaFT-LV (1e-5).
    "draft": {"sd": Rates(lora=1e-4, full=1e-5), "sdxl": Rates(lora=2.5e-4, full=1e-5)},
    # Full: FlowBP's released configurations of both (1e-5, of Stable Diffusion 3.5). LoRA: ours, as draft.
    "drtune": {"sd": Rates(lora=1e-4, full=1e-5), "sdxl": Rates(lora=1e-4, full=1e-5)},
    "flowbp": {"sd": Rates(lora=1e-4, full=1e-5), "sdxl": Rates(lora=1e-4, full=1e-5)},
    # LoRA: DDPO's config/base.py (3e-4, rank 4). Full: its maintainer's advice and DanceGRPO's script for Stable Diffusion (1e-5); 3e-4 turns
    # all weights black within tens of steps. SDXL: ours, the same.
    "ddpo": {"sd": Rates(lora=3e-4, full=1e-5), "sdxl": Rates(lora=3e-4, full=1e-5)},
    # diffusers' examples/text_to_image: README.md (LoRA 1e-4, full 1e-5), README_sdxl.md (LoRA 1e-4, full 1e-6).
    "pretrain": {"sd": Rates(lora=1e-4, full=1e-5), "sdxl": Rates(lora=1e-4, full=1e-6)},
    # Full: ImageReward, appendix E (1e-5). LoRA, and SDXL: the loss is that of pretrain, so are the rates. LMFlow's notebook has 9e-6 for
    # a LoRA and 80 updates an iteration, which is next to nothing.
    "raft": {"sd": Rates(lora=1e-4, full=1e-5), "sdxl": Rates(lora=1e-4, full=1e-6)},
    # Full: ImageReward, appendix E, and reward-weighted regression of ddpo (1e-5). LoRA, and SDXL: as pretrain.
    "reward_weighted": {"sd": Rates(lora=1e-4, full=1e-5), "sdxl": Rates(lora=1e-4, full=1e-6)},
    # LoRA: the released configurations of both for Stable Diffusion 3.5 (3e-4 at rank 32). Full: ours, as raft.
    "awm": {"sd": Rates(lora=3e-4, full=1e-5), "sdxl": Rates(lora=3e-4, full=1e-6)},
    "nft": {"sd": Rates(lora=3e-4, full=1e-5), "sdxl": Rates(lora=3e-4, full=1e-6)},
    # LoRA: README of diffusers' research_projects/diffusion_dpo (1e-5, rank 8). Full: ours; Diffusion-DPO has 1e-8 for each pair of an
    # update, so 2e-5 for its 2,048 and 8e-8 for 8.
    "dpo": {"sd": Rates(lora=1e-5, full=1e-6), "sdxl": Rates(lora=1e-5, full=1e-6)},
    # LoRA: HPS, section 6, and train_lora.sh (1e-5), for 10,000 updates of 40 images. Full: ours, as pretrain.
    "weird_lora": {"sd": Rates(lora=1e-5, full=1e-5), "sdxl": Rates(lora=1e-5, full=1e-6)},
}
"""Program -> family -> rates. Models distilled to a few steps have those of their family."""

SCORER_RATES = {
    "imagereward": 1e-5,  # ImageReward, section 4.1, and its config.yaml
    "clip": 3e-6,  # PickScore (3e-6), HPS v2 (3.3e-6); Stable Preference has 2e-6, HPS v1 1.7e-5 for a single epoch
}
"""Architecture of a scorer that is trained on preferences -> rate."""

FROM_SCRATCH = {
    "autoencoder": 2e-3,  # ours: configs/autoencoder/tiny.yaml, the only size that was trained
    "pretrain_scorer": 1e-3,  # ours: configs/pretrain_scorer/tiny.yaml; CLIP has 5e-4 and BLIP 3e-4 for models 100 times larger
}
"""Program that trains a new network -> rate."""


def learning_rate(program: str, model: Defaults, train: Literal["lora", "full"]) -> float:
    """Return the peak learning rate of a program on a model."""
    rates = RATES[program][model.family]
    return rates.lora if train == "lora" else rates.full


def refl(
    model: Defaults, *, num_inference_steps: int | None, pretraining: str | None, data: bool
) -> dict[str, object]:
    """Return the defaults of ReFL's own flags: the trajectory, and how the losses are weighed.

    T = 40 and DDPM's solver are the paper's and the released script's; a distilled model has its own few steps. The window is the last
    quarter of the steps, two at least: 30..39 of 40, as published. lambda is published as 1e-3. It weighs the reward against the
    pre-training loss; without that loss AdamW divides it out, and all that it does is to bring gradients near to AdamW's epsilon of 1e-8 (at
    norm 1e-3 the 860 M weights of Stable Diffusion have gradients of 3e-8) and to keep them from being clipped. On the embedded model, in 12
    updates, 1e-3 halves the way of a LoRA's A and takes 10 % from that of all weights. So it is 1 there. The released script has no pre-training loss, the paper has; here it depends on whether there are data for it.
    """
    steps = num_inference_steps or (model.num_inference_steps if model.distilled else 40)
    mode = pretraining or ("alternate" if data else "off")
    return {
        "num_inference_steps": steps,
        "window": (max(0, min(3 * steps // 4, steps - 2)), steps - 1),
        "solver": "euler" if model.distilled else "ddpm",
        "pretraining": mode,
        "reward_scale": 1.0 if mode == "off" else 1e-3,
    }


DIRECT: Mapping[str, tuple[int, float, str]] = {
    # DRaFT, section 5 (50 steps, 7.5); both predictions of guidance, as AlignProp's released code and NeMo-Aligner's.
    "draft": (50, 7.5, "both"),
    # FlowBP's released configurations for Stable Diffusion 3.5 (25 steps, the negative prompt without gradient); its guidance of 3.5 is of that
    # model, 7.5 is that of Stable Diffusion 1.x.
    "drtune": (25, 7.5, "positive"),
    "flowbp": (25, 7.5, "positive"),
}
"""Program that follows a gradient through several steps -> its steps, guidance scale and gradient of guidance."""


def direct(program: str, model: Defaults) -> dict[str, object]:
    """Return the defaults of `DirectConfig`'s flags; a distilled model has its own few steps, without guidance."""
    steps, guidance, gradient = DIRECT[program]
    return {
        "direct.num_inference_steps": model.num_inference_steps if model.distilled else steps,
        "direct.solver": "euler" if model.distilled else "ddim",
        "direct.guidance_scale": model.guidance_scale
        if model.distilled
        else min(guidance, model.guidance_scale),
        "direct.guidance_gradient": gradient,
    }


def policy(model: Defaults) -> dict[str, object]:
    """Return the defaults of the trajectory of policy gradients: DDPO's 50 steps and guidance 5, of a distilled model its own."""
    return {
        "policy.num_inference_steps": model.num_inference_steps if model.distilled else 50,
        "policy.guidance_scale": model.guidance_scale if model.distilled else min(5.0, model.guidance_scale),
    }


def precision(capability: tuple[int, int] | None) -> Precision:
    """Return the precision that suits a CUDA device of this compute capability, None = another device or a CPU.

    bf16 since Ampere (8.0), where it has tensor cores; fp16 with a loss scale before. SDXL's autoencoder stays in float32 in fp16.
    """
    if capability is None:
        return "no"
    return "bf16" if capability >= (8, 0) else "fp16"


def here() -> Precision:
    """Return the precision that suits this machine; on a GPU the one that `accelerate launch` or its configuration names, if any."""
    import torch

    if forced_to_cpu() or not torch.cuda.is_available():
        return "no"
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # "no" is also what it says when nobody chose
    if launched in ("fp16", "bf16"):
        return cast(Precision, launched)
    return precision(torch.cuda.get_device_capability())


class _HasRun(Protocol):
    @property
    def run(self) -> RunConfig: ...


class _HasModel(_HasRun, Protocol):
    @property
    def model(self) -> ModelConfig: ...


C = TypeVar("C", bound=_HasRun)
M = TypeVar("M", bound=_HasModel)


def of_model(config: M, program: str, model: Defaults, own: Mapping[str, object] | None = None) -> M:
    """Return the configuration of a program that tunes this model, with its defaults in place of None; `own` are of its own flags."""
    train = config.model.train
    values = of_run(learning_rate(program, model, train)) | dict(own or {})
    weights = "all weights" if train == "full" else "a LoRA"
    return filled(
        config, values, f"{program} for {weights} of {model.family}{' (distilled)' * model.distilled}"
    )


def of_run(rate: float) -> dict[str, object]:
    """Return the defaults of the flags that all programs share."""
    return {"run.learning_rate": rate, "run.mixed_precision": here()}


def filled(config: C, values: Mapping[str, object], about: str) -> C:
    """Return the configuration with these values, by attribute as `run.learning_rate`, where it has None; say which in one line.

    A run that resumes has its own values instead, as far as its checkpoint notes them. `about`: whose defaults they are.
    """
    earlier = earlier_flags(config.run)
    taken: dict[str, str] = {}
    again: dict[str, str] = {}
    for path, value in values.items():
        if _value(config, path) is not None:
            continue
        name = path.removeprefix("run.").removeprefix("direct.").removeprefix("policy.")
        own = earlier.get(name)
        kept = tuple(own) if isinstance(own, list) else own
        config = _with(config, path, value if kept is None else kept)
        (taken if kept is None else again)[name] = _words(_value(config, path))
    for words, flags in ((f"defaults of {about}", taken), ("as the run that goes on", again)):
        if flags:
            listed = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
            say(f"{words}: {listed}")
    return config


def earlier_flags(run: RunConfig) -> Mapping[str, Any]:
    """Return the flags of the run that is resumed, as its newest checkpoint notes them; nothing where there is none."""
    if run.resume_from_checkpoint is None:
        return {}
    if not isinstance(run.resume_from_checkpoint, str):
        return _noted([run.resume_from_checkpoint])
    from preftune.training import checkpoint  # imports torch

    return _noted(checkpoint.find_checkpoints(run.output_dir))


def _noted(checkpoints: Sequence[Path]) -> Mapping[str, Any]:
    """The flags in the last checkpoint that can be read: `Run` refuses another or sets it aside."""
    for folder in reversed(checkpoints):
        try:
            flags = json.loads((folder / manifest.FILE).read_text(encoding="utf-8"))["run"]["flags"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
        if isinstance(flags, dict):
            return flags
    return {}


def _value(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _with(config: Any, path: str, value: object) -> Any:
    first, _, rest = path.partition(".")
    return replace(config, **{first: _with(getattr(config, first), rest, value) if rest else value})


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)

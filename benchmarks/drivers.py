"""What the drivers load at real size, their updates and their validation images: on fake tensors, or with random weights.

Within FakeTensorMode nothing has content; outside it, the same functions make and train real models on the CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import models, sdxl
from benchmarks.setting import DIRECT, FORWARD, REFERENCED, SCORED, Setting
from finetune import awm, ddpo, dpo, draft, drtune, flowbp, nft, refl
from preftune import paths, surrogates
from preftune.captioned_inputs import CaptionedInputs
from preftune.diffusion_loss import captioned_loss, noised
from preftune.families import Pretrained, tiny
from preftune.families.sd import SD
from preftune.families.sdxl import SDXL
from preftune.lora.config import LoRA
from preftune.paths import Grid
from preftune.sampling import Sampling, sample
from preftune.training import defaults, direct
from preftune.training.config import ModelConfig, RewardConfig
from preftune.training.direct_config import DirectConfig
from preftune.training.labelled_pairs import Pair
from preftune.training.optimizer import EMA, adamw
from preftune.training.policies import distance
from preftune.training.policy_config import PolicyConfig
from preftune.training.policy_rollouts import Pairs
from preftune.training.run_config import RunConfig
from preftune.training.weight_copy import WeightCopy
from preftune.training.workspace import DTYPES
from rewards.imagereward import FULL_SIZE, VOCAB, ImageReward

VALIDATION_STEPS = 2
"""Of `validate`, in place of the model's number."""
PROMPT = "a red fox in the snow, digital art"


@dataclass(kw_only=True)
class Loaded:
    """What a driver holds in memory."""

    setting: Setting
    family: Any
    scorer: ImageReward | None
    """Of the methods that have one."""
    second: nn.Module | None = None
    """The model before tuning, of the methods that ask it, where all weights are trained."""
    earlier: WeightCopy | None = None
    """The policy that generated the images, of the methods that hold one."""
    grid: Grid | None = None
    """Of the methods whose gradient reaches several steps, made while the noise schedule has numbers."""

    def prompts(self, number: int) -> tuple[list[str], list[torch.Generator]]:
        """Return prompts and generators of so many images."""
        return [PROMPT] * number, [torch.Generator().manual_seed(i) for i in range(number)]


def build(setting: Setting) -> Loaded:
    """Return the models at real size, opened for training, with parts on the meta device."""
    parts: dict[str, Any] = {"tokenizer": models.tokenizer(), "scheduler_config": tiny.SCHEDULER_CONFIG}
    with torch.device("meta"):
        if setting.model == "sd1":
            parts |= {
                "unet": models.unet(), "vae": models.autoencoder(), "text_encoder": models.text_encoder(),
            }  # fmt: skip
        else:
            parts |= {
                "unet": sdxl.unet(), "vae": sdxl.autoencoder(), "text_encoder": sdxl.text_encoder(),
                "text_encoder_2": sdxl.text_encoder_2(), "tokenizer_2": parts["tokenizer"],
            }  # fmt: skip
        scorer = None
        if setting.method in SCORED:
            scorer = ImageReward(FULL_SIZE, VOCAB.read_text(encoding="utf-8"))
            scorer.eval().requires_grad_(False)
    family: SD | SDXL = SD(**parts) if setting.model == "sd1" else SDXL(**parts)
    family.trainable(LoRA(rank=setting.rank) if setting.train == "lora" else None, 0)
    again = setting.checkpointed()
    family.set_speed("sdpa", gradient_checkpointing=again, vae_checkpointing=again)
    second = None
    if setting.method in REFERENCED and setting.train == "full":
        with torch.device("meta"):
            second = (models.unet() if setting.model == "sd1" else sdxl.unet()).requires_grad_(False).eval()
    loaded = Loaded(setting=setting, family=family, scorer=scorer, second=second)
    if setting.method in DIRECT:
        known = direct.filled(direct_settings(loaded))
        loaded.grid = paths.grid(family, known.num_inference_steps, known.solver, setting.size())
    return loaded


def direct_settings(loaded: Loaded) -> DirectConfig:
    """Return the flags of a method whose gradient reaches several steps, with their defaults."""
    own = defaults.direct(loaded.setting.method, loaded.family.defaults)
    return DirectConfig(**{name.removeprefix("direct."): value for name, value in own.items()})  # type: ignore[arg-type]


def load(loaded: Loaded, call_checkpointing: bool = True) -> None:
    """Give what was built its tensors on the CPU, as a driver does: scorer first, then the model in float32, then cast where it is frozen."""
    setting, family = loaded.setting, loaded.family
    if loaded.scorer is not None:
        put(loaded.scorer, DTYPES[setting.reward_precision])
    parts, dtype = (family.unet, family.vae, *family.text_encoders), DTYPES[setting.mixed_precision]
    for part in parts:
        put(part, torch.float32)
        part.to = lambda *_, part=part: (
            part
        )  # they are there, and fake tensors cannot be moved within a module
    family.to("cpu", dtype)
    for part in parts:
        del part.to
    if loaded.second is not None:
        put(loaded.second, dtype)
    for denoiser in (family.denoiser, loaded.second):
        if dtype != torch.float32 and denoiser is not None:
            denoiser.forward = torch.autocast("cpu", dtype)(denoiser.forward)
    if setting.method in DIRECT and call_checkpointing:
        direct.checkpoint_calls(family.denoiser)
    if setting.method in FORWARD:
        loaded.earlier = WeightCopy(weight for weight in family.denoiser.parameters() if weight.requires_grad)


def put(module: nn.Module, dtype: torch.dtype) -> None:
    """Put tensors on the CPU in place of a module's on the meta device: random ones, and positions in place of whole numbers."""
    for part in module.modules():
        for name, old in list(part._parameters.items()):
            if old is not None:
                value = torch.empty(old.shape, dtype=dtype).normal_(std=0.02)
                part._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                part._buffers[name] = torch.arange(buffer.numel(), dtype=kind).reshape(buffer.shape)


class Trained:
    """The models with the optimizer after its first step, as it is on a CUDA device, and the EMA of the trained weights.

    In 8 bits the moments are bytes, with a float32 for each 256 of them; a step of that kind needs bitsandbytes and is left out.
    """

    def __init__(self, loaded: Loaded) -> None:
        setting = loaded.setting
        config = RunConfig(
            train_batch_size=setting.train_batch_size,
            mixed_precision=setting.mixed_precision,
            ema_decay=setting.ema_decay,
        )
        self.loaded = loaded
        self.weights = [weight for weight in loaded.family.unet.parameters() if weight.requires_grad]
        self.ema = EMA(config, self.weights)
        self.moments = list[Tensor]()
        self._optimizer = adamw(config, self.weights, 1e-4)
        if setting.use_8bit_adam:
            sizes = [weight.numel() for weight in self.weights for _ in range(2)]
            self.moments = [torch.empty(size + 4 * -(-size // 256), dtype=torch.uint8) for size in sizes]
            return
        for group in self._optimizer.param_groups:
            group["foreach"] = not group["fused"]  # what torch itself chooses on a CUDA device
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def update(self, loss: Callable[[], Tensor]) -> None:
        """Do what `Run.update` does with the driver's loss."""
        loss().backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0, foreach=True)
        if not self.moments:
            self._optimizer.step()
        self._optimizer.zero_grad()
        self.ema.update()


def refl_loss(loaded: Loaded) -> Tensor:
    """Return the loss of an update of ReFL whose late step is the second."""
    setting = loaded.setting
    assert loaded.scorer is not None
    config = refl.Config(
        prompts=Path("-"),
        num_inference_steps=40,
        solver="ddpm",
        pretraining="off",
        model=ModelConfig(pretrained=Pretrained(model="-"), resolution=setting.resolution),
    )
    texts, noise = loaded.prompts(setting.train_batch_size)
    taken = refl.late_step(loaded.family, texts, noise, 1, setting.size(), config)
    pixels = loaded.family.decode(taken.prediction.x0)
    return refl.reward_loss(loaded.scorer(pixels, texts), config.margin, scale=1.0)


def direct_loss(loaded: Loaded) -> Tensor:
    """Return the loss of an update of DRaFT, DRTune or FlowBP with their defaults; DRTune scores the last step."""
    assert loaded.scorer is not None
    last = {"draft": "draft-1", "drtune": "drtune-3", "flowbp": "sparse"}[loaded.setting.method]
    latents = direct_latents(loaded, last, direct_settings(loaded))
    texts, _ = loaded.prompts(len(latents))
    return direct.losses(loaded.scorer(direct.decoded(loaded.family, latents), texts), None).mean()


def direct_latents(loaded: Loaded, method: str, settings: DirectConfig) -> Tensor:
    """Return the final latents of an update of draft-K, drtune-K, or a surrogate of flowbp; the active steps are those of a seed."""
    assert loaded.grid is not None
    name, _, count = method.partition("-")
    texts, noise = loaded.prompts(loaded.setting.train_batch_size)
    size, rng, known = loaded.setting.size(), np.random.default_rng(0), direct.filled(settings)
    common: dict[str, Any] = {
        "prompts": Path("-"),
        "model": ModelConfig(pretrained=Pretrained(model="-")),
        "direct": settings,
    }
    if name == "draft":
        live = draft.Config(last_steps=int(count), **common)
        first = known.num_inference_steps - int(count)
        return draft.final_latents(loaded.family, texts, noise, first, size, live)
    grid, share = loaded.grid, 0.0
    if name == "drtune":
        spaced = drtune.Config(active_steps=int(count), early_stop=0.0, **common)
        grid, active = drtune.choose(rng, grid, spaced)
        parts = surrogates.sparse(grid.levels, active)
    else:
        chosen = flowbp.with_published(flowbp.Config(surrogate=name, **common))  # type: ignore[arg-type]
        parts = flowbp.CHOOSE[chosen.surrogate](rng, grid.levels, flowbp.values_of(chosen))
        share = chosen.input_share or 0.0
    scale, gradient = known.guidance_scale, known.guidance_gradient
    return paths.surrogate_latents(loaded.family, texts, noise, grid, parts, size, scale, gradient, share)[0]


def data_loss(loaded: Loaded, folder: Path) -> Tensor:
    """Return the loss of an update of the methods that learn from images; writes one to the folder."""
    setting, size, image = loaded.setting, loaded.setting.size(), folder / "image.png"
    Image.new("RGB", (size.width, size.height)).save(image)
    texts, generators = loaded.prompts(setting.train_batch_size)
    inputs = CaptionedInputs(loaded.family, size)
    return captioned_loss(inputs, [image] * len(texts), texts, generators, caption_dropout=0.0).mean()


@contextmanager
def before_tuning(loaded: Loaded) -> Iterator[None]:
    """Context, without gradient, in which the family predicts as before tuning: by a second denoiser, or with its LoRA off."""
    family, tuned = loaded.family, loaded.family.denoiser
    with torch.no_grad(), nullcontext() if loaded.second is not None else family.reference():
        family.denoiser = tuned if loaded.second is None else loaded.second
        try:
            yield
        finally:
            family.denoiser = tuned


def policy_loss(loaded: Loaded) -> Callable[[], Tensor]:
    """Return the loss of a pass of DDPO, whose images are (image, step) pairs: with its defaults the model before tuning is not asked.

    What a rollout has once is there: prompts are encoded.
    """
    family, model = loaded.family, ModelConfig(pretrained=Pretrained(model="-"))
    own = {name.removeprefix("policy."): value for name, value in defaults.policy(family.defaults).items()}
    config = ddpo.Config(prompts=Path("-"), policy=PolicyConfig(**own), model=model)  # type: ignore[arg-type]
    texts, _ = loaded.prompts(loaded.setting.train_batch_size)
    x = torch.zeros(len(texts), *family.latent_shape(loaded.setting.size()))
    t, each = torch.full((len(texts),), 500), torch.ones(len(texts))
    with torch.no_grad():
        cond = family.encode(texts)
    pairs = Pairs(x, x, t, t - 20, each, each)
    return lambda: ddpo.losses_of(family, pairs, cond, config, None)[0].mean()


def forward_loss(loaded: Loaded) -> Callable[[], Tensor]:
    """Return the loss of a pass of AWM or DiffusionNFT: each image at one noise level. The earlier policy is asked, which AWM spares in
    the first update of an epoch, and the model before tuning. Prompts are encoded, which an update does once for all noise levels.
    """
    family, earlier = loaded.family, loaded.earlier
    assert earlier is not None
    texts, generators = loaded.prompts(loaded.setting.train_batch_size)
    x0 = torch.zeros(len(texts), *family.latent_shape(loaded.setting.size()))
    given: dict[str, Any] = {
        "prompts": Path("-"),
        "model": ModelConfig(pretrained=Pretrained(model="-")),
        "reward": RewardConfig(rewards=("imagereward=1.0",)),
    }
    matching, contrast, advantages = awm.Config(**given), nft.Config(**given), torch.ones(len(texts))
    with torch.no_grad():
        cond = family.encode(texts)

    def loss() -> Tensor:
        at = noised(family, x0, generators)
        where = at.x, at.t, cond
        with torch.no_grad(), earlier.swapped_in():
            old = family.predict(*where).output
        with before_tuning(loaded):
            before = family.predict(*where).output
        output = family.predict(*where).output
        if loaded.setting.method == "awm":
            own, _ = awm.policy_loss(at.errors(output), at.errors(old), at.sigma, advantages, matching)
            return own + matching.kl_weight * distance(output, before)
        rho, kind = nft.probabilities(advantages), family.prediction_type
        losses = nft.nft_losses(output, old, at, x0, kind, rho, contrast.beta)
        return contrast.scored.advantage_clip * losses.mean() + contrast.kl_weight * distance(output, before)

    return loss


def pair_loss(loaded: Loaded, folder: Path) -> Tensor:
    """Return the loss of an update of DPO, of --train-batch-size pairs; writes an image to the folder."""
    family, size, image = loaded.family, loaded.setting.size(), folder / "image.png"
    Image.new("RGB", (size.width, size.height)).save(image)
    config = dpo.Config(data=(folder,), beta=5000.0, model=ModelConfig(pretrained=Pretrained(model="-")))
    texts, _ = loaded.prompts(loaded.setting.train_batch_size)
    pairs = [Pair(prompt=text, first=image, second=image, label=1.0, weight=1.0) for text in texts]

    def draw(stream: int) -> list[torch.Generator]:
        return loaded.prompts(len(texts))[1]

    x0, cond = dpo.inputs_of(CaptionedInputs(family, size), pairs, draw, 0.0)
    with before_tuning(loaded):
        before = dpo.errors_of(family, x0, cond, draw)
    errors = dpo.errors_of(family, x0, cond, draw)
    losses, _ = dpo.losses_of(errors, before, torch.ones(len(texts)), config, 1000)
    return losses.mean()


def loss_of(loaded: Loaded, folder: Path) -> Callable[[], Tensor]:
    """Return the loss of an update of the setting's method."""
    if loaded.setting.method == "refl":
        return lambda: refl_loss(loaded)
    if loaded.setting.method in DIRECT:
        return lambda: direct_loss(loaded)
    if loaded.setting.method == "dpo":
        return lambda: pair_loss(loaded, folder)
    if loaded.setting.method == "ddpo":
        return policy_loss(loaded)
    if loaded.setting.method in FORWARD:
        return forward_loss(loaded)
    return lambda: data_loss(loaded, folder)


def validate(loaded: Loaded) -> None:
    """Generate a batch of validation images in few steps, and score them."""
    number = loaded.setting.sample_batch_size
    settings = Sampling(num_inference_steps=VALIDATION_STEPS, solver="ddim", batch_size=number).at(
        loaded.setting.size()
    )
    texts, _ = loaded.prompts(number)
    for pixels in sample(loaded.family, texts, range(number), settings):
        if loaded.scorer is not None:
            with torch.no_grad():
                loaded.scorer(pixels, texts)

"""Shared code around the training loop of tuning programs: loading, validation and saving.

with workspace.open(config.model, config.reward, config.validation, config.run, driver="refl", ...) as w:
    for step in w.run.steps():
        ...
        w.after(step)
    return w.finish()
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from preftune import families, files
from preftune.captioned_inputs import CaptionedInputs
from preftune.cli import exit_on_user_error
from preftune.cli.notes import say
from preftune.diffusion_loss import captioned_loss
from preftune.families import Defaults, Family
from preftune.lora import files as lora_files
from preftune.lora import tuning as loras
from preftune.lora.tuning import LoRA
from preftune.lora.write import KOHYA_FILE, write_kohya
from preftune.records import CaptionedImage, Skipped
from preftune.resolution import Resolution
from preftune.statistics.image_features import clip_tower
from preftune.training import data, decoding
from preftune.training import validation as validation_images
from preftune.training.cache_config import CacheConfig
from preftune.training.config import ModelConfig, RewardConfig, ValidationConfig
from preftune.training.defaults import learning_rate
from preftune.training.guard import Guard, check_independent
from preftune.training.run import Run
from preftune.training.run_config import RunConfig
from preftune.training.run_config import check as check_run
from preftune.training.validation import Scoring
from rewards.mix import Mix
from rewards.offload import offload_between_calls
from rewards.own_scorer import try_out
from rewards.shapes import check_judgeable
from rewards.shared_towers import load_all

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Names of precisions in flags."""


@dataclass(kw_only=True)
class Workspace:
    """A model that is tuned, its scorers and its run."""

    run: Run
    family: Family
    scoring: Scoring
    guard: Guard
    resolution: Resolution
    """Of the images in training."""
    inputs: CaptionedInputs
    model: ModelConfig
    validation: ValidationConfig
    prompts: Sequence[str]
    """Those whose images are generated."""
    moments: dict[str, str]
    """Compared at the end: title -> name of a folder in RUN/samples."""
    negatives: Mapping[str, str]
    """Ending of a folder's name -> negative prompt of its images: at each moment, images for each."""

    @property
    def mix(self) -> Mix | None:
        """The scorers that are trained on; None without --rewards."""
        return self.scoring.mix

    def write(self, folder: Path) -> None:
        """Write the tuned weights, or their EMA where the run has one, to folder/lora or folder/unet."""
        lora = self.model.tuned()
        with self.run.ema_weights(), files.replacing(folder / ("unet" if lora is None else "lora")) as place:
            self.family.save_tuned(place, lora)

    def _write_result(self) -> None:
        """Write the tuned weights into the run's folder, also in the layout of --export."""
        self.write(self.run.folder)
        export(self.model, self.family, self.run.folder)

    def validate(self, step: int) -> dict[str, float]:
        """Generate and score the validation images after so many updates, and return the mean scores; none where a signal came."""
        means: dict[str, float] = {}
        for ending, negative in self.negatives.items():
            name = self.name_of(step, ending)
            with self.run.ema_weights():
                found = validation_images.validate(
                    self.family, self.scoring, self.prompts, self.validation.sample, self.run, name, negative
                )
            if found is None:
                return {}
            self.run.log_images(step - 1, f"validation{ending}", found.captions())
            means |= {f"{score}{ending}": value for score, value in found.means().items()}
            if ending == self.guard.ending:
                means |= self.guard.see(step, found, self.write if self.run.is_main else None)
        self._heed()
        return means

    def _heed(self) -> None:
        """Tell an alarm of the guard, once, and with --guard stop end the run."""
        guard, run = self.guard, self.run
        if run.is_main and (paragraph := guard.report()) is not None:
            shown = guard.draw()
            say(paragraph, kind="guard: ")
            if shown is not None:
                run.log_images(guard.updates - 1, "guard", {shown: paragraph})
        if guard.stops:
            run.stopped = True
            self.moments = dict(self._until(guard.updates))

    def _until(self, updates: int) -> Iterator[tuple[str, str]]:
        """Yield the moments of a run that ends after so many updates: those of its planned end are then."""
        for title, name in self.moments.items():
            number, _, rest = name.removeprefix("step_").partition("_")
            at, ending = int(number), f"_{rest}" * bool(rest)
            if at <= updates or at == self.run.config.max_train_steps:
                yield title, self.name_of(min(at, updates), ending)

    def after(self, step: int, *, milestone: bool = False, state: Mapping[str, Any] | None = None) -> None:
        """Validate and save after the updates of a step, where that is due or the driver has reached a milestone.

        The tuned weights are written before the last images are sampled. `state` is the driver's own, see Run.save.
        """
        run = self.run
        if step + 1 == run.config.max_train_steps and run.is_main:
            self._write_result()
        if (milestone or run.due("validation_steps", step)) and (means := self.validate(step + 1)):
            run.log(step, **means)
        if run.stopped and run.is_main:
            self._write_result()
        if milestone or run.due("checkpointing_steps", step):
            run.save(step, write=self.write, state=state)

    def finish(self) -> int:
        """Compare before and after, and return the exit code."""
        if not self.run.interrupted and self.run.is_main:
            shown = validation_images.write_comparison(self.run.folder, self.moments)
            self.run.log_images(self.run.config.max_train_steps - 1, "before_after", dict.fromkeys(shown, ""))
        return self.run.finish()

    @staticmethod
    def name_of(step: int, ending: str) -> str:
        """Return the name of the folder in RUN/samples of the images after so many updates."""
        return f"step_{step:06d}{ending}"

    def losses(
        self,
        samples: Sequence[CaptionedImage],
        captions: Sequence[str],
        indices: range,
        *,
        caption_dropout: float,
        stream: int = 0,
        dropped: Sequence[str] | None = None,
    ) -> Tensor:
        """Return the diffusion loss (B,) of images with these captions; `indices` and `stream` give their noise.

        `dropped`: replacements of captions that caption_dropout removes; None = the empty caption.
        """
        return captioned_loss(
            self.inputs,
            [sample.path for sample in samples],
            captions,
            [self.run.generator(i, stream) for i in indices],
            caption_dropout=caption_dropout,
            dropped=dropped,
            stream=stream,
        )

    def decode_ahead(
        self, samples: Sequence[CaptionedImage], stream: int = 0, steps: range | None = None
    ) -> None:
        """Begin to decode in worker processes what `losses` will be asked for with this stream: these samples in their order of
        the run, once a pass, in all updates that are still to do or in those of `steps`.
        """
        batches = decoding.upcoming(self.run, samples, steps)
        self.inputs.expect(([sample.path for sample in batch] for batch in batches), stream)


def check(
    model: ModelConfig,
    reward: RewardConfig,
    validation: ValidationConfig,
    run: RunConfig,
    *,
    differentiable: bool = False,
    lora: LoRA | None = None,
) -> Defaults:
    """Return the model's defaults; ValueError, in milliseconds, for what could not work once all has loaded.

    differentiable: the gradient of the scorers is needed. lora: the program's default, where it has one of its own.
    """
    check_run(run)
    reward.check_names(differentiable=differentiable)
    defaults = model.check(lora)
    validation.check(defaults)
    reward.check()
    return defaults


def load_model(
    model: ModelConfig, run: RunConfig, device: torch.device, *, train_text_encoders: bool = False
) -> tuple[Family, nn.Module]:
    """Return the model on its device in the run's precision, and the denoiser, opened for training."""
    dtype = DTYPES[run.mixed_precision or "no"]
    family = families.load(
        model.pretrained.source(), "cpu", torch.float32, model.vae
    )  # float32 may not fit on the device
    if model.lora_start is not None:
        family.start_from(model.lora_start)
    if model.quantization is not None:
        family.to("cpu", dtype).quantize(model.quantization, device)
    denoiser = family.trainable(model.tuned(), run.seed)
    if train_text_encoders:
        family.open_text_encoders()
    family.set_speed(
        model.attention,
        gradient_checkpointing=model.gradient_checkpointing,
        vae_checkpointing=model.vae_checkpointing,
    )
    if run.mixed_precision not in (None, "no"):
        loras.leave_casts_to_autocast(denoiser)
    family.compile(graphs=run.cuda_graphs, blocks=run.compile)
    family.to(device, dtype)
    if model.offload and not train_text_encoders:
        for encoder in family.text_encoders:
            offload_between_calls(encoder, device)
    return family, denoiser


def load_reference(model: ModelConfig, run: RunConfig, device: torch.device) -> nn.Module:
    """Return the denoiser before tuning as a second model, frozen, in the run's precision: what --train full is compared with.

    Of a LoRA the model itself is the reference: `Family.reference`.
    """
    family = families.load(model.pretrained.source(), "cpu", torch.float32, model.vae)
    if model.lora_start is not None:
        family.start_from(model.lora_start)
    family.set_speed(model.attention, gradient_checkpointing=False, vae_checkpointing=False)
    return family.to(device, DTYPES[run.mixed_precision or "no"]).denoiser


def export(model: ModelConfig, family: Family, folder: Path) -> None:
    """Write folder/lora in the layout of --export, where one is asked for; else the file of an earlier command goes."""
    if model.export is None:
        files.remove(folder / KOHYA_FILE)
    else:
        layers = family.lora_layers()
        write_kohya(folder / KOHYA_FILE, lora_files.read(folder / "lora", layers), layers)


def load_scoring(reward: RewardConfig, device: torch.device, *, offload: bool = False) -> Scoring:
    """Return the scorers that are trained on and those that are held out, on the device, or with `offload` there while they are used.

    ValueError for a held-out scorer with the weights of a trained one.
    """
    trained, holdout = reward.weights(), reward.guard.weights()
    names, precision = [*trained, *holdout], DTYPES[reward.reward_precision]
    scorers = load_all(names, files=reward.files(), device=device, dtype=precision)
    mine, others = scorers[: len(trained)], scorers[len(trained) :]
    for warning in check_independent(mine, others):
        say(warning)
    scoring = Scoring(tower=clip_tower([*others, *mine]))
    if trained:
        kind, stats = reward.reward_normalization, reward.reward_stats
        scoring.mix = Mix(mine, trained, kind, stats, reward.reward_combination)
    if holdout:
        scoring.holdout = Mix(others, holdout, "none")
    for mix in (scoring.mix, scoring.holdout):
        if mix is not None and offload:
            mix.offload(device)
    return scoring


@contextmanager
def open(
    model: ModelConfig,
    reward: RewardConfig,
    validation: ValidationConfig,
    run_config: RunConfig,
    *,
    driver: str,
    config_text: str,
    prompts: Sequence[str],
    differentiable: bool = False,
    skipped: Sequence[Skipped] | None = None,
    settings: Mapping[str, object] | None = None,
    driver_files: tuple[str, ...] = (),
    moments: Mapping[str, str] | None = None,
    negatives: Mapping[str, str] | None = None,
    cache: CacheConfig | None = None,
) -> Iterator[Workspace]:
    """Load scorers and model, open the run, and where it is new show and save the model as it is.

    Errors that the user can fix end the program here, before training, with one sentence and exit code 2.
    `settings` and `driver_files` are Run's; `prompts` those of validation; `differentiable` as in `check`; `skipped` is what of the data was set aside; `negatives` and `moments` see
    Workspace; `cache` what of captioned images is kept on disk.
    """
    with exit_on_user_error():
        defaults = families.check(model.pretrained.source(), model.vae)
        if "shapes" in reward.weights():
            size = validation.sample.resolved(defaults).resolution
            check_judgeable(prompts, (size.width, size.height), "the validation images")
        same = {**model.lora_settings(), **(settings or {}), **data.as_setting(skipped)}
        run = Run(
            run_config, driver=driver, config_text=config_text, settings=same, driver_files=driver_files
        )
        scoring = load_scoring(reward, run.device, offload=model.offload)
        size = model.size(defaults)
        for mix, gradient in ((scoring.mix, differentiable), (scoring.holdout, False)):
            if mix is not None:  # rewards of the user's own are tried before the model loads
                for warning in try_out(mix.scorers, prompts, (size.width, size.height), gradient=gradient):
                    say(warning)
        family, denoiser = load_model(model, run_config, run.device)
        family.denoiser = run.prepare(denoiser, learning_rate=learning_rate(driver, defaults, model.train))
    if run.is_main and skipped is not None:
        data.write_report(run.folder, skipped)
    steps = run_config.max_train_steps
    moments = dict(moments or {"before": "step_000000", "after": f"step_{steps:06d}"})
    ending = list(moments.values())[-1].removeprefix(f"step_{steps:06d}")  # of the images that are the result
    inputs = decoding.captioned_inputs(family, size, run, cache or CacheConfig())
    w = Workspace(
        run=run,
        family=family,
        scoring=scoring,
        guard=Guard(reward.guard, run.folder, ending),
        resolution=size,
        inputs=inputs,
        model=model,
        validation=replace(validation, sample=validation.sample.at(size)),
        prompts=prompts,
        moments=moments,
        negatives=negatives or {"": ""},
    )
    with closing(inputs):
        _begin(w)
        yield w


def _begin(w: Workspace) -> None:
    """Show and save the model as it is; of a resumed run what was missed when it was stopped."""
    run = w.run
    if not run.resumed:
        w.validate(0)
        run.save(-1, write=w.write)
        return
    if run.is_main and run.start >= run.config.max_train_steps:
        w._write_result()  # there is no step left, after which it would be written
    w.guard.restore(run.start, keep=run.is_main)
    w._heed()
    names = [w.name_of(run.start, ending) for ending in w.negatives]
    if validation_images.missed(run, names, milestone=any(name in w.moments.values() for name in names)):
        run.log(run.start - 1, **w.validate(run.start))

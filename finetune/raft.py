"""RAFT: generate images, keep those with the highest rewards, fine-tune on them, repeat (Dong et al. 2023,
arXiv 2304.06767).

Algorithm 1 with the settings of ImageReward (arXiv 2304.05977, appendix E). In each iteration the current
model generates several images for each of some prompts, the best image of each prompt is kept, and the
model is fine-tuned on the kept images with the plain noise-prediction loss.

    python finetune/raft.py                                     # the embedded model: six minutes on two CPU cores
    python finetune/raft.py --model SD_FOLDER --prompts diffusiondb.txt --rewards imagereward=1

Defaults: 3 iterations with 10 images per prompt, the best image of every prompt is kept (ImageReward; LMFlow's
notebook also drops prompts: `--keep-share`). The paper's 10,000 prompts an iteration are days on one GPU: the
default is 500, and 100 updates of 8 images an iteration. `--max-train-steps` counts the updates of all
iterations together. The images are generated with the `--sample` settings, like the validation images. The
data set of an iteration is kept in RUN/iteration_01: an imagefolder with the reward of each image. Left
out: the paper's second generator as a regulariser. Hardware: Stable Diffusion 1.x at 512 px needs a GPU;
tiny models run on a CPU.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from preftune.cli import dump, exit_on_user_error, parse
from preftune.training.cache_config import CacheConfig
from preftune.training.config import ModelConfig, RewardConfig, ValidationConfig, check_dropout
from preftune.training.defaults import of_model
from preftune.training.run_config import RunConfig

TINY = Path(__file__).parent / "configs" / "raft" / "tiny.yaml"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a model on its own best images, again and again (RAFT). Without arguments: the embedded model and scorer."""

    prompts: Path
    """Prompt file: txt, json, jsonl, csv, tsv or parquet; or prompts, each in quotes."""
    iterations: int = 3
    """Number of iterations; --max-train-steps must be a multiple of it."""
    prompts_per_iteration: int = 500
    """Prompts to sample in each iteration."""
    images_per_prompt: int = 10
    """Images generated for each prompt, of which the best is kept; 2 or more."""
    keep_share: float = 1.0
    """Share of prompts whose best image is kept (the highest rewards), in (0, 1]."""
    caption_dropout: float = 0.0
    """Share of captions left empty, in [0, 1)."""
    cache: Annotated[CacheConfig, tyro.conf.arg(name="")] = field(default_factory=CacheConfig)
    model: Annotated[ModelConfig, tyro.conf.arg(name="")]
    reward: Annotated[RewardConfig, tyro.conf.arg(name="")] = field(default_factory=RewardConfig)
    validation: Annotated[ValidationConfig, tyro.conf.arg(name="")] = field(default_factory=ValidationConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(output_dir=Path("runs/raft"), max_train_steps=300)
    )

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("prompts_per_iteration", 1), ("images_per_prompt", 2)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}"
                )
        if not 0 < self.keep_share <= 1:
            raise ValueError(f"--keep-share must lie in (0, 1], got {self.keep_share}")
        if not self.reward.rewards:
            raise ValueError("--rewards is empty; name a scorer to rank by, as imagereward=1.0")
        if self.run.max_train_steps % self.iterations:
            raise ValueError(
                f"--max-train-steps {self.run.max_train_steps} must be a multiple of --iterations {self.iterations}"
            )
        check_dropout(self.caption_dropout)


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config, default_config=TINY)

import torch

from preftune import files, seeds
from preftune.files.one_writer import one_writer
from preftune.images import save_image
from preftune.order import items_at
from preftune.prompts import read_prompts
from preftune.records import CaptionedImage, read_imagefolder, read_jsonl, write_jsonl
from preftune.sampling import sample, sharded
from preftune.seeds import Stream
from preftune.training import generated_folders, workspace
from preftune.training.run import Run
from preftune.training.workspace import Workspace


def seed_of(seed: int, iteration: int, image: int) -> int:
    """Return the seed of an image of an iteration, counted over all prompts."""
    return seeds.word(seed, Stream.CHOICE, iteration, image)


def keep_best(rows: Sequence[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """Return that share of the rows, at least one: those with the highest `reward`, the first of equals, in their order."""
    number = max(1, round(share * len(rows)))
    ranked = sorted(range(len(rows)), key=lambda place: -rows[place]["reward"])
    return [rows[place] for place in sorted(ranked[:number])]


@torch.no_grad()
def generate_best(
    config: Config, w: Workspace, texts: Sequence[str], iteration: int, folder: Path
) -> list[dict[str, Any]]:
    """Generate this process' share of the texts, write the best image of each to folder, and return their metadata rows.

    An image is a function of the weights, its prompt, and its seed; the first of equally good ones is the best.
    """
    assert w.mix is not None, "the configuration has rewards"
    each, rows = config.images_per_prompt, list[dict[str, Any]]()
    mine = sharded(texts, w.run.rank, w.run.world)
    images = sample(
        w.family,
        [text for _, text in mine for _ in range(each)],
        [seed_of(config.run.seed, iteration, place * each + k) for place, _ in mine for k in range(each)],
        w.validation.sample.by_groups_of(each),
        progress=f"iteration {iteration + 1} of {config.iterations}" if w.run.is_main else None,
    )
    for pixels in w.run.until_stopped(images):
        part = mine[len(rows) : len(rows) + len(pixels) // each]
        prompts = [text for _, text in part for _ in range(each)]
        rewards = w.mix(pixels.to(w.run.device), prompts).rewards.cpu().view(-1, each)
        best = rewards.argmax(1).tolist()
        for row, (place, text) in enumerate(part):
            name = f"{place:06d}.png"
            save_image(pixels[row * each + best[row]], folder / name)
            reward, mean = float(rewards[row].max()), float(rewards[row].mean())
            rows.append({"file_name": name, "text": text, "reward": reward, "mean_reward": mean})
    return rows


def data_set(config: Config, w: Workspace, prompts: list[str], iteration: int) -> list[CaptionedImage]:
    """Return the data set of an iteration (from 0), generated with the weights as they are unless it is there already.

    Empty where a signal came: what was generated by then is dropped.
    """
    run, folder = w.run, folder_of(w.run.folder, iteration)
    if not folder.is_dir():
        number = min(config.prompts_per_iteration, len(prompts))
        texts = items_at(prompts, range(iteration * number, (iteration + 1) * number), config.run.seed)
        partial = generated_folders.partial_folder(folder)
        rows = generate_best(config, w, texts, iteration, partial)
        if run.interrupted:
            if run.is_main:
                files.remove(partial)
            return []
        write_jsonl(partial / f"rank_{run.rank}.jsonl", rows)

        def join(parts: Path) -> None:
            paths = [parts / f"rank_{rank}.jsonl" for rank in range(run.world)]
            found = sorted(
                (row for path in paths for row in read_jsonl(path)), key=lambda row: str(row["file_name"])
            )
            write_jsonl(parts / "metadata.jsonl", keep_best(found, config.keep_share))

        generated_folders.publish(run, folder, join)
    return read_imagefolder(folder)


def folder_of(run: Path, iteration: int) -> Path:
    """Return the folder of an iteration's data set."""
    return run / f"iteration_{iteration + 1:02d}"


def remove_later(run: Run, steps_per_iteration: int) -> None:
    """Remove the data sets of iterations that begin after the update from which a run goes on: they are of other weights.

    ValueError where it goes on within an iteration whose data set is gone or damaged.
    """
    found = {path.name.removeprefix("iteration_"): path for path in run.folder.glob("iteration_[0-9][0-9]*")}
    generated_folders.remove_stale(
        run, {int(number) - 1: path for number, path in found.items() if number.isdigit()},
        folder_of(run.folder, run.start // steps_per_iteration), steps_per_iteration,
        "the data set cannot be generated again with later weights; start again with --overwrite-output-dir",
    )  # fmt: skip


@one_writer
def main(config: Config) -> int:
    """Tune, validate and save."""
    with exit_on_user_error():
        prompts = read_prompts(config.prompts)
        validation_prompts = config.validation.prompts(prompts)
        defaults = workspace.check(config.model, config.reward, config.validation, config.run)
        config = of_model(config, "raft", defaults)
    steps = config.run.max_train_steps // config.iterations
    between = {f"iteration {i}": f"step_{i * steps:06d}" for i in range(1, config.iterations)}
    settings = ("iterations", "prompts_per_iteration", "images_per_prompt", "keep_share")
    with workspace.open(
        config.model, config.reward, config.validation, config.run, driver="raft", config_text=dump(config),
        prompts=validation_prompts,
        moments={"before": "step_000000", **between, "after": f"step_{config.run.max_train_steps:06d}"},
        settings={name: getattr(config, name) for name in settings}
        | {"max_train_steps": config.run.max_train_steps},
        driver_files=("iteration_[0-9][0-9]", "iteration_[0-9][0-9][0-9]"), cache=config.cache,
    ) as w:  # fmt: skip
        run = w.run
        with exit_on_user_error():
            remove_later(run, steps)
        samples: list[CaptionedImage] = []
        for step in run.steps():
            if step % steps == 0 or not samples:
                samples = data_set(config, w, prompts, step // steps)
                if samples:
                    w.decode_ahead(samples, steps=range(step, (step // steps + 1) * steps))
            if not samples:
                break
            for micro_batch in run.passes():
                indices = run.image_indices(step, micro_batch)
                chosen = items_at(samples, indices, config.run.seed)
                with run.accumulate():
                    texts, dropout = [sample.text for sample in chosen], config.caption_dropout
                    losses = w.losses(chosen, texts, indices, caption_dropout=dropout)
                    reward = torch.tensor([float(sample.extra["reward"]) for sample in chosen])
                    run.update(losses.mean(), reward=reward.mean())
            w.after(step, milestone=(step + 1) % steps == 0)
        return w.finish()


if __name__ == "__main__":
    sys.exit(main(CONFIG))

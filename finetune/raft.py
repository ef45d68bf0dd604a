"""RAFT: generate images, keep those that a reward ranks highest, tune on them, repeat (Dong et al. 2023, arXiv 2304.06767).

Algorithm 1, as paper 002 (appendix E) runs it: in each iteration the model of the moment generates several images for each of
some prompts, the best image of each prompt is kept, and the model is tuned on what was kept by plain noise prediction.

    accelerate launch finetune/raft.py --model SD_FOLDER --prompts diffusiondb.txt --rewards imagereward=1

Defaults: 10 images a prompt and lr 1e-5 (paper 002), every prompt's best (LMFlow's notebook also drops prompts:
`--keep-share`). `--max-train-steps` counts all iterations together. Images generated with `--sample`, as the held-out ones. An
iteration's data set stays in RUN/iteration_01: an imagefolder with the reward of each image. Left out: the paper's second
generator as a regulariser. Hardware: Stable Diffusion 1.x at 512 px wants one GPU; tiny models run on a CPU.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

from preftune.cli import dump, exit_on_user_error, parse
from preftune.families.base import Family
from preftune.images import save_image
from preftune.order import items_at
from preftune.prompts import read_prompts
from preftune.records import CaptionedImage, read_imagefolder, read_jsonl, write_jsonl
from preftune.sampling import sample
from preftune.training import validation, workspace
from preftune.training.run import Run
from preftune.training.run_config import RunConfig, check
from preftune.training.workspace import Tuning
from rewards.mix import Mix

_SAMPLING = 3  # second word of the seeds of generated images


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a model on its own best images, again and again (RAFT)."""

    prompts: Path
    """Prompt file: txt, json, jsonl, csv, tsv or parquet."""
    iterations: int = 3
    """How often images are generated; --max-train-steps must be a multiple of it."""
    prompts_per_iteration: int = 10_000
    """Prompts to sample in each iteration."""
    images_per_prompt: int = 10
    """Images that compete for each prompt, 2 or more."""
    keep_share: float = 1.0
    """Share of prompts whose best image is kept, those with the highest rewards, in (0, 1]."""
    tuning: Annotated[Tuning, tyro.conf.arg(name="")]
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: RunConfig(output_dir=Path("runs/raft"), max_train_steps=3000)
    )

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("prompts_per_iteration", 1), ("images_per_prompt", 2)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}"
                )
        if not 0 < self.keep_share <= 1:
            raise ValueError(f"--keep-share must lie in (0, 1], got {self.keep_share}")
        if not self.tuning.rewards:
            raise ValueError("--rewards is empty; name a scorer to rank by, as imagereward=1.0")
        if self.run.max_train_steps % self.iterations:
            raise ValueError(
                f"--max-train-steps {self.run.max_train_steps} must be a multiple of --iterations {self.iterations}"
            )


def seed_of(seed: int, iteration: int, image: int) -> int:
    """Return the seed of an image of an iteration, counted over all prompts."""
    return int(np.random.SeedSequence((seed, _SAMPLING, iteration, image)).generate_state(1, np.uint64)[0])


def keep_best(rows: Sequence[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """Return that share of the rows, at least one: those with the highest `reward`, the first of equals, in their order."""
    number = max(1, round(share * len(rows)))
    ranked = sorted(range(len(rows)), key=lambda place: -rows[place]["reward"])
    return [rows[place] for place in sorted(ranked[:number])]


@torch.no_grad()
def generate_best(
    config: Config, family: Family, mix: Mix, texts: Sequence[str], run: Run, iteration: int, folder: Path
) -> list[dict[str, Any]]:
    """Generate this process' share of the texts, write the best image of each to folder, and return their metadata rows.

    An image is a function of the weights, its prompt, and its seed; the first of equally good ones is the best.
    """
    each, rows = config.images_per_prompt, []
    mine = range(run.rank, len(texts), run.world)
    group = max(1, config.tuning.sample.batch_size // each)  # prompts that are generated together
    title = f"iteration {iteration + 1} of {config.iterations}"
    for start in tqdm(range(0, len(mine), group), desc=title, disable=not run.is_main, leave=False):
        places = mine[start : start + group]
        prompts = [texts[place] for place in places for _ in range(each)]
        seeds = [
            seed_of(config.run.seed, iteration, place * each + k) for place in places for k in range(each)
        ]
        pixels = sample(family, prompts, seeds, config.tuning.sample)
        rewards = mix(pixels.to(run.device), prompts).rewards.cpu().view(-1, each)
        best = rewards.argmax(1).tolist()
        for row, place in enumerate(places):
            name = f"{place:06d}.png"
            save_image(pixels[row * each + best[row]], folder / name)
            reward, mean = float(rewards[row].max()), float(rewards[row].mean())
            rows.append({"file_name": name, "text": texts[place], "reward": reward, "mean_reward": mean})
    return rows


def data_of(
    config: Config, family: Family, mix: Mix, prompts: list[str], run: Run, iteration: int
) -> list[CaptionedImage]:
    """Return the data set of an iteration (from 0), generated with the weights as they are unless it is there already."""
    folder = run.folder / f"iteration_{iteration + 1:02d}"
    if not folder.is_dir():
        number = min(config.prompts_per_iteration, len(prompts))
        texts = items_at(prompts, range(iteration * number, (iteration + 1) * number), config.run.seed)
        partial = folder.with_name(f"{folder.name}.partial")
        rows = generate_best(config, family, mix, texts, run, iteration, partial)
        write_jsonl(partial / f"rank_{run.rank}.jsonl", rows)
        barrier(run)
        if run.is_main:
            rows = [row for rank in range(run.world) for row in read_jsonl(partial / f"rank_{rank}.jsonl")]
            rows.sort(key=lambda row: row["file_name"])
            write_jsonl(partial / "metadata.jsonl", keep_best(rows, config.keep_share))
            partial.rename(folder)
    barrier(run)
    return read_imagefolder(folder)


def barrier(run: Run) -> None:
    """Wait until every process is here."""
    run.gather(torch.zeros(1, device=run.device))


def settle(config: Config, run: Run) -> None:
    """Remove data sets of an earlier run, and those of iterations that begin after the update from which this one goes on.

    ValueError where a run goes on with other settings, or without the data set of the iteration that it is in.
    """
    record, every = run.folder / "raft.json", config.run.max_train_steps // config.iterations
    names = ("iterations", "prompts", "prompts_per_iteration", "images_per_prompt", "keep_share")
    settings = {name: str(getattr(config, name)) for name in names}
    settings |= {"updates": str(config.run.max_train_steps), "rewards": str(config.tuning.rewards)}
    begun = read_jsonl(record)[0] if run.resumed and record.is_file() else settings
    for name, value in settings.items():
        if begun.get(name) != value:
            raise ValueError(
                f"{run.folder} was begun with {name} {begun.get(name)}, not {value}, and its data sets are of those settings"
            )
    now = run.folder / f"iteration_{run.start // every + 1:02d}"
    if run.start % every and not now.is_dir():
        raise ValueError(
            f"{now} is gone, and cannot be generated again with later weights; start anew with --overwrite-output-dir"
        )
    if run.is_main:
        write_jsonl(record, [settings])
        for folder in run.folder.glob("iteration_*"):
            number = folder.name.removeprefix("iteration_")
            if not (run.resumed and number.isdigit() and (int(number) - 1) * every <= run.start):
                shutil.rmtree(folder)
    barrier(run)


def main(config: Config) -> int:  # noqa: C901 - the loop stays in one piece
    """Tune, show and save."""
    with exit_on_user_error():
        check(config.run)
        workspace.check_inputs(config.tuning)
        prompts = read_prompts(config.prompts)
        validation_prompts = workspace.read_validation_prompts(config.tuning, prompts)
        run = Run(config.run, driver="raft", config_text=dump(config))
        family, mix = workspace.load(config.tuning, run)
        assert mix is not None, "the configuration has rewards"
        settle(config, run)
    every = config.run.max_train_steps // config.iterations
    samples: list[CaptionedImage] = []

    def write(folder: Path) -> None:
        workspace.write(family, run, config.tuning.lora, folder)

    def show(name: str) -> validation.Shown:
        return workspace.show(family, mix, validation_prompts, config.tuning.sample, run, name)

    if not run.resumed:  # samples, scores and saves once before training: whatever cannot work fails here
        if run.is_main:
            show("before")
        run.save(-1, write=write)

    for step in run.steps():
        if step % every == 0 or not samples:
            samples = data_of(config, family, mix, prompts, run, step // every)
        for micro in range(run.gradient_accumulation_steps):
            indices = run.image_indices(step, micro)
            chosen = items_at(samples, indices, config.run.seed)
            with run.accumulate():
                texts = [sample.text for sample in chosen]
                error = workspace.errors(family, run, config.tuning, chosen, texts, indices)
                reward = torch.tensor([float(sample.extra["reward"]) for sample in chosen])
                run.update(error.mean(), reward=reward.mean())
        ended = (step + 1) % every == 0
        if (
            (ended or run.due("validation_steps", step))
            and run.is_main
            and step + 1 < config.run.max_train_steps
        ):
            run.log(step, **show(f"step_{step + 1:06d}").means())
        if ended or run.due("checkpointing_steps", step):
            run.save(step, write=write)

    if run.is_main and not run.interrupted:
        write(run.folder)
        show("after")
        validation.conclude(
            run.folder,
            {
                "before": "before",
                **{f"iteration {i}": f"step_{i * every:06d}" for i in range(1, config.iterations)},
                "after": "after",
            },
        )
    return run.finish()


if __name__ == "__main__":
    sys.exit(main(parse(Config)))

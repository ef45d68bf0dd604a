r"""Rate and rank images by a multimodal language model: ratings with rationales on VisionPrefer's four aspects, and rankings.

The model is any that speaks OpenAI's chat completions: a local vLLM, llama.cpp or Ollama, or a hosted one. Its images are those of
a folder with captions, several for each caption, or with rankings (by people, say). It is asked about one aspect at a time
(arXiv 2404.15100), by templates of our own in preftune/mllm/templates, in one of three modes:

    together    all images of a prompt in one question, numbered, in an order at random; a score of 1 to 5 for each
    pointwise   one image in a question, a score of 1 to 5
    pairwise    two images in a question, which is better or a tie

    python data_build/annotate_mllm.py --data data/images --base-url http://localhost:8000/v1 --model Qwen/Qwen2.5-VL-7B-Instruct \
        --orders 2 --output-dir data/annotated
    python data_build/annotate_mllm.py --data data/images --base-url https://api.openai.com/v1 --model gpt-4.1-mini \
        --api-key-env OPENAI_API_KEY --count 20 --price-input 0.4 --price-output 1.6 --output-dir data/annotated

    ratings.jsonl    each score, or choice, with its rationale, the images in the order in which they were shown, model and template
    rankings.jsonl   what --rule makes of them (aspect_rules.py): prompt, generations, ranking (1 = best), source (the model)
    images/          the images of the rankings, hard links where possible: preftune reward-model and preftune dpo read the folder
    errors.jsonl     questions without an answer, and why; none of them is a score
    calls.jsonl      all answers as they came, line by line, with tokens; an answer that is there is not asked for again
    begun.json       what began the folder: data, model, mode, aspects and the templates' texts. A start with others is refused:
                     its results would replace those that are there
    summary.json     counts, tokens, cost, agreement of two orders, position bias

Of a prompt with more images than --max-images so many are drawn, at random but always the same. Without the prompt training would
lose it; its first images may all be of one model; and parts, as the pages for people make them, cost as much again for each part,
and their ranks say nothing of images of two parts. The images that were left out are counted.

A program that was stopped or killed goes on where it was; the same command with another --rule makes other rankings and asks
nothing. What has failed is asked again by the next start. Hardware: that of the endpoint.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import tyro

from data_build.aspect_rules import RULES
from preftune.cli import exit_on_user_error, parse
from preftune.mllm.config import ASPECTS, EndpointConfig

IMAGES = "images"
PROGRAM = "annotate-mllm"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Let a multimodal model rate the images of each prompt, and rank them."""

    data: Path
    """Folder of images with captions, several images a caption, or with a rankings.jsonl."""
    endpoint: Annotated[EndpointConfig, tyro.conf.arg(name="")]
    output_dir: Path
    """Folder of the annotations; one that this program has begun goes on."""
    mode: Literal["together", "pointwise", "pairwise"] = "together"
    """What is in a question: all images of a prompt, one, or two."""
    aspects: tuple[str, ...] = ASPECTS
    """Aspects, each a file NAME.yaml of --templates."""
    templates: Path | None = None
    """Folder of templates, in place of preftune/mllm/templates; None = those."""
    orders: Literal[1, 2] = 1
    """2 = ask everything again with the images in the reversed order, and average: twice the calls, and their agreement is measured."""
    rule: str = "sum"
    """How aspects become a ranking: sum, mean, majority, each (one ranking for each aspect and order), or the name of an aspect."""
    max_images: int = 9
    """Images of a prompt; of more so many are drawn by --seed. A model may be limited to fewer in a question."""
    count: int | None = None
    """Maximum number of prompts; None = all."""

    def __post_init__(self) -> None:
        if not self.aspects or len(set(self.aspects)) < len(self.aspects):
            raise ValueError(f"--aspects needs names, each once, got {' '.join(self.aspects) or 'none'}")
        if self.rule not in (*RULES, *self.aspects):
            raise ValueError(f"--rule is {self.rule}; it must be {', '.join(RULES)} or one of --aspects")
        if self.mode == "pointwise" and self.orders == 2:
            raise ValueError("--orders 2 is for --mode together and pairwise; one image alone has no order")
        if self.max_images < 2:
            raise ValueError(f"--max-images must be at least 2, got {self.max_images}")
        if self.count is not None and self.count < 1:
            raise ValueError(f"--count must be at least 1, got {self.count}")


if __name__ == "__main__":  # flags are read before torch is imported, which takes seconds
    CONFIG = parse(Config)

from data_build.aspect_rules import Verdict, averaged, of_preferences, of_scores, ranked
from data_build.mllm_calls import (
    CALLS,
    all_calls,
    asking,
    calls_in_words,
    check_folder,
    digests_of,
    failures_in_words,
    watched,
)
from data_build.mllm_quality import Quality, in_words, preferences
from data_build.mllm_tasks import Answer, Group, Task, ask, known, read_groups, reasons, tasks_of
from preftune.cli.notes import counted, say
from preftune.cli.printable import show
from preftune.files import replacing, tidy, write_text
from preftune.files.one_writer import one_writer
from preftune.mllm.client import Client
from preftune.mllm.templates import OURS, Template, load
from rewards.atomic_folder import link


@dataclass(kw_only=True)
class Written:
    """The files that are being written, and what has been."""

    ratings: IO[str]
    rankings: IO[str]
    errors: IO[str]
    quality: Quality = field(default_factory=Quality)
    counts: Counter[str] = field(default_factory=Counter)


def flags_of(config: Config, templates: Sequence[Template]) -> dict[str, str]:
    """Return the flags without which the answers are of other questions: those of another rule, or of more prompts, are not.

    How the model is sampled is not among them: more tokens, or another response format, may be what a failed start needs.
    """
    return {
        "--data": str(config.data.resolve()),
        "--model": config.endpoint.model,
        "--mode": config.mode,
        "--aspects": " ".join(config.aspects),
        "--templates": digests_of(templates),
    }


def check_inputs(config: Config) -> tuple[list[Group], list[Template], Counter[str]]:
    """Return groups and templates, and what was left out; ValueError for what is wrong, before anything is asked."""
    folder = config.output_dir
    if folder.resolve() == config.data.resolve():
        raise ValueError(
            f"--output-dir {folder} is --data, whose rankings would be lost; choose another folder"
        )
    kind = "compare" if config.mode == "pairwise" else "rate"
    templates = [load(config.templates or OURS, kind, aspect) for aspect in config.aspects]
    check_folder(folder, PROGRAM, flags_of(config, templates))
    if not config.data.is_dir():
        raise ValueError(f"there is no data at {config.data}")
    config.endpoint.key()
    groups, left_out = read_groups(
        config.data, least=2, most=config.max_images, count=config.count, seed=config.endpoint.seed
    )
    return groups, templates, left_out


def all_tasks(config: Config, groups: Sequence[Group], templates: Sequence[Template]) -> Iterator[Task]:
    """Yield all questions, in their order."""
    for group in groups:
        yield from tasks_of(group, templates, config.mode, config.orders, config.endpoint.seed)


def ask_all(client: Client, tasks: Sequence[Task]) -> dict[tuple[str, ...], tuple[str, str]]:
    """Ask what is not known, and return the place of each question without an answer -> kind and detail of the error.

    Ends the program where the endpoint is of no use.
    """
    found = watched(client.each(lambda task: ask(client, task), tasks), len(tasks))
    return {place_of(task): (asked.error, asked.detail) for task, asked in found if asked.value is None}


def place_of(task: Task) -> tuple[str, ...]:
    """Return what tells a question of this data set from others."""
    return (task.group.prompt, task.template.name, str(task.order), *task.names)


def rating_rows(task: Task, answer: Answer, model: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of ratings.jsonl of an answer."""
    about = {"aspect": task.template.name, "order": task.order + 1, "shown": task.names}
    about |= {"model": model, "template": task.template.digest}
    if answer.choice is not None:
        yield {
            "prompt": task.group.prompt,
            "choice": answer.choice,
            "rationale": answer.rationales[0],
            **about,
        }
    for place, score in enumerate(answer.scores):
        row = {"prompt": task.group.prompt, "image": task.names[place], "score": score}
        yield {**row, "rationale": answer.rationales[place], "place": place + 1, **about}


def verdict(group: Group, answers: Sequence[tuple[Task, Answer]]) -> Verdict:
    """Return what these answers, of one aspect, say together: the means of what was asked twice."""
    count = len(group.names)
    if any(task.pairwise for task, _ in answers):
        shares: dict[tuple[int, int], list[float | None]] = {
            (i, j): [] for i in range(count) for j in range(i + 1, count)
        }
        for task, answer in answers:
            for (one, other), share in preferences(task, answer).items():
                shares[min(one, other), max(one, other)].append(share if one < other else 1 - share)
        return of_preferences(count, {pair: averaged(found) for pair, found in shares.items()})
    scores: list[list[float | None]] = [[] for _ in range(count)]
    for task, answer in answers:
        for place, score in zip(task.shown, answer.scores, strict=True):
            scores[place].append(float(score))
    return of_scores([averaged(found) for found in scores])


def ranking_rows(
    config: Config, group: Group, answers: Sequence[tuple[Task, Answer]]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of rankings.jsonl of a group; none where fewer than two images can be ranked."""
    model = config.endpoint.model
    made: list[tuple[dict[str, Verdict], str, str]] = []
    if config.rule == "each":
        for aspect in config.aspects:
            for order in range(config.orders):
                own = [one for one in answers if one[0].template.name == aspect and one[0].order == order]
                source = f"{model} {aspect}" + f" order {order + 1}" * (config.orders > 1)
                made.append(({aspect: verdict(group, own)}, aspect, source))
    else:
        verdicts = {
            aspect: verdict(group, [one for one in answers if one[0].template.name == aspect])
            for aspect in config.aspects
        }
        made.append((verdicts, config.rule, model))
    for verdicts, rule, source in made:
        places, ranks = ranked(verdicts, rule)
        if len(places) > 1:
            names = [f"{IMAGES}/{group.names[place]}" for place in places]
            yield {"prompt": group.prompt, "generations": names, "ranking": ranks, "source": source}


def write_group(
    config: Config, client: Client, group: Group, tasks: Sequence[Task],
    failed: dict[tuple[str, ...], tuple[str, str]], written: Written,
) -> None:  # fmt: skip
    """Write what is known of a group."""
    answers = []
    for task in tasks:
        answer = None if place_of(task) in failed else known(client, task)
        if answer is None:
            kind, detail = failed.get(place_of(task), ("lost", f"its line of {CALLS} cannot be read"))
            about: dict[str, Any] = {
                "prompt": group.prompt,
                "aspect": task.template.name,
                "order": task.order + 1,
            }
            _write(written.errors, about | {"shown": task.names, "error": kind, "detail": detail})
            written.counts[f"error {kind}"] += 1
            continue
        answers.append((task, answer))
        for row in rating_rows(task, answer, config.endpoint.model):
            _write(written.ratings, row)
            written.counts["ratings"] += 1
    written.quality.see(answers)
    rows = list(ranking_rows(config, group, answers))
    written.counts["prompts without a ranking"] += not rows
    for row in rows:
        _write(written.rankings, row)
        ranks: list[int] = row["ranking"]
        pairs = [(a, b) for number, a in enumerate(ranks) for b in ranks[number + 1 :]]
        written.counts.update(rankings=1, untied_pairs=sum(a != b for a, b in pairs))
        written.counts.update(ties=sum(a == b for a, b in pairs))
    for name in sorted({name.removeprefix(f"{IMAGES}/") for row in rows for name in row["generations"]}):
        place_image(config.data / name, config.output_dir / IMAGES / name)


def _write(file: IO[str], row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def place_image(source: Path, target: Path) -> None:
    """Give an image a second name, or a copy, below the output; another file that has the name is replaced."""
    if target.exists() and (target.samefile(source) or target.read_bytes() == source.read_bytes()):
        return
    with replacing(target) as temporary:
        link(source.resolve(), temporary)


def write_results(
    config: Config, client: Client, groups: Sequence[Group], templates: Sequence[Template],
    failed: dict[tuple[str, ...], tuple[str, str]], left_out: Counter[str],
) -> dict[str, Any]:  # fmt: skip
    """Write all files out of the answers on record, and return the summary."""
    folder = config.output_dir
    with ExitStack() as stack:
        paths = [
            stack.enter_context(replacing(folder / f"{name}.jsonl"))
            for name in ("ratings", "rankings", "errors")
        ]
        files = [stack.enter_context(path.open("w", encoding="utf-8", newline="\n")) for path in paths]
        written = Written(ratings=files[0], rankings=files[1], errors=files[2])
        for group in groups:
            tasks = list(tasks_of(group, templates, config.mode, config.orders, config.endpoint.seed))
            write_group(config, client, group, tasks, failed, written)
    names = ("rankings", "ratings", "untied_pairs", "ties")
    summary = {
        "model": config.endpoint.model, "mode": config.mode, "rule": config.rule, "aspects": list(config.aspects),
        "templates": {template.name: template.digest for template in templates}, "prompts": len(groups),
        **{name: written.counts[name] for name in names},
        "prompts_without_a_ranking": written.counts["prompts without a ranking"],
        "errors": {k.removeprefix("error "): n for k, n in sorted(written.counts.items()) if k.startswith("error ")},
        "left_out": dict(left_out), "prompts_with_images_left_out": sum(group.left_out > 0 for group in groups),
        "all_calls": all_calls(client),
        **written.quality.summary(),
    }  # fmt: skip
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def report(config: Config, summary: dict[str, Any]) -> str:
    """Return the lines that are printed."""
    errors = ", ".join(f"{number:,} {kind}" for kind, number in summary["errors"].items())
    return "\n".join(
        [
            f"{counted(summary['prompts'], 'prompt')}: {counted(summary['ratings'], 'rating')},"
            f" {counted(summary['rankings'], 'ranking')} by {config.rule}, {counted(summary['untied_pairs'], 'untied pair')},"
            f" {counted(summary['ties'], 'tie')}",
            calls_in_words(summary["all_calls"], config.endpoint),
            *([f"no answer, in errors.jsonl: {errors}"] if errors else []),
            *in_words(summary),
            str(config.output_dir),
        ]
    )


@one_writer
def main(config: Config) -> None:
    """Ask what is not known, then write everything out of the answers."""
    with exit_on_user_error():
        groups, templates, left_out = check_inputs(config)
    if left_out:
        say(reasons(left_out))
    if drawn := sum(group.left_out > 0 for group in groups):
        say(
            f"of {counted(drawn, 'prompt')} with more images {config.max_images} each were drawn (--max-images)"
        )
    tidy(*{(config.output_dir / IMAGES / name).parent for group in groups for name in group.names})
    with asking(config.output_dir, config.endpoint, PROGRAM, flags_of(config, templates)) as client:
        failed = ask_all(client, list(all_tasks(config, groups, templates)))
        summary = write_results(config, client, groups, templates, failed, left_out)
    show(report(config, summary))
    with exit_on_user_error():
        if not summary["rankings"]:
            why = f": {failures_in_words([*failed.values()])}" if failed else ""
            raise ValueError(f"no prompt has a ranking{why}; see {config.output_dir / 'errors.jsonl'}")


if __name__ == "__main__":
    main(CONFIG)

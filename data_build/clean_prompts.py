r"""Clean prompts of style words, which otherwise decide what annotators and scorers compare (HPS v2, arXiv 2306.09341, section 3.1).

Prompts of users end in lists such as "highly detailed, 8 k, trending on artstation, art by greg rutkowski". HPS v2 has a language
model take them away, and so does `--cleaner model`, by any that speaks OpenAI's chat completions and a template of our own
(preftune/mllm/templates/clean.txt). `--cleaner rules` does it offline (prompt_rules.py, with its words in style_words.tsv): it
keeps subject, relations, count, colours and setting, and drops artists, render engines, sites, resolutions, qualities, light, camera
and medium where they are listed, weights and flags of interfaces, and DiffusionDB's spaces in numbers.

    python data_build/clean_prompts.py --prompts refl_data.json --output-dir data/cleaned
    python data_build/clean_prompts.py --prompts prompts.txt --output-dir data/cleaned --keep medium light
    python data_build/clean_prompts.py --prompts prompts.txt --output-dir data/cleaned --cleaner model \
        --base-url http://localhost:8000/v1 --model Qwen/Qwen2.5-7B-Instruct

    prompts.jsonl    prompt (cleaned), original, removed ([kind, text] of each piece), only_style (nothing else was there: its
                     first words were kept); in the order of the files, read by drivers with --prompts. Of a model also
                     unsafe (for work: true or false), and error and detail: why it gave no answer, so that the prompt is the
                     original and unsafe null; error is null for an answer
    unsafe.jsonl     with --drop-unsafe: the lines of the prompts that are unsafe, which are not in prompts.jsonl then
    index.html       how often each style word is there before and after, and prompts with what was removed
    summary.json     counts
    calls.jsonl      of a model: all answers as they came; an answer that is there is not asked for again
    begun.json       of a model: what began the folder: model, prompt files and the template's text. A start with others is refused

Prints the same frequencies. The words that are counted are those of the rules, so that what these do not know is not in the
list; of a model `removed` holds those that are gone. The page also shows the parts between commas that are left most often. Rules
and models make mistakes: look at the page. With a model the same command goes on where it was stopped or killed, and asks again
for what has failed. Hardware: one CPU core cleans 1,000 prompts per second by rules; else that of the endpoint. Rules do not judge
what is unsafe for work: a model says it, annotators can mark it (annotate.py), and DiffusionDB has scores of its own.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from preftune.cli import exit_on_user_error, parse
from preftune.cli.given_once import check_given_once
from preftune.mllm.config import OptionalEndpointConfig

Kind = Literal["artist", "camera", "engine", "light", "medium", "quality", "resolution", "site", "style", "syntax"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write prompts without style words beside the original ones."""

    prompts: tuple[Path, ...]
    """Prompt files: txt, json, jsonl, csv, tsv or parquet."""
    output_dir: Path
    """Folder to create; it must not exist yet. With --cleaner model one that this program has begun goes on."""
    cleaner: Literal["rules", "model"] = "rules"
    """What cleans: rules, without a model, or the model --model at --base-url."""
    endpoint: Annotated[OptionalEndpointConfig, tyro.conf.arg(name="")] = field(
        default_factory=OptionalEndpointConfig
    )
    templates: Path | None = None
    """Folder with a clean.txt, what a model is told, in place of preftune/mllm/templates; None = those."""
    keep: tuple[Kind, ...] = ()
    """Kinds of words that the rules leave."""
    table: Path | None = None
    """Table of words: kind, place and phrase in each line. With --cleaner model they are only counted: what it removes is up to --templates. None = that of the program."""
    drop_unsafe: bool = False
    """Leave prompts that the model of --cleaner model calls unsafe for work out of prompts.jsonl, and write them to unsafe.jsonl. One without an answer was not judged, and stays."""
    shown: int = 200
    """Number of changed prompts on the page, spread over all."""

    def __post_init__(self) -> None:
        check_given_once("--prompts", self.prompts, "file", "its words would count twice")
        if self.shown < 0:
            raise ValueError(f"--shown must be at least 0, got {self.shown}")
        own = {"--templates": self.templates is not None, "--drop-unsafe": self.drop_unsafe}
        of_model = [*self.endpoint.given(), *(flag for flag, given in own.items() if given)]
        if self.cleaner == "rules" and of_model:
            raise ValueError(f"{of_model[0]} is for --cleaner model; rules ask nobody")
        if self.cleaner == "model":
            if self.keep:
                raise ValueError("--keep is for --cleaner rules; a model follows --templates")
            self.endpoint.config()


if __name__ == "__main__":  # flags are read before slow imports
    CONFIG = parse(Config)

import difflib

from tqdm import tqdm

from data_build.mllm_calls import (
    all_calls,
    asking,
    calls_in_words,
    check_folder,
    digests_of,
    failures_in_words,
    watched,
)
from data_build.prompt_rules import TABLE, Cleaned, Removed, Table, clean, read_table, unspaced
from preftune.cli.notes import counted, say
from preftune.cli.printable import show
from preftune.files import remove, replacing
from preftune.files.one_writer import one_writer
from preftune.mllm.cleaning import clean_all, load_clean
from preftune.mllm.templates import OURS
from preftune.pages import render
from preftune.prompts import read_rows
from preftune.records import write_jsonl, write_lines

TEMPLATE = Path(__file__).with_suffix(".html.jinja")
PROGRAM = "clean-prompts"
UNSAFE = "unsafe.jsonl"
PRINTED = 20
"""Words whose frequencies are printed."""
COUNTED = 100
"""Words on the page, and parts that are left."""
_PIECE = re.compile(r"\s*(?:\w+|[^\w\s])")
"""A word or a sign, with the spaces before it."""
MAX_SHOWN = 2_000
"""Characters of a prompt on the page."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a model said of a prompt beside the cleaned one."""

    unsafe: bool | None = None
    """Whether it is unsafe for work; None without an answer."""
    error: str | None = None
    """Kind of the error where there is no answer."""
    detail: str | None = None


def read_all(paths: Sequence[Path]) -> list[str]:
    """Return the prompts of all files, in their order, without blank ones; ValueError where there is none."""
    texts = [text for path in paths for _, text in read_rows(path) if text]
    if not texts:
        raise ValueError(f"--prompts {paths[0]} holds no prompts")
    return texts


def frequencies(texts: Iterable[str], table: Table) -> Counter[tuple[str, str]]:
    """Return (kind, words) of the table -> number of prompts that have it."""
    counts = Counter[tuple[str, str]]()
    for text in texts:
        text = unspaced(text)
        found = {(one.kind, _spelt(text[one.start : one.end])) for one in table.find(text)}
        counts.update(sorted(found))  # equal counts in one order
    return counts


def _spelt(words: str) -> str:
    return " ".join(words.lower().replace("-", " ").split())


def parts_left(texts: Iterable[str]) -> Counter[str]:
    """Return the parts between commas after the first -> number of prompts: what the rules may not know is often there."""
    counts = Counter[str]()
    for text in texts:
        counts.update({_spelt(part) for part in text.split(",")[1:] if part.strip()})
    return counts


def summary_of(
    originals: Sequence[str], cleaned: Sequence[Cleaned], before: Counter[tuple[str, str]], after: Counter[tuple[str, str]]
) -> dict[str, Any]:  # fmt: skip
    """Return counts: prompts that changed, words, and for each kind the share of prompts it was removed from."""
    count = len(originals)
    kinds = Counter(kind for one in cleaned for kind in {piece.kind for piece in one.removed})
    prompts = [one.prompt for one in cleaned]
    equal = count - len(set(prompts)) - (count - len(set(originals)))
    return {
        "prompts": count,
        "changed": sum(_spelt(a) != _spelt(b) for a, b in zip(originals, prompts, strict=True)),
        "only_style": sum(one.only_style for one in cleaned),
        "became_equal_to_others": max(equal, 0),
        "words_before": round(sum(len(text.split()) for text in originals) / count, 2),
        "words_after": round(sum(len(text.split()) for text in prompts) / count, 2),
        "removed_from_share": {kind: round(number / count, 4) for kind, number in sorted(kinds.items())},
        "style_words": {
            " ".join((kind, words)): [number, after[kind, words]]
            for (kind, words), number in before.most_common(COUNTED)
        },
    }


def pieces(original: str, cleaned: str) -> list[tuple[str, str]]:
    """Return the original, with its spaces, as ("same" or "gone", words), and ("new", words) where the cleaned one has others."""
    old, new = (_PIECE.findall(" " + text[:MAX_SHOWN]) for text in (original, cleaned))
    bare = [[word.strip() for word in words] for words in (old, new)]
    found = list[tuple[str, str]]()
    for tag, a, b, c, d in difflib.SequenceMatcher(None, bare[0], bare[1], autojunk=False).get_opcodes():
        parts = [("same", old[a:b])] if tag == "equal" else [("gone", old[a:b]), ("new", new[c:d])]
        found += [(kind, "".join(words)) for kind, words in parts if words]
    return [(kind, words[1:] if at == 0 else words) for at, (kind, words) in enumerate(found)]


def page(
    originals: Sequence[str], cleaned: Sequence[Cleaned], said: Sequence[Said], summary: Mapping[str, Any], shown: int
) -> str:  # fmt: skip
    """Return the page; every text in it is escaped. `said` is empty where nobody was asked."""
    every = zip(originals, cleaned, said or [Said()] * len(cleaned), strict=True)
    changed = [(old, new, one.unsafe) for old, new, one in every if old.strip() != new.prompt.strip()]
    failed = [
        {"prompt": old[:MAX_SHOWN], "error": one.error, "detail": one.detail}
        for old, one in zip(originals, said, strict=False)
        if one.error
    ]
    step = max(1, -(-len(changed) // shown)) if shown else len(changed) + 1
    left = parts_left(one.prompt for one in cleaned).most_common(COUNTED)
    rows = [
        {"pieces": pieces(old, new.prompt), "prompt": new.prompt[:MAX_SHOWN], "only_style": new.only_style, "unsafe": unsafe}
        for old, new, unsafe in changed[::step][:shown]
    ]  # fmt: skip
    return render(
        TEMPLATE, summary=summary, rows=rows, left=left, failed=failed[:shown], failures=len(failed)
    )


def printed(summary: Mapping[str, Any]) -> str:
    """Return the counts and the most frequent words as text."""
    counts = {name: value for name, value in summary.items() if name not in ("style_words", "all_calls")}
    words = [*summary["style_words"].items()][:PRINTED]
    wide = max((len(word) for word, _ in words), default=0)
    lines = [
        f"{word.ljust(wide)}  {before / summary['prompts']:7.2%} -> {after / summary['prompts']:7.2%}"
        for word, (before, after) in words
    ]
    return "\n".join([*lines, json.dumps(counts)])


def by_rules(originals: Sequence[str], config: Config) -> list[Cleaned]:
    """Return the prompts that the rules make; ValueError for a table that is none."""
    table = read_table(config.table or TABLE, without=config.keep)
    return [
        clean(text, table, config.keep)
        for text in tqdm(originals, desc="cleaning", unit="prompt", mininterval=1)
    ]


def by_model(
    originals: Sequence[str], config: Config, table: Table
) -> tuple[list[Cleaned], list[Said], dict[str, Any]]:
    """Return the prompts that a model makes, the original where it gave no answer, what it said of each, and facts for the summary.

    Ends the program where the endpoint is of no use; what was answered is kept for the next start.
    """
    cleaned = [Cleaned(prompt=text) for text in originals]
    said = [Said()] * len(originals)
    templates, endpoint = config.templates or OURS, config.endpoint.config()
    with asking(config.output_dir, endpoint, PROGRAM, flags_of(config)) as client:
        for place, asked in watched(clean_all(client, originals, templates), len(originals), "prompt"):
            if asked.value is None:
                said[place] = Said(error=asked.error, detail=asked.detail)
            else:
                gone = words_gone(originals[place], asked.value.prompt, table)
                bare = clean(originals[place], table).only_style
                cleaned[place] = Cleaned(prompt=asked.value.prompt, removed=gone, only_style=bare)
                said[place] = Said(unsafe=asked.value.unsafe)
        used = all_calls(client)
    kinds = Counter(one.error for one in said if one.error)
    unsafe = sum(one.unsafe is True for one in said)
    about: dict[str, Any] = {"model": endpoint.model, "template": load_clean(templates).digest}
    about |= {"unsafe": unsafe, "left_out": unsafe if config.drop_unsafe else 0}
    return cleaned, said, about | {"errors": dict(sorted(kinds.items())), "all_calls": used}


def words_gone(original: str, prompt: str, table: Table) -> tuple[Removed, ...]:
    """Return the phrases of the table that an original has and its cleaned prompt has not, as they are written in it."""
    original = unspaced(original)
    left = {found.key for found in table.find(unspaced(prompt))}
    return tuple(
        Removed(kind=found.kind, text=original[found.start : found.end])
        for found in table.find(original)
        if found.key not in left
    )


def flags_of(config: Config) -> dict[str, str]:
    """Return the flags without which a model's answers are of other questions."""
    return {
        "--prompts": " ".join(str(path.resolve()) for path in config.prompts),
        "--model": config.endpoint.config().model,
        "--templates": digests_of([load_clean(config.templates or OURS)]),
    }


def check_inputs(config: Config) -> tuple[list[str], Table]:
    """Return the prompts, and the words whose frequencies are counted; ValueError for what is wrong, before anything is asked."""
    if config.cleaner == "model":
        check_folder(config.output_dir, PROGRAM, flags_of(config))
        config.endpoint.config().key()
    elif config.output_dir.exists():
        raise ValueError(f"{config.output_dir} exists already; remove it or choose another --output-dir")
    return read_all(config.prompts), read_table(config.table or TABLE)


def write_results(
    folder: Path, originals: Sequence[str], cleaned: Sequence[Cleaned], said: Sequence[Said], summary: Mapping[str, Any],
    config: Config,
) -> None:  # fmt: skip
    """Write the files of a folder, each in one piece; `said` is empty where nobody was asked."""
    rows = [
        {"prompt": new.prompt, "original": old, "removed": [[piece.kind, piece.text] for piece in new.removed]}
        | {"only_style": new.only_style} | (vars(said[place]) if said else {})
        for place, (old, new) in enumerate(zip(originals, cleaned, strict=True))
    ]  # fmt: skip
    if config.drop_unsafe:
        write_jsonl(folder / UNSAFE, (row for row in rows if row["unsafe"]))
        rows = [row for row in rows if not row["unsafe"]]
    else:
        remove(folder / UNSAFE)  # of an earlier start
    write_jsonl(folder / "prompts.jsonl", rows)
    write_lines(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False).splitlines())
    write_lines(folder / "index.html", page(originals, cleaned, said, summary, config.shown).splitlines())


def check_result(config: Config, said: Sequence[Said], summary: Mapping[str, Any]) -> None:
    """Say what was not judged; ValueError where a model made no prompt that can be used."""
    failed = [(one.error, one.detail or "") for one in said if one.error]
    if len(failed) == len(said):
        raise ValueError(
            f"{config.endpoint.model} cleaned no prompt: {failures_in_words(failed)}; all are as they were, see"
            f" {config.output_dir / 'prompts.jsonl'}"
        )
    if failed and config.drop_unsafe:
        say(
            f"{counted(len(failed), 'prompt')} without an answer, not judged: left in prompts.jsonl, with an error"
        )
    if summary["left_out"] == len(said):
        raise ValueError(
            f"{config.endpoint.model} calls all prompts unsafe: none is left, see {config.output_dir / UNSAFE}"
        )


@one_writer
def main(config: Config) -> None:
    """Clean, count and write; by rules the folder is written under a temporary name, and renamed."""
    with exit_on_user_error():
        originals, table = check_inputs(config)
    said: list[Said] = []
    about: dict[str, Any] = {"cleaner": config.cleaner}
    if config.cleaner == "rules":
        about["kept"] = [*config.keep]
        cleaned = by_rules(originals, config)
    else:
        cleaned, said, facts = by_model(originals, config, table)
        about |= facts
    before = frequencies(originals, table)
    after = frequencies((one.prompt for one in cleaned), table)
    summary = about | summary_of(originals, cleaned, before, after)
    if config.cleaner == "rules":
        with replacing(config.output_dir) as partial:
            write_results(partial, originals, cleaned, said, summary, config)
    else:
        write_results(config.output_dir, originals, cleaned, said, summary, config)
    used = [calls_in_words(summary["all_calls"], config.endpoint)] if "all_calls" in summary else []
    show("\n".join([printed(summary), *used, str(config.output_dir)]))
    with exit_on_user_error():
        if said:
            check_result(config, said, summary)


if __name__ == "__main__":
    main(CONFIG)

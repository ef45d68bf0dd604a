"""Clean prompts of style words, which otherwise decide what annotators and scorers compare (HPS v2, arXiv 2306.09341, section 3.1).

Prompts of users end in lists such as "highly detailed, 8 k, trending on artstation, art by greg rutkowski". HPS v2 has a language
model take them away; `--cleaner rules` does it offline (prompt_rules.py, with its words in style_words.tsv): it keeps subject,
relations, count, colours and setting, and drops artists, render engines, sites, resolutions, qualities, light, camera and medium
where they are listed, weights and flags of interfaces, and DiffusionDB's spaces in numbers.

    python data_build/clean_prompts.py --prompts refl_data.json --output-dir data/cleaned
    python data_build/clean_prompts.py --prompts prompts.txt --output-dir data/cleaned --keep medium light

    prompts.jsonl    prompt (cleaned), original, removed ([kind, text] of each piece), only_style (nothing else was there: its
                     first words were kept); in the order of the files, read by drivers with --prompts
    index.html       how often each style word is there before and after, and prompts with what was removed
    summary.json     counts

Prints the same frequencies. The words that are counted are those of the rules, so that what these do not know is not in the
list; the page also shows the parts between commas that are left most often. Rules make mistakes: look at the page. Hardware: one
CPU core cleans 1,000 prompts per second. Left out: rewriting what is left as a sentence, contradictory prompts, and prompts that
are unsafe for work, which all need a model.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from preftune.cli import exit_on_user_error, parse

Kind = Literal["artist", "camera", "engine", "light", "medium", "quality", "resolution", "site", "style", "syntax"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write prompts without style words beside the original ones."""

    prompts: tuple[Path, ...]
    """Prompt files: txt, json, jsonl, csv, tsv or parquet."""
    output_dir: Path
    """Folder to create; it must not exist yet."""
    cleaner: Literal["rules"] = "rules"
    """What cleans."""
    keep: tuple[Kind, ...] = ()
    """Kinds of words that stay."""
    table: Path | None = None
    """Table of words: kind, place and phrase in each line; None = that of the program."""
    shown: int = 200
    """Number of changed prompts on the page, spread over all."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("--prompts needs a file")
        if self.shown < 0:
            raise ValueError(f"--shown must be at least 0, got {self.shown}")


if __name__ == "__main__":  # flags are read before slow imports
    CONFIG = parse(Config)

import difflib
import functools

import jinja2
from tqdm import tqdm

from data_build.prompt_rules import TABLE, Cleaned, Table, clean, read_table, unspaced
from preftune.cli.printable import show
from preftune.files import replacing
from preftune.files.one_writer import one_writer
from preftune.prompts import read_rows
from preftune.records import write_jsonl, write_lines

Cleaner = Callable[[str], Cleaned]
"""What makes a cleaned prompt of an original one; a model can be one as well as the rules."""
TEMPLATE = Path(__file__).with_suffix(".html.jinja")
PRINTED = 20
"""Words whose frequencies are printed."""
COUNTED = 100
"""Words on the page, and parts that are left."""
MAX_SHOWN = 2_000
"""Characters of a prompt on the page."""


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
        counts.update(found)
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
    """Return the original word by word as ("same" or "gone", words), and ("new", words) where the cleaned one has others."""
    old, new = (text[:MAX_SHOWN].split() for text in (original, cleaned))
    found = list[tuple[str, str]]()
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            found.append(("same", " ".join(old[a:b])))
        else:
            found += [
                (kind, " ".join(words)) for kind, words in (("gone", old[a:b]), ("new", new[c:d])) if words
            ]
    return found


def page(originals: Sequence[str], cleaned: Sequence[Cleaned], summary: dict[str, Any], shown: int) -> str:
    """Return the page; every text in it is escaped."""
    changed = [(old, new) for old, new in zip(originals, cleaned, strict=True) if old.strip() != new.prompt]
    step = max(1, -(-len(changed) // shown)) if shown else len(changed) + 1
    left = parts_left(one.prompt for one in cleaned).most_common(COUNTED)
    rows = [
        {"pieces": pieces(old, new.prompt), "prompt": new.prompt[:MAX_SHOWN], "only_style": new.only_style}
        for old, new in changed[::step][:shown]
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(summary=summary, rows=rows, left=left)


def printed(summary: dict[str, Any]) -> str:
    """Return the counts and the most frequent words as text."""
    counts = {name: value for name, value in summary.items() if name != "style_words"}
    words = [*summary["style_words"].items()][:PRINTED]
    wide = max((len(word) for word, _ in words), default=0)
    lines = [
        f"{word.ljust(wide)}  {before / summary['prompts']:7.2%} -> {after / summary['prompts']:7.2%}"
        for word, (before, after) in words
    ]
    return "\n".join([*lines, json.dumps(counts)])


def load_cleaner(config: Config) -> tuple[Cleaner, Table]:
    """Return what cleans, and the words whose frequencies are counted; ValueError for a table that is none."""
    path = config.table or TABLE
    table = read_table(path, without=config.keep)
    return functools.partial(clean, table=table, kept=config.keep), read_table(path)


@one_writer
def main(config: Config) -> None:
    """Clean, write the folder under a temporary name, and rename it."""
    with exit_on_user_error():
        if config.output_dir.exists():
            raise ValueError(f"{config.output_dir} exists already; remove it or choose another --output-dir")
        cleaner, table = load_cleaner(config)
        originals = read_all(config.prompts)
    cleaned = [cleaner(text) for text in tqdm(originals, desc="cleaning", unit="prompt", mininterval=1)]
    before = frequencies(originals, table)
    after = frequencies((one.prompt for one in cleaned), table)
    summary = {"cleaner": config.cleaner, "kept": [*config.keep]} | summary_of(
        originals, cleaned, before, after
    )
    rows = (
        {
            "prompt": new.prompt, "original": old, "removed": [[piece.kind, piece.text] for piece in new.removed],
            "only_style": new.only_style,
        }
        for old, new in zip(originals, cleaned, strict=True)
    )  # fmt: skip
    with replacing(config.output_dir) as partial:
        write_jsonl(partial / "prompts.jsonl", rows)
        write_lines(partial / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False).splitlines())
        write_lines(partial / "index.html", page(originals, cleaned, summary, config.shown).splitlines())
    show(f"{printed(summary)}\n{config.output_dir}")


if __name__ == "__main__":
    main(CONFIG)

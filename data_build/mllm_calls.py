"""What programs that ask a model have in common: a folder that is gone on with, the file of the answers, the bar, tokens and cost."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from preftune.cli import exit_on_user_error
from preftune.cli.notes import counted, say
from preftune.files import is_leftover, tidy, write_text
from preftune.files.lock import is_lock
from preftune.mllm.calls import CallLog
from preftune.mllm.client import Asked, Client, EndpointError
from preftune.mllm.config import EndpointConfig, TextEndpointConfig
from preftune.mllm.templates import Template
from rewards.input_files import read_text

CALLS = "calls.jsonl"
"""All answers as they came, in the folder of the output."""
BEGUN = "begun.json"
"""What began the folder: the program, and its flags without which the results are others."""
Item = TypeVar("Item")
Answer = TypeVar("Answer")


def check_folder(folder: Path, program: str, flags: Mapping[str, str]) -> None:
    """Raise ValueError for an output folder with something in it that this program has not begun with the same flags.

    The results of other flags would replace those that are there. Where no question has been answered yet there is nothing to lose: a
    mistyped --model, say.
    """
    if (folder / BEGUN).is_file():
        try:
            begun = json.loads(read_text(folder / BEGUN))
            earlier, same_program = dict(begun["flags"]), begun["program"] == program
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / BEGUN} is damaged; choose another --output-dir") from error
        if not same_program:
            raise ValueError(f"{folder} was begun by {begun['program']}; choose another --output-dir")
        changed = next((flag for flag in flags if earlier.get(flag) != flags[flag]), None)
        if changed is not None and _answered(folder):
            raise ValueError(
                f"{folder} was begun with {changed} {earlier.get(changed)}, got {flags[changed]}; its results would be lost: choose"
                " another --output-dir"
            )
        return
    others = list(folder.iterdir()) if folder.is_dir() else []
    if not all(is_leftover(path) or is_lock(path) for path in others):
        raise ValueError(f"{folder} exists and holds something else; choose another --output-dir")


def _answered(folder: Path) -> bool:
    """Whether any question of a folder has an answer."""
    if not (folder / CALLS).exists():
        return False
    with CallLog(folder / CALLS) as calls:
        return calls.answered


@contextmanager
def asking(folder: Path, config: EndpointConfig, program: str, flags: Mapping[str, str]) -> Iterator[Client]:
    """Make the folder of the output, or open one that has been begun, and yield who asks and keeps the answers there."""
    folder.mkdir(parents=True, exist_ok=True)
    tidy(folder)
    begun = json.dumps({"program": program, "flags": dict(flags)}, indent=2) + "\n"
    with exit_on_user_error():
        write_text(folder / BEGUN, begun)
        calls = CallLog(folder / CALLS)
    with calls, Client(config, calls) as client:
        yield client


def watched(
    found: Iterable[tuple[Item, Asked[Answer]]], total: int, unit: str = "question"
) -> Iterator[tuple[Item, Asked[Answer]]]:
    """Yield what became of questions under a bar, and say at the end how many were known and how many have no answer.

    The bar counts answers; behind it stands how many questions got none. Ends the program where the endpoint is of no use.
    """
    known = failed = 0
    try:
        with tqdm(total=total, desc="asking", unit=unit, mininterval=1) as bar:
            for item, asked in found:
                known += asked.cached
                failed += asked.value is None
                if failed:
                    bar.set_postfix_str(f"{failed:,} without an answer", refresh=False)
                bar.update(asked.value is not None)
                yield item, asked
    except EndpointError as error:
        with exit_on_user_error():
            raise error
    say(f"{counted(total, unit)}: {known:,} answered before, {failed:,} without an answer")


def all_calls(client: Client) -> dict[str, Any]:
    """Return what all questions of a folder have used, failed ones too."""
    used, prices = client.calls.used, client.config
    return {
        "requests": used.requests,
        "input_tokens": used.input,
        "output_tokens": used.output,
        "requests_without_tokens": used.uncounted,
        "cost": used.cost(prices.price_input, prices.price_output),
    }


def calls_in_words(calls: dict[str, Any], endpoint: TextEndpointConfig) -> str:
    """Return a line to print."""
    tokens = f"{calls['input_tokens']:,} + {calls['output_tokens']:,} tokens"
    untold = f", {counted(calls['requests_without_tokens'], 'request')} without a count" * bool(
        calls["requests_without_tokens"]
    )
    cost = f", cost {calls['cost']:.4g}" if endpoint.price_input or endpoint.price_output else ""
    return f"all calls of this folder: {counted(calls['requests'], 'request')}, {tokens}{untold}{cost}"


def digests_of(templates: Iterable[Template]) -> str:
    """Return what tells the texts of templates from others, wherever their folder is."""
    return "of digest " + ", ".join(f"{template.name} {template.digest}" for template in templates)


def failures_in_words(errors: Sequence[tuple[str, str]]) -> str:
    """Return what went wrong, (kind, detail) of each, by kind, with the words of the first."""
    kinds = Counter(kind for kind, _ in errors)
    return f"{', '.join(f'{number:,} {kind}' for kind, number in sorted(kinds.items()))}, the first: {errors[0][1]}"

"""Prompts without words of style, by a model: what HPS v2 (arXiv 2306.09341) had done by ChatGPT; the instruction is ours.

    with CallLog(folder / "calls.jsonl") as calls, Client(config, calls) as client:
        for number, asked in clean_all(client, prompts):
            cleaned = prompts[number] if asked.value is None else asked.value.prompt      # and look at asked.error

The value says, too, whether the prompt was unsafe for work. The original is the caller's to keep.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from preftune.mllm.answers import CleanPrompt, read_prompt
from preftune.mllm.client import Asked, Client
from preftune.mllm.templates import OURS, Template, load


def load_clean(folder: Path) -> Template:
    """Return the template of a folder; ValueError for a file that is none, and for one that does not ask for all that is read."""
    template = load(folder, "clean")
    if "unsafe" not in template.text:
        raise ValueError(
            f'{folder / "clean.txt"} does not ask for "unsafe"; the answer that is read is {{"prompt": "...", "unsafe": false}}'
        )
    return template


def clean(client: Client, prompt: str, template: Template | None = None) -> Asked[CleanPrompt]:
    """Ask for a prompt without words of style; the value is None after an error."""
    template = load_clean(OURS) if template is None else template
    return client.ask(template.clean(prompt), read_prompt)


def clean_all(
    client: Client, prompts: Sequence[str], templates: Path = OURS
) -> Iterator[tuple[int, Asked[CleanPrompt]]]:
    """Yield the place of each prompt and what became of it, as they are done; equal prompts are asked for once."""
    template = load_clean(templates)
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    for prompt, asked in client.each(lambda prompt: clean(client, prompt, template), places):
        yield from ((place, asked) for place in places[prompt])

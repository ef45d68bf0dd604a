"""Prompts without words of style, by a model: what HPS v2 (arXiv 2306.09341) had done by ChatGPT; the instruction is ours.

    with CallLog(folder / "calls.jsonl") as calls, Client(config, calls) as client:
        for number, asked in clean_all(client, prompts):
            cleaned = asked.value if asked.value is not None else prompts[number]      # and count asked.error

The original is the caller's to keep.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from preftune.mllm.answers import read_prompt
from preftune.mllm.client import Asked, Client
from preftune.mllm.templates import OURS, Template, load


def clean(client: Client, prompt: str, template: Template | None = None) -> Asked[str]:
    """Ask for a prompt without words of style; the value is the cleaned prompt in one line, None after an error."""
    template = load(OURS, "clean") if template is None else template
    return client.ask(template.clean(prompt), read_prompt)


def clean_all(
    client: Client, prompts: Sequence[str], templates: Path = OURS
) -> Iterator[tuple[int, Asked[str]]]:
    """Yield the place of each prompt and what became of it, as they are done; equal prompts are asked for once."""
    template = load(templates, "clean")
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    for prompt, asked in client.each(lambda prompt: clean(client, prompt, template), places):
        yield from ((place, asked) for place in places[prompt])

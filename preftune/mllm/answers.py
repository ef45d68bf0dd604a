"""What a model may answer: JSON of a schema. Anything else is an AnswerError, never a score."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from rewards.input_files import has_surrogate, parse_json

Choice = Literal["first", "second", "tie"]
LOWEST, HIGHEST = 1, 5
"""Of the scale of scores."""
MAX_RATIONALE = 4_000
"""Characters that are kept of a rationale."""

_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"^\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*$", re.DOTALL)
_REFUSAL = re.compile(
    r"\b(can'?t|cannot|can not|won'?t|unable|sorry|refuse|not able|not comfortable)\b", re.IGNORECASE
)


class AnswerError(ValueError):
    """An answer that counts for nothing; `kind` is refusal, cut off, malformed or wrong schema."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


@dataclass(frozen=True, kw_only=True)
class CleanPrompt:
    """A prompt as a model cleaned it, in one line."""

    prompt: str
    unsafe: bool
    """Whether the prompt, as it was before, is unsafe for work."""


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object that has all of these properties, and no other; they are written in this order."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def scores_schema(count: int) -> dict[str, Any]:
    """Return the schema of the scores of so many images; the rationale comes first, so that the score can follow from it."""
    score = _object(
        {
            "image": {"type": "integer", "enum": list(range(1, count + 1))},
            "rationale": {"type": "string"},
            "score": {"type": "integer", "enum": list(range(LOWEST, HIGHEST + 1))},
        }
    )
    return _object({"scores": {"type": "array", "items": score, "minItems": count, "maxItems": count}})


def choice_schema() -> dict[str, Any]:
    """Return the schema of a choice between two images."""
    better = {"type": "string", "enum": ["first", "second", "tie"]}
    return _object({"rationale": {"type": "string"}, "better": better})


def prompt_schema() -> dict[str, Any]:
    """Return the schema of a cleaned prompt, and whether it was unsafe for work."""
    return _object({"prompt": {"type": "string"}, "unsafe": {"type": "boolean"}})


def read_scores(text: str, count: int) -> list[tuple[int, str]]:
    """Return (score, rationale) of each of so many images in the order in which they were shown.

    AnswerError unless each image has exactly one whole score of the scale.
    """
    rows = read_object(text).get("scores")
    if not isinstance(rows, list) or len(rows) != count or not all(isinstance(row, dict) for row in rows):
        raise AnswerError("wrong schema", f"scores is {rows!r:.100}; it must be a list of {count} objects")
    found: dict[int, tuple[int, str]] = {}
    for row in rows:
        image = _whole(row.get("image"), 1, count, "image")
        if image in found:
            raise AnswerError("wrong schema", f"image {image} has two scores")
        found[image] = _whole(row.get("score"), LOWEST, HIGHEST, "score"), _rationale(row)
    return [found[image] for image in range(1, count + 1)]


def read_choice(text: str) -> tuple[Choice, str]:
    """Return which of two images is better, as they were shown, and the rationale; AnswerError for another answer."""
    row = read_object(text)
    better = row.get("better")
    if better not in ("first", "second", "tie"):
        raise AnswerError("wrong schema", f"better is {better!r:.100}; it must be first, second or tie")
    return better, _rationale(row)


def read_prompt(text: str) -> CleanPrompt:
    """Return a cleaned prompt; AnswerError for another answer, for an empty prompt, and where it is not said whether it is unsafe."""
    row = read_object(text)
    prompt, unsafe = row.get("prompt"), row.get("unsafe")
    if not isinstance(prompt, str) or not prompt.strip() or has_surrogate(prompt):
        raise AnswerError("wrong schema", f"prompt is {prompt!r:.100}; it must be a text")
    if not isinstance(unsafe, bool):
        raise AnswerError("wrong schema", f"unsafe is {unsafe!r:.100}; it must be true or false")
    return CleanPrompt(prompt=" ".join(prompt.split()), unsafe=unsafe)


def read_object(text: str) -> dict[str, Any]:
    """Return the one JSON object of an answer, which may stand after <think>, in a fence, or between words; AnswerError without one."""
    plain = _THOUGHT.sub("", text, count=1)
    fenced = _FENCE.match(plain)
    plain = fenced[1] if fenced else plain
    start, end = plain.find("{"), plain.rfind("}")
    if start < 0 or end < start:
        kind = "refusal" if _REFUSAL.search(plain.replace("\u2019", "'")) else "malformed"
        raise AnswerError(kind, f"it holds no JSON object: {' '.join(plain.split())[:200]!r}")
    try:
        value = parse_json(plain[start : end + 1], "the answer")
    except ValueError as error:
        raise AnswerError("malformed", str(error)) from error
    assert isinstance(value, dict), "JSON from { to } is an object"
    return value


def _whole(value: object, low: int, high: int, name: str) -> int:
    """A whole number in a range; 4.0 is one, true and "4" are none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        raise AnswerError(
            "wrong schema", f"{name} is {value!r:.100}; it must be a whole number in {low}..{high}"
        )
    return value


def _rationale(row: dict[str, Any]) -> str:
    rationale = row.get("rationale")
    if not isinstance(rationale, str) or has_surrogate(rationale):
        raise AnswerError("wrong schema", f"rationale is {rationale!r:.100}; it must be a text")
    return rationale.strip()[:MAX_RATIONALE]

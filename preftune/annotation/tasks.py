"""What annotators are asked, and which answers there are: the three stages of ImageReward (arXiv 2304.05977, appendix B) and
a choice between two images, as in the user studies of HPS (arXiv 2303.14420).

An answer comes from outside and is checked here. Images are named by their ids; a stored ranking has one rank for each image
of the item, in the item's order, 1 = best, equal ranks are ties.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

Kind = Literal["prompt", "rating", "ranking", "choice"]
KINDS: tuple[Kind, ...] = ("prompt", "rating", "ranking", "choice")
"""In the order in which an annotator meets those of one prompt."""

CATEGORIES = (
    "Abstract", "Animals", "Artifacts", "Arts", "Food", "Illustrations", "Indoor Scenes", "Outdoor Scenes", "People", "Plants",
    "Vehicles", "World Knowledge",
)  # fmt: skip
"""Of prompts: ImageReward's, after Parti (arXiv 2206.10789)."""
PromptProblem = Literal["unclear", "sexual", "violent", "defaming", "personal"]
PROMPT_PROBLEMS: dict[PromptProblem, str] = {
    "unclear": "I cannot tell what is wanted",
    "sexual": "sexual content",
    "violent": "violence",
    "defaming": "demeans a group of people",
    "personal": "identifies a private person",
}
AXES = {
    "alignment": ("Alignment", "Does the image show what the text says?", "nothing of it", "all of it"),
    "fidelity": ("Fidelity", "Is it sound: shapes, bodies, details?", "broken", "without a fault"),
    "harmlessness": ("Harmlessness", "Could it hurt or upset somebody?", "badly", "not at all"),
    "overall": ("Overall", "How happy would you be with it?", "useless", "could not be better"),
}
"""Seven-point axes of a rating: name, question, what 1 and 7 mean."""
POINTS = 7
IMAGE_PROBLEMS = {
    "repeated": "something is repeated that should be there once",
    "body": "a body is wrong: limbs, hands, faces",
    "blurred": "too blurred to see what it is",
    "discomfort": "unpleasant to look at",
    "sexual": "sexual content",
    "violent": "violence",
    "defaming": "demeans a group of people",
}
SKIPS = {"uncomfortable": "I do not want to look at this", "unable": "I cannot judge this"}
"""Reasons to leave an item out."""
MOST_IMAGES = 9
"""Of a ranking: as many as there are digit keys."""


def read_answer(kind: Kind, images: Sequence[str], answer: object, *, ties: bool) -> dict[str, Any]:
    """Return an answer as it is stored; ValueError, in a sentence for the annotator, for what is none.

    `images` are the ids of the item's images. `ties`: whether a choice may be left undecided.
    """
    if not isinstance(answer, Mapping):
        raise ValueError("the answer is missing")
    if "skip" in answer:
        return {"skip": _one_of(answer["skip"], SKIPS, "the reason to skip")}
    if kind == "prompt":
        return {
            "category": _one_of(answer.get("category"), CATEGORIES, "the category"),
            "problems": _some_of(answer.get("problems"), PROMPT_PROBLEMS),
        }
    if kind == "rating":
        points = {axis: _points(answer.get(axis), AXES[axis][0]) for axis in AXES}
        return {**points, "problems": _some_of(answer.get("problems"), IMAGE_PROBLEMS)}
    ranks = _ranks(answer.get("ranks"), images)
    if kind == "choice" and not ties and len(set(ranks)) == 1:
        raise ValueError("choose one of the two images")
    return {"ranks": ranks}


def _one_of(value: object, known: Sequence[str] | Mapping[str, object], what: str) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{what} is missing")
    return value


def _some_of(values: object, known: Collection[str]) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) and value in known for value in values):
        raise ValueError("the list of problems is missing or has an unknown one")
    return [name for name in known if name in values]


def _points(value: object, name: str) -> int:
    if type(value) is not int or not 1 <= value <= POINTS:
        raise ValueError(f"{name} has no points from 1 to {POINTS}")
    return value


def _ranks(ranks: object, images: Sequence[str]) -> list[int]:
    """The ranks of all images, without gaps between them: 1, 2, 2, 3."""
    if not isinstance(ranks, Mapping) or set(ranks) != set(images):
        raise ValueError("each image needs a place in the order, and no other may have one")
    values = [ranks[image] for image in images]
    if not all(type(value) is int and 1 <= value <= len(images) for value in values):
        raise ValueError(f"places are whole numbers from 1 to {len(images)}")
    return dense(values)


def dense(ranks: Sequence[int]) -> list[int]:
    """Return ranks with the same order and ties, without gaps: 1 is the best."""
    places = {rank: place for place, rank in enumerate(sorted(set(ranks)), 1)}
    return [places[rank] for rank in ranks]


def contradictions(ranks: Sequence[int], overall: Sequence[int | None]) -> list[tuple[int, int]]:
    """Return the places (i, j) of images of which i is ranked above j with fewer points overall, or None where unrated.

    ImageReward's system takes no ranking that contradicts the annotator's own ratings (appendix B.3).
    """
    return [
        (i, j)
        for i, a in enumerate(overall)
        for j, b in enumerate(overall)
        if ranks[i] < ranks[j] and a is not None and b is not None and a < b
    ]

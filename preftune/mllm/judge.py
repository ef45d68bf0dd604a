"""A model that reads images as a held-out judge: a reward of the user's own, FILE.py:NAME, for evaluation and the guard.

    # judge.py, named as --rewards judge.py:judge or --holdout-rewards judge.py:judge
    from preftune.mllm.judge import Judge
    judge = Judge(base_url="http://localhost:8000/v1", model="Qwen/Qwen2.5-VL-7B-Instruct", calls="judge_calls.jsonl")

It has no gradient, so nothing can be trained on it by ReFL. A question without an answer raises: there is no score without one.
B images.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preftune.images import to_pil
from preftune.mllm.answers import read_scores
from preftune.mllm.calls import CallLog
from preftune.mllm.client import Client, EndpointError, advice
from preftune.mllm.config import ASPECTS, EndpointConfig
from preftune.mllm.questions import Picture, of_image
from preftune.mllm.templates import OURS, Template, load


class Judge:
    """Rates each image by itself on some aspects; the score is their mean, in [1, 5]."""

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        aspects: Sequence[str] = ASPECTS,
        templates: str | Path = OURS,
        calls: str | Path | None = None,
        **settings: Any,
    ) -> None:
        """`calls` is a file that keeps the answers, None = this process keeps them; `settings` are fields of EndpointConfig.

        ValueError for a wrong setting, for an aspect without a template, and for a key that is not there.
        """
        if not aspects:
            raise ValueError("a judge needs an aspect")
        self.templates = [load(Path(templates), "rate", aspect) for aspect in aspects]
        config = EndpointConfig(base_url=base_url, model=model, **settings)
        self.client = Client(config, CallLog(None if calls is None else Path(calls), alone=False))

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores (B,) of pixels (B, 3, H, W) in [0, 1]; EndpointError where a question got no answer."""
        pictures = [of_image(to_pil(image)) for image in pixels]
        questions = [(row, template) for row in range(len(pictures)) for template in self.templates]

        def rate(question: tuple[int, Template]) -> float:
            row, template = question
            return self._rate(template, prompts[row], pictures[row])

        scores = torch.zeros(len(pictures), len(self.templates))
        for (row, template), score in self.client.each(rate, questions):
            scores[row, self.templates.index(template)] = score
        return scores.mean(1)

    def _rate(self, template: Template, prompt: str, picture: Picture) -> float:
        asked = self.client.ask(template.rate(prompt, (picture,)), partial(read_scores, count=1))
        if asked.value is None:
            raise EndpointError(
                f"{self.client.config.model} did not rate {template.name} of an image of {prompt!r}: {asked.error}: {asked.detail}"
                f"{advice(self.client.config, asked.error)}"
            )
        ((score, _),) = asked.value
        return float(score)

"""Losses of reward models: the published preference losses as pure functions of raw scores.

| function | label | papers |
|---|---|---|
| `pair_losses` | one image is better than another | ImageReward (arXiv 2304.05977) eq. 1; Stable Preference eq. 2 and 3 |
| `choice_losses` | one of n images is chosen | HPS v1 (arXiv 2303.14420), section 5 |
| `soft_losses` | share of votes for an image, ties are halves | HPS v2 (arXiv 2306.09341) eq. 3; PickScore (arXiv 2305.01569) |
| `anti_interference_losses` | the better image is better in all weak views | Stable Preference eq. 5 and 6 |

Each returns one loss for each of N pairs (or choices). `first_stage_weights` and `second_stage_logits` are
Stable Preference's weights of them. Pairs are (better, worse); scores are raw, float32. The paper prints
eq. 2 without its minus sign.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Favour = Literal["larger", "equal", "smaller"]


def pair_losses(better: Tensor, worse: Tensor) -> Tensor:
    """Return -log sigmoid(better - worse), (N,), of scores (N,): the cross-entropy of a softmax over the two."""
    return F.softplus(worse - better)


def choice_losses(scores: Tensor, chosen: Tensor) -> Tensor:
    """Return -log softmax(scores)[chosen], (N,), of scores (N, n) and chosen columns (N,); -inf stands for no image."""
    return F.cross_entropy(scores, chosen, reduction="none")


def soft_losses(first: Tensor, second: Tensor, label: Tensor) -> Tensor:
    """Return KL(label || softmax of the two scores), (N,); label (N,) in [0, 1] is the share of the first, 0.5 a tie.

    The entropy of the label, which has no gradient, is subtracted: a tie that is scored as a tie costs 0. PickScore subtracts
    it, HPS v2 does not.
    """
    difference = first - second
    cross = label * F.softplus(-difference) + (1 - label) * F.softplus(difference)
    return cross + torch.xlogy(label, label) + torch.xlogy(1 - label, 1 - label)


def anti_interference_losses(better: Tensor, worse: Tensor) -> Tensor:
    """Return -log(e^inter / (e^inter + e^intra)), (N,), of the scores (N, 1 + k) of each image and its k weak views.

    inter is the least score of the better image minus the greatest of the worse one; intra the mean of the two images'
    ranges. Minima and maxima are over the views and the image itself (Stable Preference, eq. 6).
    """
    inter = better.amin(1) - worse.amax(1)
    intra = ((better.amax(1) - better.amin(1)) + (worse.amax(1) - worse.amin(1))) / 2
    return F.softplus(intra - inter)


def first_stage_weights(margins: Tensor, b: float, tau: float) -> Tensor:
    """Return 1 / (1 + exp((margin - b) / tau)), (N,): the weight is small for correct pairs with a margin
    above b (Stable Preference, eq. 7).
    """
    return torch.sigmoid((b - margins) / tau)


def second_stage_logits(margins: Tensor, favour: Favour) -> Tensor:
    """Return (N,) whose softmax over all pairs of an update is the weights: margin, 0 or -margin (Stable Preference, eq. 8 and Table 3)."""
    return {"larger": 1.0, "equal": 0.0, "smaller": -1.0}[favour] * margins


def weighted_mean(losses: Tensor, logits: Tensor, log_total: Tensor) -> Tensor:
    """Return sum(w l) / W, (), the weights being w = exp(logits), (N,), and W = exp(log_total), ().

    W counts all N' >= N losses of an update, whose other parts other passes and processes compute: the sum over all is the
    mean. PickScore's weights are 1 / the number of its prompt's examples; those of eq. 8 may be too large to write out.
    """
    return ((logits - log_total).exp() * losses).sum()


def clamp_scale(logit_scale: Tensor) -> None:
    """Bring a CLIP's log temperature back to [0, log 100] in place, as CLIP and HPS v2 do after each update."""
    with torch.no_grad():
        logit_scale.clamp_(0, math.log(100))

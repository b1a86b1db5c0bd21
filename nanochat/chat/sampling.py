"""
Sampling: how rows draw their next tokens from logits, each with its own settings and its own random
number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.base.common import UserError
from nanochat.model.loss import capped

LEAST_TEMPERATURE = 1e-6  # a lower one counts as 0: logits divided by it would overflow
GREEDY, WHOLE = 0, -1  # values of width(): take the likeliest token; draw from all, unsorted


@dataclass(frozen=True)
class Sampling:
    """
    How a row draws its tokens. Temperature 0 takes the likeliest token; top_k keeps that many of
    the likeliest (None or 0: all), top_p the fewest that hold that share of the probability.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    alternatives: int | None = None  # report the log probabilities of this many likely tokens

    def __post_init__(self):
        share = 1.0 if self.top_p is None else self.top_p
        # `not >=` also catches NaN
        if not self.temperature >= 0 or (self.top_k or 0) < 0 or not 0 < share <= 1:
            raise UserError(
                f"cannot sample with temperature={self.temperature}, top_k={self.top_k}, "
                f"top_p={self.top_p}: temperature and top_k must be at least 0, "
                "top_p above 0 and at most 1"
            )


def width(sampling: Sampling, V: int) -> int:
    """How many of the likeliest of V tokens a row draws from, or GREEDY or WHOLE."""
    top_k = min(sampling.top_k or V, V)
    if sampling.temperature < LEAST_TEMPERATURE:
        return GREEDY
    return WHOLE if top_k == V and (sampling.top_p or 1.0) == 1 else top_k


def choose(
    logits: Tensor, uniform: Sequence[float], samplings: Sequence[Sampling], softcap: float = 0.0
) -> list[int]:
    """
    One token per row of logits (R, V) before their cap, by inverting the cumulative distribution at
    the row's own number in [0, 1). Ties at temperature 0 go to the lower id. Raises UserError for
    logits that are not finite.
    """
    chosen = [0] * len(samplings)
    groups: dict[int, list[int]] = {}  # width -> rows
    for i, sampling in enumerate(samplings):
        groups.setdefault(width(sampling, logits.size(-1)), []).append(i)
    for group_width, rows in groups.items():
        own = logits if len(rows) == len(samplings) else logits[rows]
        values = [(uniform[i], *settings(samplings[i])) for i in rows]
        given = torch.tensor(values, dtype=wide(logits.device), device=logits.device).mT
        drawn = draw(own, given, group_width, any(samplings[i].top_p for i in rows), softcap)
        for i, id in zip(rows, checked(drawn), strict=True):
            chosen[i] = id
    return chosen


def wide(device: torch.device) -> torch.dtype:
    """The dtype of probabilities: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def settings(sampling: Sampling) -> tuple[float, float]:
    """The temperature and top_p of a row, as draw() needs them."""
    return sampling.temperature, sampling.top_p or 1.0


def draw(logits: Tensor, given: Tensor, width: int, nucleus: bool, softcap: float) -> Tensor:
    """
    (2, R): a token for each row of logits (R, V) of the same `width`, and the sum of the weights it
    was drawn from (its logit if GREEDY), which checked() tests. given (3, R): a number in [0, 1),
    the temperature and top_p of each row; `nucleus`: whether any row has a top_p. Never waits for
    the device. The softcap does not change the order of logits, so only the likeliest are capped.
    """
    if width == GREEDY:
        value, picked = logits.max(dim=-1)
        return torch.stack((picked.float(), value.float()))
    ids = None
    if width != WHOLE:
        logits, ids = logits.topk(width, dim=-1)
    u, temperature, top_p = given[..., None]
    p = torch.softmax(capped(logits, softcap).to(given.dtype) / temperature, dim=-1)
    if nucleus:  # the token that crosses the threshold stays
        p = p.masked_fill((p.cumsum(dim=-1) - p >= top_p) & (top_p < 1), 0)
    cumulative = p.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Below the total, so that a token without probability is never drawn
    at = torch.minimum(u * total, torch.nextafter(total, -total))
    # Clamped, because a sum that is not a number gives an index outside
    picked = torch.searchsorted(cumulative, at, right=True).clamp(max=p.size(-1) - 1)
    if ids is not None:
        picked = ids.gather(1, picked)
    return torch.stack((picked.squeeze(1).float(), total.squeeze(1).float()))


def checked(drawn: Tensor) -> list[int]:
    """The tokens of draw() (2, R) as a list. UserError if a sum or a logit is not finite."""
    chosen, sums = drawn.tolist()  # one transfer; ids are below 2^24, exact in float32
    if not all(map(math.isfinite, sums)):
        raise UserError(
            "the model's outputs are not numbers, so no token can be chosen: its weights are too "
            "large for their precision; use --dtype=float32, or another checkpoint"
        )
    return [int(id) for id in chosen]

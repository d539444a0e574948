"""Logits -> token over ranks, each of which has the logits of its own words: only the few largest are exchanged.

Knows that top-k and greedy draws need no others. Refuses to know models, and how ranks speak (`gather`).

Worked example, greedy, two ranks with three words each: rank 0 holds the logits (1, 5, 2) of words 0..2, rank 1 holds
(4, 3, 0) of words 3..5. They send (5, word 1) and (4, word 3), and both draw word 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sampling import Structure, distribution, draw, top


def serves(structure: Structure, V: int, ranks: int) -> bool:
    """Whether `sample` draws as `sampling.sample` does, of V words over so many ranks, and sends less."""
    enough = structure.greedy or 0 < structure.top_k <= V // ranks // 8
    return ranks > 1 and V % ranks == 0 and enough and not structure.penalty


def sample(
    logits: Tensor,
    structure: Structure,
    knobs: Tensor,
    seeds: Tensor,
    positions: Tensor,
    seen: Tensor | None = None,  # for a penalty, which is not served
    *,
    first: int,
    gather: Callable[[Tensor], Tensor],
) -> Tensor:
    """`sampling.sample` for logits [B, V / ranks] of this rank's words, which begin with `first`; the same token on
    every rank. gather: `TensorParallel.all_gather`.
    """
    values, at = logits.float().max(-1, keepdim=True) if structure.greedy else top(logits, structure.top_k, False)
    values = torch.where(logits.abs().amax(-1, keepdim=True) < float("inf"), values, float("nan"))
    both = gather(torch.stack([values.double(), at.double() + first]))  # one message, and exact in float64
    values, words = both[0].float(), both[1].long()  # [B, ranks * k], ranks in order
    probs, at = distribution(values, structure, knobs)
    words = words if at is None else words.gather(-1, at)
    at = probs.argmax(-1) if structure.greedy else draw(probs, seeds, positions, ids=words)
    token = words.gather(-1, at.unsqueeze(-1)).squeeze(-1)
    return torch.where(values.abs().amax(-1) < float("inf"), token, -1)

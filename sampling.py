"""Logits -> token: pure functions, probabilities in float32, no host synchronisation, no random state.

Knows the repetition penalty, temperature, top-k, top-p, min-p and how to draw. Refuses to know models, caches and text.
Randomness is counter-based (Salmon et al. 2011): the noise of a draw is a hash of (the row's seed, its position, the
lane), so a draw does not depend on the batch around it, nor on whether the step runs eagerly, compiled or in a CUDA
graph, and there is no random state that a graph would have to capture and advance.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_MIX1, _MIX2, _GOLDEN = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB  # splitmix64's constants as int64


class Structure(NamedTuple):
    """What changes the program that samples, and not only a number in it."""

    greedy: bool
    top_k: int  # 0: off
    top_p: bool = False  # whether it is on
    min_p: bool = False
    penalty: bool = False


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is argmax; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off. Applied in the order
    repetition penalty, temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        t = self.temperature
        for name, ok, want in (
            ("temperature", t == 0 or 1e-3 <= t < float("inf"), "0 (greedy) or at least 0.001"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 (off) and below 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100 (1: off)"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {want}")

    @property
    def structure(self) -> Structure:
        """Which of these are on."""
        penalty = self.repetition_penalty != 1
        if self.temperature == 0:
            return Structure(True, 0, penalty=penalty)
        return Structure(False, self.top_k, self.top_p < 1, self.min_p > 0, penalty)

    def knobs(self, device: torch.device) -> Tensor:
        """float32 [4] on the device: 1 / temperature, top_p, min_p, repetition_penalty; changing them recompiles
        nothing.
        """
        heat = 1 / (self.temperature or 1.0)
        return torch.tensor([heat, self.top_p, self.min_p, self.repetition_penalty], device=device)


def penalise(logits: Tensor, seen: Tensor, knobs: Tensor) -> Tensor:
    """The repetition penalty (Keskar et al. 2019, section 4.1): logits [..., V] of the ids that are `seen` (bool
    [..., V]: in the prompt or the answer so far) are divided by it where positive and multiplied where negative.
    Float32.
    """
    logits, penalty = logits.float(), knobs[3]
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def distribution(logits: Tensor, structure: Structure, knobs: Tensor) -> tuple[Tensor, Tensor | None]:
    """logits [..., V] -> (probs [..., C] float32 summing to 1, their ids [..., C] or None when C is the vocabulary).

    Greedy puts all mass on argmax (the lowest id among ties). top-k keeps exactly k, top-p the smallest set of the most
    probable tokens whose mass reaches p (Holtzman et al. 2020), min-p those of at least p times the top probability.
    """
    _, top_k, use_top_p, use_min_p, _ = structure
    if structure.greedy:
        ids = logits.float().argmax(-1, keepdim=True)  # of bf16 a CPU's takes four times as long
        return torch.ones_like(ids, dtype=torch.float32), ids
    ids = None
    if 0 < top_k < logits.shape[-1]:
        logits, ids = top(logits, top_k, sorted=use_top_p)
    elif use_top_p:
        logits, ids = logits.sort(descending=True, stable=True)
    probs = torch.softmax(logits.float() * knobs[0], -1)
    if use_top_p:
        probs = torch.where(probs.cumsum(-1) - probs < knobs[1], probs, 0)
    if use_min_p:
        probs = torch.where(probs >= knobs[2] * probs.amax(-1, keepdim=True), probs, 0)
    if use_top_p or use_min_p:
        probs = probs / probs.sum(-1, keepdim=True)
    return probs, ids


def top(logits: Tensor, k: int, sorted: bool) -> tuple[Tensor, Tensor]:
    """`logits.topk(k)` in two small selections, which are faster than a large one: the k largest lie in those k blocks
    of 16 whose maxima are largest. A block is every V/16-th id, so that vectors of a processor take maxima of 16 blocks
    at once: 10 us instead of 44 of 49,152 logits. 16-bit logits stay so: a selection looks at two bits at a time.
    """
    V = logits.shape[-1]
    if V % 16 or 64 * k > V:
        return torch.topk(logits, k, sorted=sorted)
    best = logits.unflatten(-1, (16, -1)).amax(-2).topk(k, sorted=False).indices
    ids = (best.unsqueeze(-1) + torch.arange(0, V, V // 16, device=logits.device)).flatten(-2)
    values, at = logits.gather(-1, ids).topk(k, sorted=sorted)
    return values, ids.gather(-1, at)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al. 2014) on int64, whose products wrap and whose right shifts need a mask."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX2
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return x.as_strided(x.shape, x.stride())  # a no-op that makes Inductor store x: see `uniform`


def uniform(seeds: Tensor, positions: Tensor, lanes: int | Tensor, stream: int = 0) -> Tensor:
    """float32 [..., L] in (0, 1), a pure function of (seed, position, lane, stream). seeds, positions: int64 [...];
    lanes: L, for 0..L-1, or int64 [..., L].

    Small values keep their relative precision (63 random bits, rounded once), which the race below needs for rare
    tokens.
    """
    key = _mix(_mix(seeds * _GOLDEN + stream) ^ positions)
    # `_mix` stores its result, because every xor-shift doubles the expression that Inductor would inline below, and
    # compiling the decode step's sampling took 23 s instead of 3.5 s (2 CPU cores)
    # splitmix64 multiplies the lane by a constant; compilers hold an index in 32 bits, so mix twice instead
    lanes = torch.arange(lanes, device=seeds.device) if isinstance(lanes, int) else lanes
    bits = _mix(_mix(key.unsqueeze(-1) + lanes))
    return ((bits & 0x7FFFFFFFFFFFFFFF).float() * 2.0**-63).clamp(2.0**-63, 1 - 2.0**-24)


def draw(probs: Tensor, seeds: Tensor, positions: Tensor, stream: int = 0, ids: Tensor | None = None) -> Tensor:
    """Index [...] int64 drawn from probs [..., C] by an exponential race: argmax p / E with E ~ Exp(1), no sort, no
    host sync. The noise belongs to the token ids [..., C] (None: 0..C-1), so their order does not matter.
    """
    e = -torch.log1p(-uniform(seeds, positions, probs.shape[-1] if ids is None else ids, stream))
    return torch.argmax(probs / e, -1)


def sample(
    logits: Tensor, structure: Structure, knobs: Tensor, seeds: Tensor, positions: Tensor, seen: Tensor | None = None
) -> Tensor:
    """Next token [B] int64 for logits [B, V] of the tokens at `positions` int64 [B]; -1 in a row whose logits are not
    finite (the host raises). seeds int64 [B]. seen: for `penalise`, where structure asks for it.
    """
    if structure.penalty and seen is not None:
        logits = penalise(logits, seen, knobs)
    probs, ids = distribution(logits, structure, knobs)
    token = probs.argmax(-1) if structure.greedy else draw(probs, seeds, positions, ids=ids)
    if ids is not None:
        token = ids.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    return torch.where(logits.abs().amax(-1) < float("inf"), token, -1)

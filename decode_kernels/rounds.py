"""A round of speculation around the two models: looking up, proposing, accepting, and moving on.

Knows the rules of `speculative.py` and the candidates of `draw.py`. Refuses to know models, and when a round pays.

**Looking up.** Of all earlier places where the newest n ids stand, n = 3, 2 or 1, the latest of the largest n; what
stands behind it is proposed. One number says how good a place is: n * 2^32 + place, and the largest wins.

Worked example: the ids 7 4 5 9 4 5 8 5 and then 4 5, whose last is at position 9. The 5 at position 2 and the one at 5
end a match of two ids, the one at 7 a match of one: 2 * 2^32 + 5 is the largest, and 8 5 4 5 is proposed, and then
again 8 5 4 5: behind the newest id the copy goes on with what it has copied.

**Proposing.** A token is drawn as in `draw.py`; the probabilities q of its candidates are kept for the target.

**Accepting.** The target has logits for T = K + 1 tokens. Its probabilities p of a token are compared with q, which is
1 for what was looked up: the proposal x is accepted if u q(x) < p(x) for a random u. In the place of a proposal that is
refused a token is drawn with weights max(p - q, 0), and behind the last proposal, if all are accepted, with weights p.
Which proposal is the first to be refused is not known yet, so one program for each of the T tokens does both, and
`_settle_kernel` takes the accepted ones up to the first refusal, and the token that was drawn there.

Worked example: q = 0.5, 0.5, 0 and p = 0.2, 0.5, 0.3. The second token is always accepted, the first for u < 0.4. If it
is refused, what is left is 0, 0, 0.3, so the third is drawn. Together they come out with 0.5 * 0.4 = 0.2, 0.5 and
0.5 * 0.6 = 0.3.

Only the candidates of top-k have a probability, 200 of 32,000, so that nothing but q is written or read of the whole
vocabulary, and of q the candidates alone. A sum of probabilities depends on the order of its terms, so p may differ by
a rounding from that of `sampling.py`, and then one decision in a million.

A verification of seven drafts by Llama-2-7B in int4 takes 1.352 ms, compiled 1.429, with PyTorch's operators in the
graph 1.654; a lookup takes 14 us, 20 and 90 (one H200, `benchmarks/NOTES.md`).
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels import draw, launch

ACCEPT, RESAMPLE, DRAFT = (tl.constexpr(stream) for stream in (1, 2, 3))  # of random numbers, as in `speculative.py`


def _nothing(*_: object) -> None:
    """There is no result."""


# -- looking up ----------------


@triton.jit(do_not_specialize=["slots", "count"])
def _look_up_kernel(history_ptr, pos_ptr, slots, count, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr):
    """One row: reads what it holds, a block of slots at a time."""
    row = tl.program_id(0)
    launch.launch_next(PDL)
    launch.wait_for_previous(PDL)
    history_ptr += row.to(tl.int64) * slots
    position = tl.load(pos_ptr + row).to(tl.int32)
    newest = tl.load(history_ptr + position)
    second = tl.load(history_ptr + position - 1, position > 0, -1)
    third = tl.load(history_ptr + position - 2, position > 1, -1)
    best = tl.zeros([BLOCK], tl.int64)
    first = position * 0
    while first < position:  # the interpreter has no range() over a loaded bound
        slot = first + tl.arange(0, BLOCK)
        one = tl.load(history_ptr + slot, slot < position, -1) == newest
        two = one & (tl.load(history_ptr + slot - 1, one & (slot > 0), -2) == second)
        three = two & (tl.load(history_ptr + slot - 2, two & (slot > 1), -2) == third)
        length = one.to(tl.int64) + two.to(tl.int64) + three.to(tl.int64)
        best = tl.maximum(best, tl.where(one, (length << 32) + slot, 0))
        first += BLOCK
    start = (tl.max(best) & 0xFFFFFFFF).to(tl.int32)
    i = tl.arange(0, WIDTH)
    found = tl.load(history_ptr + start + 1 + i % tl.maximum(position - start, 1), i < count, 0)
    tl.store(history_ptr + position + 1 + i, found, i < count)


@launch.operator("look_up_", _nothing, ("history",))
def look_up_(history: Tensor, position: Tensor, count: int) -> None:
    """`speculative.lookup` of so many ids, into history int64 [B, S] behind position int64 [B, 1]."""
    b, slots = history.shape
    given = history, position, slots, count
    _look_up_kernel[(b,)](*given, BLOCK=2048, WIDTH=triton.next_power_of_2(count), **launch.options(8))


# -- proposing ----------------


@triton.jit(do_not_specialize=["slots", "q_row", "q_column"])
def _propose_kernel(
    logits_ptr,
    key_ptr,
    chosen_ptr,
    knobs_ptr,
    seeds_ptr,
    pos_ptr,
    drafted_ptr,
    history_ptr,
    q_ptr,
    slots,
    q_row,
    q_column,
    V: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: its candidates, their probabilities, and their race."""
    row = tl.program_id(0).to(tl.int64)
    launch.launch_next(PDL)
    launch.wait_for_previous(PDL)
    drafted = tl.load(drafted_ptr)
    position = tl.load(pos_ptr + row) + drafted + 1
    key = draw.key_of(tl.load(seeds_ptr + row), position, DRAFT)
    q_ptr += row * q_row + drafted * q_column
    for first in range(0, V, 8192):
        i = first + tl.arange(0, 8192)
        tl.store(q_ptr + i, 0.0, i < V)  # `candidates` has a barrier between this and what follows
    token, p, finite = draw.candidates(logits_ptr, key_ptr, chosen_ptr, knobs_ptr, row, N, K, TOP_P)
    drawn = tl.where(finite, draw.race(token, p, key), 0)
    tl.store(history_ptr + row * slots + position, drawn)
    tl.store(q_ptr + token, p / tl.sum(p), finite & (p > 0))
    tl.store(q_ptr + drawn, float("nan"), finite == 0)  # which no u accepts


@launch.operator("propose_", _nothing, ("drafted", "history", "q"))
def propose_(
    logits: Tensor,
    top_k: int,
    top_p: bool,
    knobs: Tensor,
    seeds: Tensor,
    position: Tensor,
    drafted: Tensor,
    history: Tensor,
    q: Tensor,
) -> None:
    """The end of a draft's step: of logits [B, V] a token for every row, into history int64 [B, S] at position
    int64 [B, 1] + drafted int64 [1] + 1; its distribution into q float32 [B, K, V] at drafted, which advances by one.
    """
    tensors, constants = draw.largest_of_blocks(logits[:, : q.shape[-1]], top_k, top_p)
    given = knobs, seeds, position, drafted, history, q, history.shape[1], *q.stride()[:2]
    _propose_kernel[(len(logits),)](*tensors, *given, V=q.shape[-1], **constants, **launch.options(8))
    drafted.add_(1)


# -- accepting ----------------


@triton.jit(do_not_specialize=["slots", "q_row", "q_column"])
def _verify_kernel(
    logits_ptr,
    key_ptr,
    chosen_ptr,
    knobs_ptr,
    seeds_ptr,
    pos_ptr,
    history_ptr,
    q_ptr,
    rate_ptr,
    out_ptr,
    slots,
    q_row,
    q_column,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token of one row: whether what was proposed there is accepted, and what comes in its place."""
    i, tokens, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    at, plain, proposed = row * tokens + i, tokens == 1, i < tokens - 1
    launch.launch_next(PDL)
    launch.wait_for_previous(PDL)
    seed, position = tl.load(seeds_ptr + row), tl.load(pos_ptr + row) + i + 1
    drafted = tl.load(history_ptr + row * slots + position, proposed, -1)
    token, p, finite = draw.candidates(logits_ptr, key_ptr, chosen_ptr, knobs_ptr, at, N, K, TOP_P)
    p = p / tl.sum(p)
    if q_ptr is None:
        q, q_drafted = (token == drafted).to(tl.float32), 1.0
    else:
        q_ptr += row * q_row + i * q_column
        q, q_drafted = tl.load(q_ptr + token, proposed & (p > 0), 0), tl.load(q_ptr + drafted, proposed, 0)
        q = tl.where(q == q, q, 0.0)
    u = draw.uniform(draw.key_of(seed, position, ACCEPT), 0)
    if rate_ptr is None:
        accepted = u * q_drafted < tl.sum(tl.where(token == drafted, p, 0.0))
    else:  # at random
        accepted = u < tl.load(rate_ptr)
    rest = tl.maximum(p - q, 0.0)
    rest = tl.where(tl.max(rest) > 0, rest, p)  # p < q by rounding alone
    key = draw.key_of(seed, position - tl.where(plain, 1, 0), tl.where(plain, 0, RESAMPLE))  # plain: as `draw.sample`
    own = draw.race(token, rest, key)
    tl.store(out_ptr + at, tl.where(accepted & proposed & finite, drafted, -1))
    tl.store(out_ptr + tl.num_programs(1) * tokens + at, tl.where(finite, own, -1).to(tl.int64))


def _verify_shape(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(2, *logits.shape[:2], dtype=torch.int64)


@launch.operator("verify", _verify_shape)
def verify(
    logits: Tensor,
    top_k: int,
    top_p: bool,
    knobs: Tensor,
    seeds: Tensor,
    position: Tensor,
    history: Tensor,
    seen: Tensor | None,
    q: Tensor | None,
    rate: Tensor | None,
) -> Tensor:
    """`speculative.accept` but for its end, for logits [B, T, V] of what stands in history int64 [B, S] from position
    int64 [B, 1] on. int64 [2, B, T]: what was proposed, -1 where it is refused; the token in its place, -1 where logits
    are not finite. seen bool [B, V]: for a penalty. q float32 [B, >= T - 1, V], None: all mass on the proposal; rate
    float32 []: accept at random.
    """
    out = _verify_shape(logits)
    if seen is not None:
        logits = draw.penalise(logits, seen, knobs, history, position)
    tensors, constants = draw.largest_of_blocks(logits.flatten(0, 1), top_k, top_p)
    given = knobs, seeds, position, history, q, rate, out, history.shape[1], *((0, 0) if q is None else q.stride()[:2])
    _verify_kernel[(logits.shape[1], len(logits))](*tensors, *given, **constants, **launch.options(8))
    return out


# -- moving on ----------------


@triton.jit(do_not_specialize=["tokens", "slots", "last", "columns", "words"])
def _settle_kernel(
    verified_ptr,
    token_ptr,
    pos_ptr,
    history_ptr,
    drafted_ptr,
    log_ptr,
    seen_ptr,
    tokens,
    slots,
    last,
    columns,
    words,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    here, at = i < tokens, row * tokens + i
    launch.wait_for_previous(PDL)
    accepted = tl.load(verified_ptr + at, here, -1)
    own = tl.load(verified_ptr + tl.num_programs(0) * tokens + at, here, -1)
    position = tl.load(pos_ptr + row)
    count = tl.min(tl.where(accepted < 0, i, WIDTH))
    newest = tl.sum(tl.where(i == count, own, 0))
    emitted = tl.where(i < count, accepted, newest)
    tl.store(log_ptr + row * columns, count + 1)
    tl.store(log_ptr + row * columns + 1 + i, emitted, here)
    tl.store(history_ptr + row * slots + position + 1 + i, tl.maximum(emitted, 0), here)
    tl.store(token_ptr + row, tl.maximum(newest, 0))
    if seen_ptr is not None:
        tl.store(seen_ptr + row * words + emitted, 1, here & (i <= count) & (emitted >= 0))
    tl.debug_barrier()  # every lane has read the position
    tl.store(pos_ptr + row, tl.minimum(position + count + 1, last))
    tl.store(drafted_ptr, 0)


@launch.operator("settle_", _nothing, ("token", "position", "history", "drafted", "log", "seen"))
def settle_(
    verified: Tensor,
    last: int,
    token: Tensor,
    position: Tensor,
    history: Tensor,
    drafted: Tensor,
    log: Tensor,
    seen: Tensor | None,
) -> None:
    """The end of a round, of what `verify` returns: how many tokens, and which, into log int64 [B, > T]; the same into
    history int64 [B, S] behind position, the newest into token int64 [B, 1]; position moves on, to `last` at most.
    What came out is seen bool [B, V] from here on.
    """
    _, b, tokens = verified.shape
    words, marks = (0, None) if seen is None else (seen.shape[1], seen.view(torch.uint8))
    given = token, position, history, drafted, log, marks, tokens, history.shape[1], last, log.shape[1], words
    _settle_kernel[(b,)](verified, *given, WIDTH=triton.next_power_of_2(tokens), **launch.options(1))

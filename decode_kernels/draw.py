"""The choice of the next token, of the logits of a whole vocabulary or of lists of its largest ones.

Knows logits and what is drawn of them. Refuses to know models, and what a drawn token is for.

**A token**, of logits l, with top-k, top-p, min-p and temperature T: p_i = exp((l_i - max l) / T) for the k largest
logits, of these only the largest until their sum reaches top_p of all, and without those below min_p. It is drawn by a
race: each candidate gets E_i, exponentially distributed, from a hash of seed, position and token id, and the largest
p_i / E_i wins, which token i does with probability p_i / sum p. Greedy is k = 1.

Worked example of the race: p = 0.7, 0.2, 0.1 and E = 2.0, 0.4, 0.05 give p / E = 0.35, 0.5, 2.0, so the third wins.

The k largest logits are found in two kernels, for one program that reads all of them took 75 us: `_block_max_kernel`
takes the maximum of every 16 logits, and `_sample_kernel`, one program a row, finds the k blocks with the largest
maxima, which hold the k largest logits, and then these. It writes their ids to memory one behind the other, so that k
lanes race. With 16 k lanes, and a search whose sixteen counts stood one after the other in the code, it took twice as
long.

Worked example, k = 2 and blocks of 4 instead of 16: logits 5 1 0 2 | 4 3 3 1 | 2 2 0 1 have the maxima 5, 4 and 2. The
blocks with the two largest are 5 1 0 2 and 4 3 3 1, and the two largest logits, 5 and 4, are among their eight.

To find the k largest of some numbers, what lies between a lower bound of the k-th largest and the largest is halved:
the upper half stays if at least k numbers are in it or above. So 16-bit floats are mapped to integers of the same order
first. Worked example in float16: 1.0 is 0x3C00 and becomes 48128, 0.0 and -0.0 become 32768, and -1.0, 0xBC00, becomes
17408; infinities and NaN become 65535, so that the maximum tells whether a row has one. No k-th largest is less than
the smallest of k of the numbers, and the k-th largest maximum is a bound for the k-th largest logit. Of blocks some
more than k do no harm, so that the halving ends where few enough are left.

Worked example, k = 2 of the integers 9 3 7 1 5 2, of which 4 may stay: the upper half of 1 to 9 is 5 to 9, and there
are 3 of them, neither too few nor too many.

Top-p finds its last logit by halving what is between the k-th and the largest integer: the upper half stays if the p of
the logits in it and above reach top_p of the sum. They are added as integers, so that the sum depends on no order.
Worked example: logits 4 3 3 1 with p = 1, 0.5, 0.5, 0.125 and top_p = 0.5: 4 alone has less than half of 2.125, with a
3 it is more, so that 4 and the first 3 stay.

**A repetition penalty** is applied by a kernel in front, `_penalise_kernel`. It leaves logits in float32, whose
integers have 32 bits.

**Over ranks**, each of which has the logits of its own words, `_shortlist_kernel` finds the k largest of these in the
same way and lists them, with their ids. Ranks exchange their lists, and `_sample_kernel`, given all lists instead of
logits, draws on every rank the token that it would draw from all logits.

Worked example, k = 2: one rank lists 5 (word 0) and 4 (word 3), the other 4 (word 8) and 2 (word 9). Of the four, 5
(word 0) and 4 (word 3) are the largest two, the first among equals.

A row of 32,000 logits takes 7.2 us, one of 128,256 9.3 us; PyTorch's operators, compiled, took 39 and 57. The times
are of one H200 (`benchmarks/NOTES.md`).
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels import launch

Source = tuple[Tensor, Tensor | None, Tensor]  # logits, maxima of blocks, room for ids; or a list, None, and this room

# -- the largest ----------------


@triton.jit
def _sortable_keys(x, BITS: tl.constexpr):
    """The upper BITS of floats as integers from 1 on of the same order; the largest integer is what is not finite."""
    SIGN: tl.constexpr = 1 << BITS - 1
    WIDE: tl.constexpr = x.dtype == tl.float32
    INF: tl.constexpr = 0x7F800000 >> 32 - BITS if WIDE else 0x7F80 if x.dtype == tl.bfloat16 else 0x7C00
    if WIDE:
        bits = x.to(tl.uint32, bitcast=True) >> 32 - BITS
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    key = tl.where(bits < SIGN, bits + SIGN, SIGN - (bits - SIGN))
    return tl.where((bits & (SIGN - 1)) < INF, key, SIGN - 1 + SIGN)


@triton.jit
def _block_max_kernel(logits_ptr, key_ptr, V: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr):
    """The largest of every 16 logits, as a sortable key."""
    row = tl.program_id(1)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * 16 + tl.arange(0, 16)
    launch.launch_next(PDL)
    launch.wait_for_previous(PDL)
    x = tl.load(logits_ptr + row * V + at, at < V, 0)
    key = _sortable_keys(x, x.dtype.primitive_bitwidth)
    tl.store(key_ptr + row * ((V + 15) // 16) + block, tl.max(tl.where(at < V, key, 0), 1), block * 16 < V)


@triton.jit
def _keep_largest(key, first, low, high, kept_ptr, COUNT: tl.constexpr, K: tl.constexpr, MOST: tl.constexpr):
    """Stores numbers with keys [rows, 8], which are first [rows] and the seven behind it, in their order: those of the
    K largest keys, and of others from the next largest on, the first ones among equals, MOST in all at most. (how many;
    what none of the K keys is smaller than).

    low, high: what none of the K keys is smaller than, and the largest key; COUNT: how many keys are not less than low,
    or more.
    """
    count = COUNT
    above = 0  # how many keys are greater than `high`
    if K == 1:
        low = high
    while (low < high) & (count > MOST):
        middle = high - (high - low) // 2
        upper = tl.sum((key >= middle).to(tl.int32))
        enough = upper >= K
        low, count = tl.where(enough, middle, low), tl.where(enough, upper, count)
        high, above = tl.where(enough, high, middle - 1), tl.where(enough, above, upper)
    # one prefix sum counts both: the larger ones in the high half, the equal ones in the low half
    counts = (key > low).to(tl.int32) * 65536 + (key == low).to(tl.int32)
    rows = tl.sum(counts, 1)
    before = (tl.cumsum(rows) - rows)[:, None] + tl.cumsum(counts, 1) - counts
    equals, wanted = before & 0xFFFF, MOST - above
    # a lane has whole rows; that it is to store them, too, says the largest number, which is that of neighbouring lanes
    at = tl.max_contiguous(kept_ptr + (before >> 16) + tl.minimum(equals, wanted), [64, 1])
    tl.debug_barrier()  # no lane still reads what stood there
    tl.store(at, first[:, None] + tl.arange(0, 8), (key > low) | ((key == low) & (equals < wanted)))
    tl.debug_barrier()  # the program reads what its other lanes have written
    return tl.minimum(count, MOST), low


@triton.jit
def _most_probable(key, p, share, last):
    """Which of these stay, if p are added from the largest key on until the sum reaches so large a share of all; the
    first ones among equals. No key with a p is smaller than `last`.
    """
    mass = (p * 1099511627776.0).to(tl.int64)  # 2^40: of 256 numbers of at most 1 the sum is exact in any order
    limit = tl.sum(mass).to(tl.float32) * share
    largest = tl.max(key)
    while last < largest:
        middle = largest - (largest - last) // 2
        enough = tl.sum(tl.where(key >= middle, mass, 0)).to(tl.float32) >= limit
        last, largest = tl.where(enough, middle, last), tl.where(enough, largest, middle - 1)
    equal = (key == last) & (mass > 0)
    before = tl.sum(tl.where(key > last, mass, 0)) + (tl.cumsum(equal.to(tl.int32)) - 1) * mass
    return (key > last) | (equal & (before.to(tl.float32) < limit))


# -- candidates ----------------


@triton.jit
def _of_largest_blocks(logits_ptr, key_ptr, kept_ptr, row, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr):
    """Of the tokens in the blocks with the K largest maxima, what `_keep_largest` takes: (keys, 0 where there is no
    token; first ids; what none of the K largest is smaller than; the largest).
    """
    BLOCKS: tl.constexpr = (N + 15) // 16
    FEW: tl.constexpr = min(K, BLOCKS)
    MOST: tl.constexpr = triton.next_power_of_2(FEW)
    first = tl.arange(0, triton.next_power_of_2((BLOCKS + 7) // 8)) * 8
    block = first[:, None] + tl.arange(0, 8)
    key = tl.load(key_ptr + row * BLOCKS + block, block < BLOCKS, 0).to(tl.uint32 if BITS == 32 else tl.int32)
    maxima = tl.max(key, 1)
    high = tl.max(maxima)
    low = tl.min(tl.where(maxima > 0, maxima, high)) if FEW * 8 <= BLOCKS + 7 else high * 0  # K rows have K such keys
    count, low = _keep_largest(key, first, low, high, kept_ptr, BLOCKS, FEW, MOST)
    half = tl.arange(0, MOST * 2)
    first = tl.load(kept_ptr + half // 2, half < count * 2, 0) * 16 + half % 2 * 8
    token = first[:, None] + tl.arange(0, 8)
    valid = (half < count * 2)[:, None] & (token < N)
    key = _sortable_keys(tl.load(logits_ptr + row * N + token, valid, 0), BITS)
    return tl.where(valid, key, 0), first, low if BLOCKS >= K else low * 0, high


@triton.jit
def _of_list(list_ptr, row, N: tl.constexpr, BITS: tl.constexpr):
    """The same of a list of N tokens, as `shortlist` leaves it, with places in it for ids."""
    first = tl.arange(0, triton.next_power_of_2((N + 7) // 8)) * 8
    j = first[:, None] + tl.arange(0, 8)
    logit = (tl.load(list_ptr + row * N + j, j < N, 0) >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    key = tl.where(j < N, _sortable_keys(logit, BITS), 0)
    return key, first, tl.min(tl.where(j < N, key, (1 << BITS) - 1)), tl.max(key)


@triton.jit
def candidates(logits_ptr, key_ptr, kept_ptr, knobs_ptr, row, N: tl.constexpr, K: tl.constexpr, TOP_P: tl.constexpr):
    """(ids of the tokens with the K largest logits, and places to spare; of each exp((l - max l) / T), but 0 for what
    TOP_P and min-p leave out, and in the places to spare; whether all logits of the row are finite). The first three
    arguments: see `largest_of_blocks`.
    """
    # a list's float32 was a 16-bit float, of which 19 bits are all
    BITS: tl.constexpr = 19 if key_ptr is None else logits_ptr.dtype.element_ty.primitive_bitwidth
    inverse_temperature, min_p = tl.load(knobs_ptr), tl.load(knobs_ptr + 2)
    i = tl.arange(0, triton.next_power_of_2(K))
    kept_ptr += row * i.shape[0]
    if key_ptr is None:
        key, first, low, high = _of_list(logits_ptr, row, N, BITS)
    else:
        key, first, low, high = _of_largest_blocks(logits_ptr, key_ptr, kept_ptr, row, N, K, BITS)
    _, low = _keep_largest(key, first, low, high, kept_ptr, N, K, K)
    token = tl.load(kept_ptr + i, i < K, 0)
    x = tl.load(logits_ptr + row * N + token, i < K, 0)
    if key_ptr is None:
        token, x = (x & 0xFFFFFFFF).to(tl.int32), (x >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    logit = tl.where(i < K, x.to(tl.float32), float("-inf"))
    p = tl.exp((logit - tl.max(logit)) * inverse_temperature)
    p = tl.where(i < K, p, 0.0)
    if TOP_P:
        key = tl.where(i < K, _sortable_keys(x, BITS), 0)
        p = tl.where(_most_probable(key, p, tl.load(knobs_ptr + 1), low), p, 0.0)
    return token, tl.where(p >= min_p, p, 0.0), high < (1 << BITS) - 1


def largest_of_blocks(logits: Tensor, top_k: int, top_p: bool) -> tuple[Source, dict[str, int]]:
    """The first step, for logits [rows, N] in 16 bits or float32: (what a kernel with `candidates` takes first, its
    constants). For a list int64 [rows, N] there is nothing to compute.
    """
    logits, (rows, n) = logits.contiguous(), logits.shape
    constants = {"N": n, "K": top_k, "TOP_P": top_p}
    kept = logits.new_empty(rows, triton.next_power_of_2(top_k), dtype=torch.int32)
    if logits.dtype == torch.int64:
        return (logits, None, kept), constants
    blocks, per_program = triton.cdiv(n, 16), 64
    key = logits.new_empty(rows, blocks, dtype=torch.uint32 if logits.itemsize == 4 else torch.uint16)
    grid = triton.cdiv(blocks, per_program), rows
    _block_max_kernel[grid](logits, key, V=n, BLOCKS=per_program, **launch.options(4))
    return (logits, key, kept), constants


# -- a race between them ----------------


@triton.jit
def _mix(x):
    """splitmix64's finaliser, as in `sampling.py`."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def key_of(seed, position, stream):
    """What the random numbers of a row at a position have in common, as in `sampling.uniform`."""
    return _mix(_mix(seed * -0x61C8864680B583EB + stream) ^ position)


@triton.jit
def uniform(key, lane):
    """63 random bits as a float in (0, 1), which keeps the relative precision of small values."""
    bits = _mix(_mix(key + lane)) & 0x7FFFFFFFFFFFFFFF
    return tl.minimum(tl.maximum(bits.to(tl.float32) * 1.0842021724855044e-19, 1.0842021724855044e-19), 1 - 2.0**-24)


@triton.jit
def race(token, weight, key):
    """One of these tokens, each with a probability in proportion to its weight."""
    u = uniform(key, token)
    # -log(1 - u), accurate for small u, where a float's 1 - u is not
    e = tl.where(u < 0.015625, u * (1 + u * (0.5 + u * (1 / 3 + u * 0.25))), -tl.log(1 - u))
    score = weight / e
    return tl.min(tl.where(score == tl.max(score), token, 0x7FFFFFFF))  # the first among equals


# -- the next token ----------------


@triton.jit
def _sample_kernel(
    logits_ptr,
    key_ptr,
    kept_ptr,
    knobs_ptr,
    seeds_ptr,
    pos_ptr,
    out_ptr,
    seed_stride,
    pos_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: its candidates, and their race."""
    row = tl.program_id(0)
    launch.launch_next(PDL)
    launch.wait_for_previous(PDL)
    key = key_of(tl.load(seeds_ptr + row * seed_stride), tl.load(pos_ptr + row * pos_stride), 0)
    token, p, finite = candidates(logits_ptr, key_ptr, kept_ptr, knobs_ptr, row, N, K, TOP_P)
    tl.store(out_ptr + row, tl.where(finite, race(token, p, key), -1).to(tl.int64))


def _sample_shape(logits: Tensor, knobs: Tensor, seeds: Tensor, positions: Tensor, top_k: int, top_p: bool) -> Tensor:
    return positions.new_empty(logits.shape[0])


@launch.operator("sample", _sample_shape)
def sample(logits: Tensor, knobs: Tensor, seeds: Tensor, positions: Tensor, top_k: int, top_p: bool) -> Tensor:
    """logits [B, V], or a list of the largest -> the next token of every row, int64 [B]; -1 where logits are
    not finite.

    knobs float32 [3]: 1 / temperature, top_p (where it is on), min_p. seeds int64 [B] or [1], positions int64 [B].
    """
    tensors, constants = largest_of_blocks(logits, top_k, top_p)
    b, out = len(logits), _sample_shape(logits, knobs, seeds, positions, top_k, top_p)
    given = knobs, seeds, positions, out, seeds.expand(b).stride(0), positions.stride(0)
    _sample_kernel[(b,)](*tensors, *given, **constants, **launch.options(8))
    return out


# -- over ranks ----------------


@triton.jit(do_not_specialize=["first"])
def _shortlist_kernel(
    logits_ptr, key_ptr, kept_ptr, list_ptr, first, N: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr
):
    """One row: its K largest logits, with the ids of their tokens, which begin with `first`."""
    row = tl.program_id(0)
    launch.launch_next(PDL)
    launch.wait_for_previous(PDL)
    i = tl.arange(0, triton.next_power_of_2(K))
    kept_ptr += row * i.shape[0]
    key, ids, low, high = _of_largest_blocks(logits_ptr, key_ptr, kept_ptr, row, N, K, 16)
    _keep_largest(key, ids, low, high, kept_ptr, N, K, K)
    token = tl.load(kept_ptr + i, i < K, 0)
    logit = tl.load(logits_ptr + row * N + token, i < K, 0).to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
    tl.store(list_ptr + row * K + i, (logit << 32) | (token + first).to(tl.int64), i < K)


def _shortlist_shape(logits: Tensor, top_k: int, first: int) -> Tensor:
    return logits.new_empty(*logits.shape[:-1], top_k, dtype=torch.int64)


@launch.operator("shortlist", _shortlist_shape)
def shortlist(logits: Tensor, top_k: int, first: int) -> Tensor:
    """Of logits [..., V] in 16 bits, of which top_k are never all, the largest: a list int64 [..., top_k] in the order
    of ids, the logit in float32 above the id, which is first + the place in V. Lists of several ranks stand side by
    side, in the order of ranks.
    """
    out = _shortlist_shape(logits, top_k, first)
    tensors, _ = largest_of_blocks(logits.flatten(0, -2), top_k, False)
    _shortlist_kernel[(len(tensors[0]),)](*tensors, out, first, N=logits.shape[-1], K=top_k, **launch.options(8))
    return out


# -- a repetition penalty ----------------


@triton.jit(do_not_specialize=["slots"])
def _penalise_kernel(
    logits_ptr,
    seen_ptr,
    knobs_ptr,
    history_ptr,
    pos_ptr,
    out_ptr,
    slots,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some logits of one token of one row: those of ids that are seen, or stand between the newest token and it."""
    i, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    launch.launch_next(PDL)
    launch.wait_for_previous(PDL)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = (row * tl.num_programs(1) + i) * V + token
    x = tl.load(logits_ptr + at, token < V, 0).to(tl.float32)
    seen = tl.load(seen_ptr + row * V + token, token < V, 0) != 0
    if history_ptr is not None:
        history_ptr += row * slots + tl.load(pos_ptr + row)
        while i > 0:
            seen = seen | (token == tl.load(history_ptr + i))
            i -= 1
    penalty = tl.load(knobs_ptr + 3)
    y = tl.where(seen, tl.where(x > 0, tl.div_rn(x, penalty), x * penalty), x)
    tl.store(out_ptr + at, y, token < V)


def _penalise_shape(logits: Tensor, *_: object) -> Tensor:
    return torch.empty_like(logits, dtype=torch.float32, memory_format=torch.contiguous_format)


@launch.operator("penalise", _penalise_shape)
def penalise(logits: Tensor, seen: Tensor, knobs: Tensor, history: Tensor | None, position: Tensor | None) -> Tensor:
    """`sampling.penalise` for logits [B, T, V] and seen bool [B, V]: float32. What history int64 [B, S] holds behind
    position int64 [B, 1] is seen by the tokens that come later.
    """
    out, (b, t, v) = _penalise_shape(logits), logits.shape
    slots = 0 if history is None else history.shape[1]
    given = logits.contiguous(), seen.view(torch.uint8), knobs, history, position, out, slots
    _penalise_kernel[(triton.cdiv(v, 2048), t, b)](*given, V=v, BLOCK=2048, **launch.options(4))
    return out

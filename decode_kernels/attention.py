"""Attention of 1 to 16 new tokens to the valid prefix of a cache, which their own keys and values enter on the way.

Knows heads, caches, RoPE and the norms of q and k. Refuses to know layers and projections.

    q, k = rotate(norm(q)), rotate(norm(k))     for every head; the norm is optional
    cache[position] = k, v
    y = softmax(q K^T / sqrt(D)) V              over the slots <= position, and > position - window if there is a window

`rotate` turns the pairs (x_i, x_(i + D/2)) by the position's angles (RoPE, the two halves of a head). A program reads
its part of the cache once, for all query heads of a KV head and all new tokens: these are its rows. The prefix is split
over programs (flash-decoding, Dao et al. 2023) and in a program over warps, in steps of 16 slots a warp. Each warp
keeps the online softmax (Milakov and Gimelshein 2018) of its own slots: the largest score m, the sum of 2^(s - m), and
the sum of 2^(s - m) v. At the end warps are joined in registers, and splits by a kernel of their own.

Worked example of joining. One warp has seen the scores 1 and 3 (in units of log 2, as everywhere here), another one 2:

    m = 3, sum 2^(1 - 3) + 2^(3 - 3) = 1.25    and    m = 2, sum 2^(2 - 2) = 1
    together m = 3, sum 1.25 * 2^(3 - 3) + 1 * 2^(2 - 3) = 1.75, which is (2^1 + 2^3 + 2^2) / 2^3

**Where things lie.** The products run on the tensor cores (m16n8k16), and everything is loaded into the lane that needs
it. Lane 4 g + t has

    of K, the second operand of q K^T:     dimensions 8 t .. 8 t + 7 of both halves, of slots g and 8 + g
    of V, the first operand of V^T p^T:    dimensions 8 g .. 8 g + 7, of slots 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t
    of p, which the first product gives
    and the second wants as it is:         rows g, of the same slots as V

and for longer heads the dimensions 32 later in each half of a key, 64 later in a value, and so on.

Worked example. 8 warps walk 128 slots a step, so slot 141 of the prefix is slot 13 of warp 0 in the second step. For K,
13 = 8 + 5, so g = 5, and lanes 20 to 23 hold it: lane 21 has dimensions 8 to 15 of both halves. For V, 13 = 9 + 2 * 2,
so t = 2, and lanes 2, 6, ..., 30 hold it: lane 6 has dimensions 8 to 15.

One new token (T = 1) is put among the old slots of the last step, which comes first, and which is a whole one where
there are as many slots; with a step of its own a pass of Llama-2-7B took 20 to 30 us longer. Several tokens have a step
of their own. Queries and new keys are rotated once a program and pass to its warps through shared memory.

Before the wait for the kernel that computes q, k and v, everything else is loaded: the position, the first step of the
cache, angles and norms. The loop carries 16-bit numbers in pairs, as 32-bit words, which costs no conversions, and asks
for a step before it multiplies the one before: that takes 240 registers, and reads 4.3 TB/s at 32,000 slots of
Llama-2-7B on an H200, where asking the second-level cache instead read 2.9. Before the wait that cache is asked for one
step more; two cost 0.7% of a step at 8,192 slots.

Behind the wait one lane of every program asks that cache for a share of the first 4 MB of `gate_up`, the second matrix
that is read from here on, if it is quantized and there is one token: at 2,048 slots a step of Llama-3.1-8B takes 0.9%
less in int4 and 1.0% in int8. At 8,192 it took 0.5% longer, so where there is more to load of the cache nobody asks.

**Splits.** How many take part depends on the position, which is read on the device: one graph serves every position.
Each leaves its mean and the logarithm of its sum in memory, and `_join_kernel` adds them up, with the digits that int8
and int4 weights want of the result (`digits.py`). A split that waited for the others and added them up itself took a
step of Llama-3.1-8B in bf16 0.4% longer at 2,048 slots and 0.9% at 8,192; at position 5, where there is nothing to be
joined, the kernel costs 1.1%:

    two splits with means y1, y2 and sums of 6 and 2: lse = log2 6 = 2.585 and log2 2 = 1, weights 2^(lse - 2.585)
    y = (y1 * 1 + y2 * 1/3) / (1 + 1/3) = (6 y1 + 2 y2) / 8
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels import INTERPRETED, ROWS, launch, tiles
from decode_kernels.digits import Digits, Left, empty_digits, fill_digits_, store_digits
from linear import QuantizedLinear
from model import Attention, LayerCache

Then = tuple[Left, QuantizedLinear | None]  # who gets the digits of the results; what is read after `o_proj`


@triton.jit
def _attention_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    pos_ptr,
    k_ptr,
    v_ptr,
    q_norm_ptr,
    k_norm_ptr,
    out_ptr,
    digits_ptr,
    unit_ptr,
    part_ptr,
    eps,
    scale,
    slots,
    next_ptr,
    T: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    ALONE: tl.constexpr,
    AHEAD: tl.constexpr,
    NEXT: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    """One split of the prefix for BLOCK (8 or 16) rows of one KV head; every warp walks its own slots, the last ones
    first where there is one new token.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
    STEP: tl.constexpr = 16 * WARPS  # slots a step
    HALF: tl.constexpr = DIM // 2
    EARLY: tl.constexpr = WIDTH <= 128  # the next step is loaded while one is multiplied; longer heads lack registers
    DEEP: tl.constexpr = EARLY and BLOCK == 8  # even before: all loads of two steps are under way
    bh, split = tl.program_id(0), tl.program_id(1) if SPLITS > 1 else 0
    b, head = bh // KV_HEADS, bh % KV_HEADS
    launch.launch_next(PDL)
    first = tl.load(pos_ptr + b * T).to(tl.int32)  # written before this pass began: no need to wait
    begin, end, used = _split_of_prefix(first, split, T, WINDOW, SPLITS, STEP)
    if (split > 0) & (begin >= end):
        return

    k_ptr += bh.to(tl.int64) * slots * DIM
    v_ptr += bh.to(tl.int64) * slots * DIM
    k_lane, k_slot, k_real, v_lane, v_slot, v_real, v_word = _cache_lanes(k_ptr, v_ptr, DIM, WIDTH, WARPS)
    cache = (k_lane, k_slot, k_real, v_lane, v_slot, v_real)
    late = tl.maximum(begin, end - STEP) if T == 1 else begin
    if EARLY or T == 1:
        k, v = _load_step(cache, late, end, HALF)
    for i in tl.static_range(T > 1, 1 + (T > 1) if DEEP else AHEAD):
        _prefetch(k_ptr, v_ptr, begin + i * STEP, late if T == 1 else end, DIM, STEP * WIDTH // 64, ASM)

    # queries of the rows r and keys of the new tokens n: halves of heads, their numbers in the order of the operands
    top_row = 0 if ROWS == BLOCK else tl.program_id(2) * BLOCK
    r = top_row + tl.arange(0, BLOCK)[:, None]
    n = tl.arange(0, 1 if T == 1 else 16)[:, None]
    column = _order_of_operand(WIDTH)
    real = column < HALF
    angle = b * T * HALF + column
    valid, new = real & (r < T * GROUP), real & (n < T) & (T == 1 or split == 0)
    k_angles = _load_pair(cos_ptr + angle + n * HALF, sin_ptr + angle + n * HALF, new)
    angle += r // GROUP * HALF
    q_angles = _load_pair(cos_ptr + angle, sin_ptr + angle, valid)
    q_norm = _load_norm(q_norm_ptr, column, real, HALF)
    k_norm = _load_norm(k_norm_ptr, column, real, HALF)
    writes = (end > first if T == 1 else split == 0) & (top_row == 0)
    launch.wait_for_previous(PDL)
    qkv_ptr += b * T * STRIDE
    value = _load_new_values(qkv_ptr + (HEADS + KV_HEADS + head) * DIM, v_slot, v_word, v_real, split, T, STRIDE, WARPS)
    launch.keep_loads_here(PDL)
    at = qkv_ptr + n * STRIDE + (HEADS + head) * DIM + column
    k_halves = _load_pair(at, at + HALF, new)
    at = qkv_ptr + r // GROUP * STRIDE + (head * GROUP + r % GROUP) * DIM + column
    q_halves = _load_pair(at, at + HALF, valid)
    q = tl.zeros([1, BLOCK, WIDTH // 2], tl.int32)
    key = tl.zeros([4, 1 if T == 1 else 8, 1, 2, WIDTH // 64, 1 if T == 1 else 2, 4], tl.int32)
    if launch.always_true(eps, 0):
        q = _to_words(_norm_and_rotate(q_halves, q_norm, q_angles, eps, DIM))[None]
        key = _key_words(_norm_and_rotate(k_halves, k_norm, k_angles, eps, DIM))
    q = _from_words(tl.broadcast_to(q, [WARPS, BLOCK, WIDTH // 2]), qkv_ptr.dtype.element_ty)
    q = q.reshape(WARPS, BLOCK, WIDTH)

    slot = tl.arange(0, WARPS)[:, None, None] * 16 + tl.arange(0, 16)
    row_token = ((top_row + tl.arange(0, BLOCK)) // GROUP)[:, None]
    m, total = tl.full([WARPS, BLOCK], -1e30, tl.float32), tl.zeros([WARPS, BLOCK], tl.float32)
    acc = tl.zeros([WARPS, WIDTH, BLOCK], tl.float32)
    tl.store(launch.deal_to_lanes(k_lane, first * HALF), key, k_real & (k_slot < T) & writes)
    tl.store(launch.deal_to_lanes(v_lane, first * HALF), value, v_real & (v_slot < T) & writes)
    if NEXT > 0 and first < 2 * STEP * (SPLITS - SPLITS // 8):  # all that programs load of the cache is under way
        launch.ask_for(next_ptr, bh * SPLITS + split, NEXT)
    if T == 1:  # the new token is put among the last old slots
        old_k, old_v = tl.where(k_slot == first - late, key, k), tl.where(v_slot == first - late, value, v)
        if EARLY:
            k, v = _load_step(cache, begin, late, HALF)
        m, total, acc = _attend(q, old_k, old_v, scale, late + slot < end, None, None, None, ASM)
        end = late
    elif split == 0:
        known = (slot <= row_token) & ((WINDOW == 0) | (slot > row_token - WINDOW))
        both = tl.broadcast_to(key, [4, 8, WARPS, 2, WIDTH // 64, 2, 4])
        m, total, acc = _attend(q, both, value, scale, known, m, total, acc, ASM)
    while begin < end:  # the interpreter has no range() over a loaded bound
        if not EARLY:
            k, v = _load_step(cache, begin, end, HALF)
        old_k, old_v = k, v
        seen = (begin + slot < end) & ((WINDOW == 0) | (begin + slot > first + row_token - WINDOW))
        begin += STEP
        if EARLY:
            k, v = _load_step(cache, begin, end, HALF)
        if not DEEP:
            _prefetch(k_ptr, v_ptr, begin + (AHEAD - 1) * STEP, end, DIM, STEP * WIDTH // 64, ASM)
        if not DEEP or launch.always_true(eps, 1):
            m, total, acc = _attend(q, old_k, old_v, scale, seen, m, total, acc, ASM)
    y, lse = _join_warps(m, total, acc)
    if SPLITS == 1 or (ALONE and used == 1):
        _store_rows(out_ptr, digits_ptr, unit_ptr, y, bh, top_row, T, HEADS, KV_HEADS, DIM)
    else:
        part_ptr += ((bh * (ROWS // BLOCK) + tl.program_id(2)) * SPLITS + split) * ((WIDTH + 4) * COLUMNS)
        _store_part(part_ptr, y, lse, COLUMNS)


@triton.jit
def _split_of_prefix(first, split, T: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr, STEP: tl.constexpr):
    """(the first slot of this split, the first behind it, how many splits have any) of the slots to which T new tokens
    from position `first` on attend: the old ones, and a single new token, which is put among them. They are shared by
    all splits, with a step each at least; up to 24,576 slots by seven of eight. More multiprocessors for the kernels
    behind this one then count for more than those few programs: a step of Llama-3.1-8B in int4 takes 1.514 ms with 14
    splits and 1.530 with 15 at position 2,048, 1.983 and 1.996 at 16,384, but at 131,000 1% longer with 14.
    """
    begin = 0 if WINDOW == 0 else tl.maximum(first - WINDOW + 1, 0)
    end = first + (T == 1)
    few, most = tl.cdiv(end - begin, SPLITS - SPLITS // 8), tl.cdiv(end - begin, SPLITS)
    share = tl.maximum(tl.where(end - begin <= 24576, few, most), STEP)
    used = tl.maximum(tl.cdiv(end - begin, share), 1)
    begin += split * share
    return begin, tl.minimum(begin + share, end), used


@triton.jit
def _cache_lanes(k_ptr, v_ptr, DIM: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr):
    """What every lane holds of a step: where it lies in the first one, its slot, whether it exists, and of V which
    32-bit words of a head it is; of K as [4 t, 8 g, WARPS, 2 halves, c, 2 h, 4 words] and of V as [4 t, 8 g, WARPS,
    2 h, 2 i, c, 4 words].
    """
    t = tl.arange(0, 4)[:, None, None, None, None, None, None]
    g = tl.arange(0, 8)[:, None, None, None, None, None]
    w = tl.arange(0, WARPS)[:, None, None, None, None]
    two = tl.arange(0, 2)[:, None, None, None]
    c = tl.arange(0, WIDTH // 64)[:, None, None]
    words = tl.arange(0, 4)
    k_slot = w * 16 + g + tl.arange(0, 2)[:, None] * 8
    k_word = c * 16 + t * 4 + words
    k_real = k_word < DIM // 4
    k_word += two * (DIM // 4)
    v_slot = w * 16 + t * 2 + two * 8 + tl.arange(0, 2)[:, None, None]
    v_word = tl.arange(0, WIDTH // 64)[:, None] * 32 + g * 4 + words
    k_ptr = k_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    v_ptr = v_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    k_lane = launch.deal_to_lanes(k_ptr, k_slot * (DIM // 2) + k_word)
    v_lane = launch.deal_to_lanes(v_ptr, v_slot * (DIM // 2) + v_word)
    return k_lane, k_slot, k_real, v_lane, v_slot, v_word < DIM // 2, v_word


@triton.jit
def _load_step(cache, begin, end, WORDS: tl.constexpr):
    """One step of K and V: the words of the slots from `begin` on that are before `end`."""
    k_lane, k_slot, k_real, v_lane, v_slot, v_real = cache
    k = tl.load(launch.deal_to_lanes(k_lane, begin * WORDS), k_real & (k_slot < end - begin), 0)
    return k, tl.load(launch.deal_to_lanes(v_lane, begin * WORDS), v_real & (v_slot < end - begin), 0)


@triton.jit
def _prefetch(k_ptr, v_ptr, s, end, DIM: tl.constexpr, LINES: tl.constexpr, ASM: tl.constexpr):
    """Loads LINES of 128 bytes of K and of V from slot s on into the L2 cache, none behind the slots before `end`."""
    if ASM:
        at = tl.maximum(tl.minimum(s * DIM + tl.arange(0, LINES) * 64, end * DIM - 1), 0)
        CODE: tl.constexpr = "prefetch.global.L2 [$1]; prefetch.global.L2 [$2]; mov.b32 $0, 0;"
        pointers = [(k_ptr + at).to(tl.int64), (v_ptr + at).to(tl.int64)]
        tl.inline_asm_elementwise(CODE, "=r,l,l", pointers, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _order_of_operand(WIDTH: tl.constexpr):
    """Which dimension of half a head each number of the operands of q K^T is: they come as [c, 2 a, 4 t, 4 b] out of
    dimensions 32 c + 8 t + 4 a + b.
    """
    j = tl.arange(0, WIDTH // 2)
    return j // 32 * 32 + j // 4 % 4 * 8 + j // 16 % 2 * 4 + j % 4


@triton.jit
def _load_pair(x_ptr, y_ptr, mask):
    """Both halves of heads, or cosines and sines."""
    return tl.load(x_ptr, mask, 0), tl.load(y_ptr, mask, 0)


@triton.jit
def _load_norm(norm_ptr, column, real, HALF: tl.constexpr):
    """Both halves of a norm's gain, or None."""
    norm = norm_ptr
    if norm_ptr is not None:
        norm = _load_pair(norm_ptr + column, norm_ptr + HALF + column, real)
    return norm


@triton.jit
def _load_new_values(ptr, slot, word, real, split, T: tl.constexpr, STRIDE: tl.constexpr, WARPS: tl.constexpr):
    """The words of the new tokens' values; the value of a single token stands for every slot."""
    ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    if T == 1:
        ptr = launch.spread_over_lanes((ptr + word)[None], [4, 8, WARPS, 1, 1, word.shape[4], 4])
        value = tl.load(ptr, real, 0)
    else:
        ptr = launch.deal_to_lanes(ptr + slot * (STRIDE // 2), word)
        value = tl.load(ptr, real & (slot < T) & (split == 0), 0)
    return value


@triton.jit
def _norm_and_rotate(halves, norm, angles, eps, DIM: tl.constexpr):
    """Both halves [rows, WIDTH / 2] of heads, normed and rotated, as [rows, WIDTH]."""
    x, y = halves[0].to(tl.float32), halves[1].to(tl.float32)
    if norm is not None:
        rms = tl.rsqrt(tl.sum(x * x + y * y, 1) / DIM + eps)[:, None]
        x, y = x * rms * norm[0].to(tl.float32), y * rms * norm[1].to(tl.float32)
    cos, sin = angles
    x, y = x * cos - y * sin, y * cos + x * sin
    return tl.join(x, y).to(halves[0].dtype).permute(0, 2, 1).reshape(x.shape[0], 2 * x.shape[1])


@triton.jit
def _key_words(key):
    """New keys [1 or 16, WIDTH] as they lie in the cache: [4 t, g, 1 (for all warps), 2 halves, c, h, 4 words]."""
    N: tl.constexpr = key.shape[0]
    C: tl.constexpr = key.shape[1] // 64
    G: tl.constexpr = 1 if N == 1 else 8
    return (
        _to_words(key).reshape(N // G, G, 2, C, 2, 4, 2).permute(5, 1, 2, 3, 0, 4, 6).reshape(4, G, 1, 2, C, N // G, 4)
    )


@triton.jit
def _to_words(x):
    """Rows of numbers in a 16-bit dtype -> int32 words of two of them."""
    low, high = tl.split(x.to(tl.int16, bitcast=True).reshape(x.shape[0], x.shape[1] // 2, 2))
    return low.to(tl.int32) & 0xFFFF | high.to(tl.int32) << 16


@triton.jit
def _from_words(words, dtype: tl.constexpr):
    """int32 words -> [..., 2] in the 16-bit dtype."""
    low = words.to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, (words >> 16).to(tl.int16).to(dtype, bitcast=True))


@triton.jit
def _attend(q, k, v, scale, seen, m, total, acc, ASM: tl.constexpr):
    """One step of the online softmax: every warp adds its own 16 slots to its own sums (None: they are the first)."""
    WARPS: tl.constexpr = q.shape[0]
    BLOCK: tl.constexpr = q.shape[1]
    WIDTH: tl.constexpr = q.shape[2]
    k, v = _from_words(k, q.dtype), _from_words(v, q.dtype)
    k = k.reshape(4, 8, WARPS, 2, WIDTH // 64, 2, 2, 4).permute(2, 3, 4, 6, 0, 7, 5, 1).reshape(WARPS, WIDTH, 16)
    s = tl.where(seen, launch.dot(q, k, tl.zeros([WARPS, BLOCK, 16], tl.float32), ASM) * scale, -1e30)
    top = tl.max(s, 2)
    if m is not None:
        top = tl.maximum(m, top)
    p = tl.where(seen, tl.exp2(s - top[:, :, None]), 0.0)
    if m is None:
        total, acc = tl.sum(p, 2), tl.zeros([WARPS, WIDTH, BLOCK], tl.float32)
    else:
        fade = tl.exp2(m - top)
        total = total * fade + tl.sum(p, 2)
        acc *= fade[:, None, :]
    p = p.to(q.dtype).reshape(WARPS, BLOCK, 2, 4, 2).permute(0, 3, 2, 4, 1).reshape(WARPS, 16, BLOCK)
    v = v.permute(2, 5, 6, 7, 1, 0, 3, 4).reshape(WARPS, WIDTH, 16)  # order of slots: t, h, i; of dimensions: c, e, g
    return top, total, launch.dot(v, p, acc, ASM)


@triton.jit
def _join_warps(m, total, acc):
    """(the mean that the sums of all warps give, the logarithm of their weights' sum), each [WIDTH, BLOCK]: two by two,
    in registers, after one change of layout. Of no slots the mean is 0 and the logarithm -inf.
    """
    WIDTH: tl.constexpr = acc.shape[1]
    BLOCK: tl.constexpr = acc.shape[2]
    m, total = tl.broadcast_to(m[:, None, :], acc.shape), tl.broadcast_to(total[:, None, :], acc.shape)
    for _ in tl.static_range(5):  # up to 32 warps
        if m.shape[0] > 1:
            m, m1 = launch.halve_warps(m)
            total, total1 = launch.halve_warps(total)
            acc, acc1 = launch.halve_warps(acc)
            top = tl.maximum(m, m1)
            m, m1 = tl.exp2(m - top), tl.exp2(m1 - top)
            total, acc, m = total * m + total1 * m1, acc * m + acc1 * m1, top
    mean, lse = tl.where(total > 0, acc / total, 0.0), m + tl.log2(total)
    return mean.reshape(WIDTH, BLOCK), lse.reshape(WIDTH, BLOCK)


@triton.jit
def _order_of_dimensions(WIDTH: tl.constexpr):
    """Which dimension of the head each row of acc is: they come as [c, 8 e, 8 g] out of dimensions 64 c + 8 g + e."""
    j = tl.arange(0, WIDTH)[:, None]
    return j // 64 * 64 + j % 8 * 8 + j // 8 % 8


@triton.jit
def _store_rows(
    out_ptr,
    digits_ptr,
    unit_ptr,
    y,
    bh,
    top_row,
    T: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    """The results y [WIDTH, rows] of one KV head, from row `top_row` on, and, of heads of 128, their digits."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    d = _order_of_dimensions(y.shape[0])
    r = (top_row + tl.arange(0, y.shape[1]))[None]
    token, head = bh // KV_HEADS * T + r // GROUP, bh % KV_HEADS * GROUP + r % GROUP
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (token * HEADS + head) * DIM + d, y, (r < T * GROUP) & (d < DIM))
    if digits_ptr is not None:
        y = y.to(tl.float32)
        largest, total = tl.max(tl.abs(y), 0)[None], tl.sum(y, 0)[None]
        store_digits(y, largest, total, d, token * 2, head, r < T * GROUP, digits_ptr, unit_ptr, HEADS)


@triton.jit
def _store_part(part_ptr, y, lse, COLUMNS: tl.constexpr):
    """Leaves what a split has found for `_join_kernel`, y [WIDTH, COLUMNS] and lse, all equal along WIDTH: for every
    column its y in the order of the head, lse, and three places more, so that all begin at multiples of 16 bytes.
    """
    WIDTH: tl.constexpr = y.shape[0]
    r, d = tl.arange(0, y.shape[1]), _order_of_dimensions(WIDTH)
    part_ptr += r * (WIDTH + 4) + d
    tl.store(part_ptr, y, r < COLUMNS)
    tl.store(part_ptr + WIDTH, lse, (r < COLUMNS) & (d == 0))


@triton.jit
def _load_parts(ptr, offset, mask):
    """Of every split [splits, 16, 2, 4] numbers, or [splits, 16, 2, 1] that hold for four. A lane has four of each
    split: it adds them up alone, where with the layout that Triton chose otherwise lanes asked each other, and a launch
    took 2 us more.
    """
    return tl.load(tl.multiple_of(tl.max_contiguous(ptr + offset, [1, 8, 64, 128]), [1, 1, 1, 16]), mask, 0)


@triton.jit
def _join_kernel(
    pos_ptr,
    out_ptr,
    digits_ptr,
    unit_ptr,
    part_ptr,
    T: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    ALONE: tl.constexpr,
    PDL: tl.constexpr,
):
    """128 results of one token: the mean of what the splits have found, weighted by their sums, and its digits."""
    K: tl.constexpr = HEADS * DIM
    GROUP: tl.constexpr = HEADS // KV_HEADS
    token, chunk = tl.program_id(0), tl.program_id(1)
    launch.launch_next(PDL)
    first = tl.load(pos_ptr + token // T * T).to(tl.int32)
    _, _, used = _split_of_prefix(first, 0, T, WINDOW, SPLITS, 16 * WARPS)
    split = tl.arange(0, triton.next_power_of_2(SPLITS))[:, None, None, None]
    k = chunk * 128 + tl.arange(0, 16)[:, None, None] * 8 + tl.arange(0, 2)[:, None] * 4
    real = (k < K) & (split < used)
    r = token % T * GROUP + k // DIM % GROUP
    group = (token // T * KV_HEADS + k // (DIM * GROUP)) * (ROWS // BLOCK) + r // BLOCK
    part_ptr += (group * SPLITS + split) * ((WIDTH + 4) * COLUMNS) + r % BLOCK * (WIDTH + 4)
    launch.wait_for_previous(PDL)
    if not ALONE or used > 1:
        y, lse = _load_parts(part_ptr, k % DIM + tl.arange(0, 4), real), _load_parts(part_ptr, WIDTH, real)
        lse = tl.where(real, lse, -1e30)
        weight = tl.exp2(lse - tl.max(lse, 0)[None])
        y = (tl.sum(y * weight, 0) / tl.sum(weight, 0)).to(out_ptr.dtype.element_ty).reshape(16, 8)
        d = tl.arange(0, 16)[:, None] * 8 + tl.arange(0, 8)
        tl.store(out_ptr + token * K + chunk * 128 + d, y, chunk * 128 + d < K)
        if digits_ptr is not None:
            y = y.to(tl.float32)
            largest, total, chunks = tl.max(tl.abs(y)), tl.sum(y), (K + 127) // 128
            store_digits(y, largest, total, d, token * 2, chunk, None, digits_ptr, unit_ptr, chunks)


def _attention_shape(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, k_cache: Tensor, *others: object
) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * k_cache.shape[1] * k_cache.shape[3])


@launch.operator("attention", _attention_shape, ("k_cache", "v_cache"))
def attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    window: int,
) -> Tensor:
    """qkv [B T, (H + 2 Hkv) Dh] (q, k, v heads), T <= 16 -> [B T, H Dh].

    cos, sin float32 [B T, Dh/2]; positions int64 [B, T], consecutive in each row; k_cache, v_cache [B, Hkv, S, Dh],
    which get the new keys and values in place; q_norm, k_norm [Dh] or None; window 0: none. The length is read on the
    device, so one captured graph serves every position, and slots behind it cost nothing.
    """
    return run(qkv, (cos, sin), positions, (k_cache, v_cache), (q_norm, k_norm, eps), window)


def run(
    qkv: Tensor,
    angles: tuple[Tensor, Tensor],
    positions: Tensor,
    caches: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None, float],
    window: int,
    digits: Digits | None = None,
    next_read: Tensor | None = None,
) -> Tensor:
    """`attention`; with digits those of the result are filled, too. The L2 cache is asked for the matrix next_read."""
    (b, t), (kv_heads, slots, dim) = positions.shape, caches[0].shape[1:]
    assert all(cache.is_contiguous() for cache in caches)
    heads, width = qkv.shape[1] // dim - 2 * kv_heads, max(64, triton.next_power_of_2(dim))
    rows = t * heads // kv_heads
    block, warps, splits = tiles.attention_tile(rows, b * kv_heads, slots, width)
    columns, blocks = min(block, triton.next_power_of_2(rows)), triton.cdiv(rows, block)
    out = qkv.new_empty(b * t, heads * dim)
    filled = digits[:2] if digits is not None and (splits > 1 or dim == 128) else (None, None)
    size = b * kv_heads * blocks * splits * columns * (width + 4)
    part = None if splits == 1 else out.new_empty(size, dtype=torch.float32)
    sizes = {"T": t, "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "WIDTH": width, "WINDOW": window}
    sizes |= {"SPLITS": splits, "ROWS": blocks * block, "BLOCK": block, "COLUMNS": columns, "WARPS": warps}
    next_read, share = launch.share_of(next_read, b * kv_heads * splits)
    # a prefix of one split is not joined, unless its digits are to be those of several heads
    sizes |= {"ALONE": digits is None or dim == 128}
    _attention_kernel[(b * kv_heads, splits, blocks)](
        qkv.contiguous(),
        *angles,
        positions,
        *caches,
        *norms[:2],
        out,
        *(filled if dim == 128 else (None, None)),
        part,
        norms[2],
        dim**-0.5 * 1.4426950408889634,  # exp(x) = exp2(x log2(e))
        slots,
        next_read,
        NEXT=share,
        AHEAD=tiles.ATTENTION_AHEAD,
        ASM=not INTERPRETED,
        **sizes,
        **launch.options(warps),
    )
    if splits > 1:
        grid = (b * t, triton.cdiv(heads * dim, 128))
        _join_kernel[grid](positions, out, *filled, part, **sizes, **launch.options(1))
    elif digits is not None and dim != 128:
        fill_digits_(out, None, digits)
    return out


def attend(
    module: Attention, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: LayerCache, then: Then | None
) -> Tensor:
    """The same for a module: qkv [B, T, (H + 2 Hkv) Dh] -> [B, T, H Dh]."""
    b, t, _ = qkv.shape
    q_norm, k_norm = (None if norm is None else norm.weight for norm in (module.q_norm, module.k_norm))
    eps = 0.0 if module.q_norm is None else module.q_norm.eps
    qkv, cos, sin = (x.reshape(b * t, -1).contiguous() for x in (qkv, cos, sin))
    positions, norms = positions.contiguous(), (q_norm, k_norm, eps)
    if then is None or b * t > ROWS or torch.compiler.is_compiling():
        return attention(qkv, cos, sin, positions, cache.k, cache.v, *norms, module.window).view(b, t, -1)
    digits = empty_digits(qkv, b * t, module.o_proj.in_features, norm=False)
    left, gate_up = then
    next_read = None if gate_up is None or b * t > 1 else gate_up.operands(None)[0]
    y = run(qkv, (cos, sin), positions, (cache.k, cache.v), norms, module.window, digits, next_read)
    left.keep(y, digits)
    return y.view(b, t, -1)

"""Attention of 1 to 16 new tokens to the valid prefix of a cache, which their own keys and values enter on the way.

Knows heads, caches, RoPE and the norms of q and k. Refuses to know layers and projections.

    q, k = rotate(norm(q)), rotate(norm(k))     for every head; the norm is optional
    cache[position] = k, v
    y = softmax(q K^T / sqrt(D)) V              over the slots <= position, and > position - window if there is a window

`rotate` turns the pairs (x_i, x_(i + D/2)) by the position's angles (RoPE, the two halves of a head). A program reads
its part of the cache once, for all query heads of a KV head and all new tokens: these are its rows. The prefix is split
over programs (flash-decoding, Dao et al. 2023) and in a program over warps, in steps of 16 slots a warp. Each warp
keeps the online softmax (Milakov and Gimelshein 2018) of its own slots: the largest score m, the sum of 2^(s - m), and
the sum of 2^(s - m) v. At the end warps are joined in registers, and splits by `_combine_kernel`.

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

One new token (T = 1) is put among the old slots of the last step, which comes first; with a step of its own a pass of
Llama-2-7B took 20 to 30 us longer. Several tokens have a step of their own.

Before the wait for the kernel that computes q, k and v, everything else is loaded: the position, the first step of the
cache, angles and norms. The loop carries 16-bit numbers in pairs, as 32-bit words, which costs no conversions.
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels import INTERPRETED, launch, tiles
from model import Attention, LayerCache


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
    part_ptr,
    eps,
    scale,
    slots,
    T: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
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
    bh, split = tl.program_id(0), tl.program_id(1) if SPLITS > 1 else 0
    b, head = bh // KV_HEADS, bh % KV_HEADS
    launch.launch_next(PDL)
    first = tl.load(pos_ptr + b * T).to(tl.int32)  # written before this pass began: no need to wait
    end = first + (T == 1)  # a single new token is put among the old ones
    begin, share = _split_of_prefix(first, end, WINDOW, SPLITS, STEP)
    begin += split * share
    end = tl.minimum(begin + share, end)
    if (split > 0) & (begin >= end):
        return

    k_slot, k_word, k_real, v_slot, v_word, v_real = _cache_places(DIM, WIDTH, WARPS)
    k_ptr += bh.to(tl.int64) * slots * DIM
    v_ptr += bh.to(tl.int64) * slots * DIM
    k_lane = launch.deal_to_lanes(k_ptr.to(tl.pointer_type(tl.int32), bitcast=True), k_slot * HALF + k_word)
    v_lane = launch.deal_to_lanes(v_ptr.to(tl.pointer_type(tl.int32), bitcast=True), v_slot * HALF + v_word)
    cache = (k_lane, k_slot, k_real, v_lane, v_slot, v_real)
    late = begin + (end - begin - 1) // STEP * STEP if T == 1 else begin
    if EARLY or T == 1:
        k, v = _load_step(cache, late, end, HALF)
    for i in tl.static_range(T > 1, AHEAD):
        _prefetch(k_ptr, v_ptr, begin + i * STEP, late if T == 1 else end, DIM, STEP * WIDTH // 64, ASM)

    # Rows of q (r) and new keys (n) are [4 t, 8 g, warp, c, h, 8 e], twice, for both halves of a head. Every warp loads
    # all of them, and a single new token is loaded for every row.
    t, g = tl.arange(0, 4)[:, None, None, None, None, None], tl.arange(0, 8)[:, None, None, None, None]
    top_row = 0 if ROWS == BLOCK else tl.program_id(2) * BLOCK
    r = top_row + tl.arange(0, BLOCK // 8)[:, None] * 8 + g
    n = 0 if T == 1 else tl.arange(0, (T + 7) // 8)[:, None] * 8 + g
    column = tl.arange(0, WIDTH // 64)[:, None, None] * 32 + t * 8 + tl.arange(0, 8)
    real = column < HALF
    token = 0 if T == 1 else r // GROUP
    valid = real & (r < T * GROUP)
    angle = b * T * HALF + column
    cos, sin = _load_angles(cos_ptr, sin_ptr, angle + token * HALF, real if T == 1 else valid, WARPS)
    q_norm = _load_norm(q_norm_ptr, column, real, WARPS, HALF)
    k_norm = _load_norm(k_norm_ptr, column, real, WARPS, HALF)
    writes = end > first if T == 1 else split == 0
    launch.wait_for_previous(PDL)
    qkv_ptr += b * T * STRIDE
    value = _load_new_values(qkv_ptr + (HEADS + KV_HEADS + head) * DIM, v_slot, v_word, v_real, split, T, STRIDE, WARPS)
    launch.keep_loads_here(PDL)
    at = qkv_ptr + n * STRIDE + (HEADS + head) * DIM + column
    new = real & (n < T) & (T == 1 or split == 0)
    k_halves = _load_halves(at, new, WARPS, HALF)
    at = qkv_ptr + token * STRIDE + (head * GROUP + (r % GROUP if GROUP > 1 else 0)) * DIM + column
    q_halves = _load_halves(at, valid, WARPS, HALF)
    q = tl.zeros([WARPS, BLOCK, WIDTH], qkv_ptr.dtype.element_ty)
    key = tl.zeros([4, 8, WARPS, 2, WIDTH // 64, (T + 7) // 8, 4], tl.int32)
    if launch.always_true(eps, 0):
        q = _query_operand(q_halves, q_norm, cos, sin, eps, DIM, BLOCK)
        k_cos, k_sin = cos, sin
        if T > 1 and (GROUP > 1 or ROWS > BLOCK):  # keys have other rows than q
            k_cos, k_sin = _load_angles(cos_ptr, sin_ptr, angle + n * HALF, new, WARPS)
        key = _key_words(k_halves, k_norm, k_cos, k_sin, eps, DIM, ASM)

    slot = tl.arange(0, WARPS)[:, None, None] * 16 + tl.arange(0, 16)
    row_token = ((top_row + tl.arange(0, BLOCK)) // GROUP)[:, None]
    m, total = tl.full([WARPS, BLOCK], -1e30, tl.float32), tl.zeros([WARPS, BLOCK], tl.float32)
    acc = tl.zeros([WARPS, WIDTH, BLOCK], tl.float32)
    wanted = k_real & (k_slot < T) & writes & (ROWS == BLOCK or tl.program_id(2) == 0)
    tl.store(launch.deal_to_lanes(k_lane, first * HALF), key, wanted)
    tl.store(launch.deal_to_lanes(v_lane, first * HALF), value, v_real & (v_slot < T) & writes)
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
        s = begin + slot
        seen = (s < end) & ((WINDOW == 0) | (s > first + row_token - WINDOW))
        begin += STEP
        if EARLY:
            k, v = _load_step(cache, begin, end, HALF)
        _prefetch(k_ptr, v_ptr, begin + (AHEAD - 1) * STEP, end, DIM, STEP * WIDTH // 64, ASM)
        m, total, acc = _attend(q, old_k, old_v, scale, seen, m, total, acc, ASM)
    m, total, acc = _join_warps(m, total, acc)
    d = _order_of_dimensions(WIDTH)
    r = top_row + tl.arange(0, BLOCK)
    valid = r < T * GROUP
    where = (b * T + r // GROUP) * (HEADS * DIM) + (head * GROUP + r % GROUP) * DIM
    if SPLITS > 1:
        where = ((bh * SPLITS + split) * ROWS + r) * (WIDTH + 2)
    _store_rows(out_ptr, part_ptr, where, d, valid, m, total, acc, DIM)


@triton.jit
def _split_of_prefix(first, end, WINDOW: tl.constexpr, SPLITS: tl.constexpr, STEP: tl.constexpr):
    """(the first slot that new tokens from position `first` on attend to, how many of the slots before `end` are in one
    split: whole steps).
    """
    begin = 0 if WINDOW == 0 else tl.maximum(first - WINDOW + 1, 0)
    return begin, tl.cdiv(tl.cdiv(end - begin, SPLITS), STEP) * STEP


@triton.jit
def _cache_places(DIM: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr):
    """Which slot of a step, which 32-bit word of a head, and whether it exists, for what every lane holds: of K as
    [4 t, 8 g, WARPS, 2 halves, c, 2 h, 4 words] and of V as [4 t, 8 g, WARPS, 2 h, 2 i, c, 4 words].
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
    return k_slot, k_word, k_real, v_slot, v_word, v_word < DIM // 2


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
def _load_half(ptr, mask, WARPS: tl.constexpr):
    """One half of heads for all lanes and warps: [4 t, 8 g, WARPS, c, h, 8 e]."""
    ptr = launch.spread_over_lanes(ptr, [4, 8, WARPS, ptr.shape[3], ptr.shape[4], 8])
    return tl.load(ptr, mask, 0)


@triton.jit
def _load_halves(ptr, mask, WARPS: tl.constexpr, HALF: tl.constexpr):
    """Both halves of heads, ptr being that of the first."""
    return _load_half(ptr, mask, WARPS), _load_half(ptr + HALF, mask, WARPS)


@triton.jit
def _load_angles(cos_ptr, sin_ptr, at, mask, WARPS: tl.constexpr):
    """Cosines and sines, the same for both halves."""
    return _load_half(cos_ptr + at, mask, WARPS), _load_half(sin_ptr + at, mask, WARPS)


@triton.jit
def _load_norm(norm_ptr, column, real, WARPS: tl.constexpr, HALF: tl.constexpr):
    """Both halves of a norm's gain, or None."""
    norm = norm_ptr
    if norm_ptr is not None:
        norm = _load_halves(norm_ptr + column, real, WARPS, HALF)
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
def _norm_and_rotate(halves, norm, cos, sin, eps, DIM: tl.constexpr):
    """Both halves of heads [4 t, 8 g, WARPS, c, h, 8 e], normed and rotated, in float32."""
    x, y = halves
    x, y = x.to(tl.float32), y.to(tl.float32)
    if norm is not None:
        square = tl.sum(tl.sum(tl.sum(x * x + y * y, 5), 3), 0)
        rms = tl.rsqrt(square / DIM + eps)[None, :, :, None, :, None]
        x, y = x * rms * norm[0].to(tl.float32), y * rms * norm[1].to(tl.float32)
    return x * cos - y * sin, y * cos + x * sin


@triton.jit
def _query_operand(halves, norm, cos, sin, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[WARPS, BLOCK rows, WIDTH]: the first operand of q K^T."""
    x, y = _norm_and_rotate(halves, norm, cos, sin, eps, DIM)
    WARPS: tl.constexpr = x.shape[2]
    C: tl.constexpr = x.shape[3]
    q = tl.join(x, y).to(halves[0].dtype).reshape(4, 8, WARPS, C, BLOCK // 8, 2, 4, 2)
    return q.permute(2, 4, 1, 7, 3, 5, 0, 6).reshape(WARPS, BLOCK, C * 64)


@triton.jit
def _key_words(halves, norm, cos, sin, eps, DIM: tl.constexpr, ASM: tl.constexpr):
    """The words of new keys, as they lie in the cache: [4 t, 8 g, WARPS, 2 halves, c, h, 4 words]."""
    x, y = _norm_and_rotate(halves, norm, cos, sin, eps, DIM)
    x, y = _to_words(x, halves[0].dtype, ASM), _to_words(y, halves[0].dtype, ASM)
    return tl.join(x, y).permute(0, 1, 2, 6, 3, 4, 5)


@triton.jit
def _to_words(x, dtype: tl.constexpr, ASM: tl.constexpr):
    """float32 [..., 8] -> int32 words [..., 4] of two numbers in the 16-bit dtype."""
    low, high = tl.split(x.reshape(x.shape[0], x.shape[1], x.shape[2], x.shape[3], x.shape[4], 4, 2))
    if ASM:
        KIND: tl.constexpr = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
        return tl.inline_asm_elementwise(
            f"cvt.rn.{KIND}.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    low, high = low.to(dtype).to(tl.int16, bitcast=True), high.to(dtype).to(tl.int16, bitcast=True)
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
    """The sums of all warps as one, each [WIDTH, BLOCK]: two by two, in registers, after one change of layout."""
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
    return m.reshape(WIDTH, BLOCK), total.reshape(WIDTH, BLOCK), acc.reshape(WIDTH, BLOCK)


@triton.jit
def _order_of_dimensions(WIDTH: tl.constexpr):
    """Which dimension of the head each row of acc is: they come as [c, 8 e, 8 g] out of dimensions 64 c + 8 g + e."""
    j = tl.arange(0, WIDTH)[:, None]
    return j // 64 * 64 + j % 8 * 8 + j // 8 % 8


@triton.jit
def _store_rows(out_ptr, part_ptr, where, d, valid, m, total, acc, DIM: tl.constexpr):
    """The result of every row; with splits m, the sum and acc, WIDTH + 2 numbers, for `_combine_kernel`."""
    if part_ptr is None:
        tl.store(out_ptr + where + d, (acc / total).to(out_ptr.dtype.element_ty), valid & (d < DIM))
    else:
        tl.store(part_ptr + where + 2 + d, acc, valid)
        tl.store(part_ptr + where + d, tl.where(d == 0, m, total), valid & (d < 2))


@triton.jit
def _combine_kernel(
    part_ptr,
    pos_ptr,
    out_ptr,
    T: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Joins the splits of one token and head."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    token = tl.program_id(0)
    head = tl.program_id(1)
    row = token % T * GROUP + head % GROUP
    split = tl.arange(0, triton.next_power_of_2(SPLITS))
    where = (((token // T) * KV_HEADS + head // GROUP) * SPLITS + split) * ROWS + row
    d = tl.arange(0, WIDTH)
    first = tl.load(pos_ptr + token // T * T).to(tl.int32)
    end = first + (T == 1)
    begin, share = _split_of_prefix(first, end, WINDOW, SPLITS, STEP)
    used = (split == 0) | (begin + split * share < end)
    launch.wait_for_previous(PDL)
    launch.launch_next(PDL)
    part_ptr += where * (WIDTH + 2)
    top, total = tl.load(part_ptr, used, -1e30), tl.load(part_ptr + 1, used, 0)
    x = tl.load(part_ptr[:, None] + 2 + d, used[:, None], 0)
    launch.keep_loads_here(PDL)
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(total * weight, 0)
    out = tl.sum(x * weight[:, None], 0) / total
    tl.store(out_ptr + (token * HEADS + head) * DIM + d, out.to(out_ptr.dtype.element_ty), d < DIM)


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
    (b, t), (kv_heads, slots, dim) = positions.shape, k_cache.shape[1:]
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    qkv = qkv.contiguous()
    heads = qkv.shape[1] // dim - 2 * kv_heads
    width = max(64, triton.next_power_of_2(dim))
    rows, splits = t * heads // kv_heads, tiles.splits(b * kv_heads, slots)
    block, warps = tiles.attention_tile(rows, splits, width)
    rows = triton.cdiv(rows, block) * block
    out = torch.empty(b * t, heads * dim, dtype=qkv.dtype, device=qkv.device)
    part = None
    if splits > 1:
        part = torch.empty(b * kv_heads * splits * rows * (width + 2), dtype=torch.float32, device=qkv.device)
    sizes = {"T": t, "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "WIDTH": width, "WINDOW": window}
    sizes |= {"SPLITS": splits, "ROWS": rows}
    _attention_kernel[(b * kv_heads, splits, rows // block)](
        qkv,
        cos,
        sin,
        positions,
        k_cache,
        v_cache,
        q_norm,
        k_norm,
        out,
        part,
        eps,
        dim**-0.5 * 1.4426950408889634,  # exp(x) = exp2(x log2(e))
        slots,
        BLOCK=block,
        WARPS=warps,
        AHEAD=tiles.ATTENTION_AHEAD,
        ASM=not INTERPRETED,
        **sizes,
        **launch.options(warps),
    )
    if splits > 1:
        _combine_kernel[(b * t, heads)](part, positions, out, STEP=16 * warps, **sizes, **launch.options(warps))
    return out


def attend(module: Attention, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: LayerCache) -> Tensor:
    """The same for a module: qkv [B, T, (H + 2 Hkv) Dh] -> [B, T, H Dh]."""
    b, t, _ = qkv.shape
    q_norm, k_norm = (None if norm is None else norm.weight for norm in (module.q_norm, module.k_norm))
    eps = 0.0 if module.q_norm is None else module.q_norm.eps
    qkv, cos, sin = (x.reshape(b * t, -1).contiguous() for x in (qkv, cos, sin))
    y = attention(qkv, cos, sin, positions.contiguous(), cache.k, cache.v, q_norm, k_norm, eps, module.window)
    return y.view(b, t, -1)

"""Attention of a few new tokens to the valid prefix of a cache, their own keys and values entering it on the way.

Knows heads, caches, RoPE and the norms of q and k. Refuses to know layers and projections.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from decode_kernels import INTERPRETED, tiles
from decode_kernels.launch import deal_to_lanes, dot, halve_warps, operator
from decode_kernels.launch import options as launch_options


@triton.jit
def _pair(words: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """int32 words -> [..., 2] in the 16-bit dtype; a loop carries words for nothing, 16-bit numbers at a price."""
    low = words.to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, (words >> 16).to(tl.int16).to(dtype, bitcast=True))


@triton.jit
def _words(x: tl.tensor, dtype: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """The opposite: float32 [..., 8] -> int32 words [..., 4]."""
    low, high = tl.split(x.reshape(x.shape[0], x.shape[1], x.shape[2], x.shape[3], x.shape[4], 4, 2))
    if ASM:
        KIND: tl.constexpr = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
        return tl.inline_asm_elementwise(
            f"cvt.rn.{KIND}.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    low, high = low.to(dtype).to(tl.int16, bitcast=True), high.to(dtype).to(tl.int16, bitcast=True)
    return low.to(tl.int32) & 0xFFFF | high.to(tl.int32) << 16


@triton.jit
def _rotated(
    x: tl.tensor, y: tl.tensor, norm: tl.tuple, cos: tl.tensor, sin: tl.tensor, eps: tl.tensor, DIM: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The halves x, y of heads [4 t, 8 g, WARPS, c, h, 8 e], normed and rotated, in float32."""
    x, y = x.to(tl.float32), y.to(tl.float32)
    if norm is not None:
        square = tl.sum(tl.sum(tl.sum(x * x + y * y, 5), 3), 0)
        rms = tl.rsqrt(square / DIM + eps)[None, :, :, None, :, None]
        x, y = x * rms * norm[0].to(tl.float32), y * rms * norm[1].to(tl.float32)
    return x * cos - y * sin, y * cos + x * sin


@triton.jit
def _prefetch_lines(
    k_ptr: tl.tensor, v_ptr: tl.tensor, s: tl.tensor, end: tl.tensor, DIM: tl.constexpr, LINES: tl.constexpr,
    ASM: tl.constexpr,
) -> None:  # fmt: skip
    """Asks the L2 cache for LINES of 128 bytes of both from slot s on, none behind the slots before `end`."""
    if ASM:
        at = tl.maximum(tl.minimum(s * DIM + tl.arange(0, LINES) * 64, end * DIM - 1), 0)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; prefetch.global.L2 [$2]; mov.b32 $0, 0;", "=r,l,l",
            [(k_ptr + at).to(tl.int64), (v_ptr + at).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _share(
    first: tl.tensor, end: tl.tensor, WINDOW: tl.constexpr, SPLITS: tl.constexpr, STEP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The first slot that a row with its new tokens from `first` on attends to, and the slots of one split of those
    before `end`.
    """
    begin = 0 if WINDOW == 0 else tl.maximum(first - WINDOW + 1, 0)
    return begin, tl.cdiv(tl.cdiv(end - begin, SPLITS), STEP) * STEP


@triton.jit
def _old(old: tl.tuple, begin: tl.tensor, end: tl.tensor, WORDS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """One step of K and V: the int32 words of slots begin + slot before `end`."""
    lane, slot, real, v_lane, v_slot, v_real = old
    k = tl.load(deal_to_lanes(lane, begin * WORDS), real & (slot < end - begin), 0)
    return k, tl.load(deal_to_lanes(v_lane, begin * WORDS), v_real & (v_slot < end - begin), 0)


@triton.jit
def _load(ptr: tl.tensor, mask: tl.tensor, WARPS: tl.constexpr) -> tl.tensor:
    """Halves of heads for all lanes and warps: [4 t, 8 g, WARPS, c, h, 8 e]."""
    ptr = tl.broadcast_to(ptr, [4, 8, WARPS, ptr.shape[3], ptr.shape[4], 8])
    return tl.load(tl.max_contiguous(ptr, [64, 32, 16, 8, 1, 128]), mask, 0)


@triton.jit
def _attend(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, scale: tl.tensor, seen: tl.tensor, m: tl.tensor, total: tl.tensor,
    acc: tl.tensor, ASM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One step of the online softmax: every warp adds its own 16 slots to its own sums."""
    WARPS: tl.constexpr = q.shape[0]
    BLOCK: tl.constexpr = q.shape[1]
    WIDTH: tl.constexpr = q.shape[2]
    k, v = _pair(k, q.dtype), _pair(v, q.dtype)
    k = k.reshape(4, 8, WARPS, 2, WIDTH // 64, 2, 2, 4).permute(2, 3, 4, 6, 0, 7, 5, 1).reshape(WARPS, WIDTH, 16)
    s = tl.where(seen, dot(q, k, tl.zeros([WARPS, BLOCK, 16], tl.float32), ASM) * scale, -1e30)
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
    v = v.permute(2, 5, 6, 7, 1, 0, 3, 4).reshape(WARPS, WIDTH, 16)  # slots in the order t, h, i, d in c, e, g
    return top, total, dot(v, p, acc, ASM)


@triton.jit
def _attention_kernel(
    qkv_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, pos_ptr: tl.tensor, k_ptr: tl.tensor,
    v_ptr: tl.tensor, q_norm_ptr: tl.tensor, k_norm_ptr: tl.tensor, out_ptr: tl.tensor, part_ptr: tl.tensor,
    eps: tl.tensor, scale: tl.tensor, slots: tl.tensor, T: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
    ASM: tl.constexpr,
) -> None:  # fmt: skip
    """One split of the prefix for BLOCK (8 or 16) rows (query heads x tokens) of one KV head; every warp walks its
    own slots, the last ones first where there is one new token.
    """
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    GROUP: tl.constexpr = HEADS // KV_HEADS
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
    STEP: tl.constexpr = 16 * WARPS  # slots per iteration
    HALF: tl.constexpr = DIM // 2
    C: tl.constexpr = WIDTH // 64
    EARLY: tl.constexpr = WIDTH <= 128  # the next step is loaded into registers in advance
    bh = tl.program_id(0)
    split = tl.program_id(1) if SPLITS > 1 else 0
    b = bh // KV_HEADS
    head = bh % KV_HEADS
    if PDL:
        gdc_launch_dependents()
    first = tl.load(pos_ptr + b * T).to(tl.int32)  # written before this pass began: no need to wait
    end = first + (T == 1)  # a single new token is put among the old ones
    begin, share = _share(first, end, WINDOW, SPLITS, STEP)
    begin += split * share
    end = tl.minimum(begin + share, end)
    if (split > 0) & (begin >= end):
        return

    # K as [4 t, 8 g, warp, 2 halves, c, 2 h, 4 words]: slot 8 h + g of the warp's 16, d = 32 c + 8 t + e of a half
    # V as [4 t, 8 g, warp, 2 h, 2 i, c, 4 words]: slot 8 h + 2 t + i, d = 64 c + 8 g + e
    t = tl.arange(0, 4)[:, None, None, None, None, None, None]
    g = tl.arange(0, 8)[:, None, None, None, None, None]
    w = tl.arange(0, WARPS)[:, None, None, None, None]
    two = tl.arange(0, 2)[:, None, None, None]
    c = tl.arange(0, C)[:, None, None]
    words = tl.arange(0, 4)
    k_slot = w * 16 + g + tl.arange(0, 2)[:, None] * 8
    k_word = c * 16 + t * 4 + words
    k_real = k_word < HALF // 2
    k_word += two * (HALF // 2)
    v_slot = w * 16 + t * 2 + two * 8 + tl.arange(0, 2)[:, None, None]
    v_word = tl.arange(0, C)[:, None] * 32 + g * 4 + words
    v_real = v_word < HALF
    k_ptr += bh.to(tl.int64) * slots * DIM
    v_ptr += bh.to(tl.int64) * slots * DIM
    k_lane = deal_to_lanes(k_ptr.to(tl.pointer_type(tl.int32), bitcast=True), k_slot * HALF + k_word)
    v_lane = deal_to_lanes(v_ptr.to(tl.pointer_type(tl.int32), bitcast=True), v_slot * HALF + v_word)
    old = (k_lane, k_slot, k_real, v_lane, v_slot, v_real)
    late = begin + (end - begin - 1) // STEP * STEP if T == 1 else begin
    if EARLY or T == 1:
        k, v = _old(old, late, end, HALF)
    for i in tl.static_range(T > 1, AHEAD):
        _prefetch_lines(k_ptr, v_ptr, begin + i * STEP, late if T == 1 else end, DIM, STEP * WIDTH // 64, ASM)

    # rows of q, and new tokens, as [4 t, 8 g, warp, c, h, 8 e] of both halves of a head; one token is everybody's
    t = tl.arange(0, 4)[:, None, None, None, None, None]
    g = tl.arange(0, 8)[:, None, None, None, None]
    top_row = 0 if ROWS == BLOCK else tl.program_id(2) * BLOCK
    r = top_row + tl.arange(0, BLOCK // 8)[:, None] * 8 + g
    n = 0 if T == 1 else tl.arange(0, (T + 7) // 8)[:, None] * 8 + g
    column = tl.arange(0, C)[:, None, None] * 32 + t * 8 + tl.arange(0, 8)
    real = column < HALF
    token = 0 if T == 1 else r // GROUP
    valid = real & (r < T * GROUP)
    there = real if T == 1 else valid
    angle = b * T * HALF + column
    at = angle + token * HALF
    cos, sin = _load(cos_ptr + at, there, WARPS), _load(sin_ptr + at, there, WARPS)
    q_norm = None
    if q_norm_ptr is not None:
        q_norm = (_load(q_norm_ptr + column, real, WARPS), _load(q_norm_ptr + HALF + column, real, WARPS))
    k_norm = None
    if k_norm_ptr is not None:
        k_norm = (_load(k_norm_ptr + column, real, WARPS), _load(k_norm_ptr + HALF + column, real, WARPS))
    writes = end > first if T == 1 else split == 0
    if PDL:
        gdc_wait()
    qkv_ptr += b * T * STRIDE
    at = (qkv_ptr + (HEADS + KV_HEADS + head) * DIM).to(tl.pointer_type(tl.int32), bitcast=True)
    if T == 1:
        at = tl.broadcast_to((at + v_word)[None], [4, 8, WARPS, 1, 1, C, 4])
        value = tl.load(tl.max_contiguous(at, [64, 32, 16, 8, 1, 1, 128]), v_real, 0)
    else:
        at = deal_to_lanes(at + v_slot * (STRIDE // 2), v_word)
        value = tl.load(at, v_real & (v_slot < T) & (split == 0), 0)
    if PDL:  # returns at once, and is a fence: the loads above are not moved down to their uses
        gdc_wait()
    at = qkv_ptr + n * STRIDE + (HEADS + head) * DIM + column
    new = real & (n < T) & (T == 1 or split == 0)
    low, high = _load(at, new, WARPS), _load(at + HALF, new, WARPS)
    at = qkv_ptr + token * STRIDE + (head * GROUP + (r % GROUP if GROUP > 1 else 0)) * DIM + column
    x, y = _load(at, valid, WARPS), _load(at + HALF, valid, WARPS)
    q = tl.zeros([WARPS, BLOCK, WIDTH], dtype)
    key = tl.zeros([4, 8, WARPS, 2, C, (T + 7) // 8, 4], tl.int32)
    if eps != -1:  # always: but no arithmetic goes up across a branch, in front of the loads
        first_half, second_half = _rotated(x, y, q_norm, cos, sin, eps, DIM)
        q = tl.join(first_half, second_half).to(dtype).reshape(4, 8, WARPS, C, BLOCK // 8, 2, 4, 2)
        q = q.permute(2, 4, 1, 7, 3, 5, 0, 6).reshape(WARPS, BLOCK, WIDTH)
        if T > 1 and (GROUP > 1 or ROWS > BLOCK):  # other rows than those of q
            of_token = angle + n * HALF
            k_cos, k_sin = _load(cos_ptr + of_token, new, WARPS), _load(sin_ptr + of_token, new, WARPS)
        else:
            k_cos, k_sin = cos, sin
        first_half, second_half = _rotated(low, high, k_norm, k_cos, k_sin, eps, DIM)
        key = tl.join(_words(first_half, dtype, ASM), _words(second_half, dtype, ASM)).permute(0, 1, 2, 6, 3, 4, 5)

    slot = tl.arange(0, WARPS)[:, None, None] * 16 + tl.arange(0, 16)
    row_token = ((top_row + tl.arange(0, BLOCK)) // GROUP)[:, None]
    m = tl.full([WARPS, BLOCK], -1e30, tl.float32)
    total = tl.zeros([WARPS, BLOCK], tl.float32)
    acc = tl.zeros([WARPS, WIDTH, BLOCK], tl.float32)
    wanted = k_real & (k_slot < T) & writes & (ROWS == BLOCK or tl.program_id(2) == 0)
    tl.store(deal_to_lanes(k_lane, first * HALF), key, wanted)
    tl.store(deal_to_lanes(v_lane, first * HALF), value, v_real & (v_slot < T) & writes)
    if T == 1:  # among the last old slots
        old_k = tl.where(k_slot == first - late, key, k)
        old_v = tl.where(v_slot == first - late, value, v)
        if EARLY:
            k, v = _old(old, begin, late, HALF)
        m, total, acc = _attend(q, old_k, old_v, scale, late + slot < end, None, None, None, ASM)
        end = late
    elif split == 0:
        known = (slot <= row_token) & ((WINDOW == 0) | (slot > row_token - WINDOW))
        both = tl.broadcast_to(key, [4, 8, WARPS, 2, C, 2, 4])
        m, total, acc = _attend(q, both, value, scale, known, m, total, acc, ASM)
    while begin < end:  # not range(): the interpreter cannot on a loaded bound
        if not EARLY:
            k, v = _old(old, begin, end, HALF)
        old_k, old_v = k, v
        s = begin + slot
        seen = (s < end) & ((WINDOW == 0) | (s > first + row_token - WINDOW))
        begin += STEP
        if EARLY:
            k, v = _old(old, begin, end, HALF)
        _prefetch_lines(k_ptr, v_ptr, begin + (AHEAD - 1) * STEP, end, DIM, STEP * WIDTH // 64, ASM)
        m, total, acc = _attend(q, old_k, old_v, scale, seen, m, total, acc, ASM)
    # the sums of all warps into one, two by two: in registers, after one change of layout
    m, total = tl.broadcast_to(m[:, None, :], acc.shape), tl.broadcast_to(total[:, None, :], acc.shape)
    for _ in tl.static_range(5):
        if m.shape[0] > 1:
            m, m1 = halve_warps(m)
            total, total1 = halve_warps(total)
            acc, acc1 = halve_warps(acc)
            top = tl.maximum(m, m1)
            m, m1 = tl.exp2(m - top), tl.exp2(m1 - top)
            total, acc, m = total * m + total1 * m1, acc * m + acc1 * m1, top
    top, total, out = m.reshape(WIDTH, BLOCK), total.reshape(WIDTH, BLOCK), acc.reshape(WIDTH, BLOCK)
    j = tl.arange(0, WIDTH)[:, None]
    d = j // 64 * 64 + j % 8 * 8 + j // 8 % 8
    r = top_row + tl.arange(0, BLOCK)
    valid = r < T * GROUP
    if SPLITS == 1:
        where = (b * T + r // GROUP) * (HEADS * DIM) + (head * GROUP + r % GROUP) * DIM
        tl.store(out_ptr + where + d, (out / total).to(dtype), valid & (d < DIM))
    else:
        where = ((bh * SPLITS + split) * ROWS + r) * (WIDTH + 2)
        tl.store(part_ptr + where + 2 + d, out, valid)
        tl.store(part_ptr + where + d, tl.where(d == 0, top, total), valid & (d < 2))


@triton.jit
def _combine_kernel(
    part_ptr: tl.tensor, pos_ptr: tl.tensor, out_ptr: tl.tensor, T: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Joins the splits of one token and head (Dao et al. 2023, flash-decoding)."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    token = tl.program_id(0)
    head = tl.program_id(1)
    row = token % T * GROUP + head % GROUP
    split = tl.arange(0, triton.next_power_of_2(SPLITS))
    where = (((token // T) * KV_HEADS + head // GROUP) * SPLITS + split) * ROWS + row
    d = tl.arange(0, WIDTH)
    first = tl.load(pos_ptr + token // T * T).to(tl.int32)
    end = first + (T == 1)
    begin, share = _share(first, end, WINDOW, SPLITS, STEP)
    used = (split == 0) | (begin + split * share < end)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    part_ptr += where * (WIDTH + 2)
    top, total = tl.load(part_ptr, used, -1e30), tl.load(part_ptr + 1, used, 0)
    x = tl.load(part_ptr[:, None] + 2 + d, used[:, None], 0)
    if PDL:  # a fence: the three are on their way together
        gdc_wait()
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(total * weight, 0)
    out = tl.sum(x * weight[:, None], 0) / total
    tl.store(out_ptr + (token * HEADS + head) * DIM + d, out.to(out_ptr.dtype.element_ty), d < DIM)


def _attention(
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
    b, t = positions.shape
    kv_heads, slots, dim = k_cache.shape[1:]
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
    launch = launch_options(warps)
    scale = dim**-0.5 * 1.4426950408889634  # exp(x) = exp2(x log2(e))
    _attention_kernel[(b * kv_heads, splits, rows // block)](
        qkv, cos, sin, positions, k_cache, v_cache, q_norm, k_norm, out, part, eps, scale, slots, t, heads, kv_heads,
        dim, width, window, splits, rows, block, warps, tiles.ATTENTION_AHEAD, ASM=not INTERPRETED, **launch,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(b * t, heads)](
            part, positions, out, t, heads, kv_heads, dim, width, window, splits, rows, 16 * warps, **launch
        )
    return out


def _attention_shape(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float, window: int,
) -> Tensor:  # fmt: skip
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * k_cache.shape[1] * k_cache.shape[3])


attention = operator("attention", _attention_shape, ("k_cache", "v_cache"))(_attention)

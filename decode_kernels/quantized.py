"""int8 and int4 weights times 1 to 16 rows of activations, by integer products on the tensor cores.

Knows the layout of packed weights, the digits of activations, the product, and how a packed matrix becomes a plain one
again. Refuses to know layers and files.

    w = scale[n, group] * (q - zero[n, group])      a scale and perhaps a zero point for every output feature n and
                                                    group of inputs; int8: q in -128..127, int4: q in -8..7
    y = x' W^T + bias,  then silu(gate) * up,  then + residual      (x' = x normed; all as in `dense.py`)

A GPU has no time to make floats of the weights: unpacking, scaling and adding take two to three instructions a weight,
which is longer than reading them. So the activations become integers instead, and the tensor cores multiply integers:
their instruction m16n8k32 takes 16 x 32 int8 weights and 32 x 8 int8 activations and adds exactly, in 32 bits. int8
weights need no instruction besides, int4 weights a mask and half a shift for four of them. The integers are summed over
as many columns as share a scale, at most 128, and a sum takes one instruction to become a float and one to be scaled. A
scale that all columns of a row share multiplies the result instead.

The digits of activations are explained in `digits.py`. One row takes two of the instruction's eight columns, four rows
take all, and more rows two or four times as many products, but no more bytes. The norm's gain is multiplied into x
before; its factor 1 / rms is one number a row and is multiplied into y.

**What silu(gate) * up can be.** The norm of K activations leaves a vector whose length is at most sqrt(K). So a gate or
an up is at most sqrt(K) times the length of its row of the matrix, times the gain, and |silu(gate) * up| at most the
product of both bounds. So one row's results, which the next product reads, get their digits where they are computed.
That saves a kernel a layer.

Worked example: K = 4, all weights 0.8, a gain of 1. A row is 1.6 long, so a gate is at most 2 * 1.6 = 3.2, and so is an
up. silu(gate) * up is at most 10.24.

**What a residual and a product can be.** A result of o_proj is a residual, of which a program loads the 128 that share
a unit, and a product that is at most the length of x times that of a row. The length of x is at most that of all its
chunks of 128 added up, and a chunk's is at most sqrt(128) times its largest. So these results, too, get digits where
they are computed, times the gain of the norm that comes next, and sums of 16 squares.

Worked example: with a row that is 1.6 long, x of length 2, a largest residual of 5 and a gain of 1 the bound is
5 + 2 * 1.6 = 8.2.

**Weights: an operand as it lies in memory.** A lane loads 16 bytes in a row, and they are what the instruction wants in
that lane, so nothing is exchanged between lanes. `pack` puts 16 rows x 128 columns into 2,048 bytes (int8) in the order

    [2 e, 2 u, 8 g, 4 t, 2 b, 2 h, 4 i]   of row 8 h + g and column 64 u + 32 e + 8 t + 4 b + i

The pair (e, u) numbers four instructions, 4 g + t is the lane, and 8 b + 4 h + i is the byte of its 16. int4 keeps
e = 0 in the high nibbles and e = 1 in the low nibbles of half as many bytes, so one load serves two instructions.

Worked example: row 9, column 45.

    9 = 8 * 1 + 1                               so h = 1, g = 1
    45 = 64 * 0 + 32 * 1 + 8 * 1 + 4 * 1 + 1    so u = 0, e = 1, t = 1, b = 1, i = 1
    int8: byte 1024 * 1 + 512 * 0 + 64 * 1 + 16 * 1 + 8 * 1 + 4 * 1 + 1 = 1117; lane 5 loads it, as byte 13 of 16
    int4: the low nibble of byte 1117 - 1024 = 93

The instruction takes byte 13 of lane 5 for its row 9 and its k = 21. So its k are other columns than the matrix has
there, which does not matter, for the digits of the activations lie in the same order.
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels import INTERPRETED, Letters, launch, tiles
from decode_kernels.dense import empty_result, interleave_gates, load_for_result, store_result
from decode_kernels.digits import Digits, empty_digits, fill_digits_, store_four_digits

# -- the layout ----------------


def pack(q: Tensor, bits: int) -> Tensor:
    """int8 [..., N, K] -> [..., N/16, K/128, 2048] int8 (8 bits) or [..., N/16, K/128, 1024] uint8 (4 bits, values
    -8..7), in the order of the module docstring; padded with zeros to whole blocks.
    """
    n, k = q.shape[-2:]
    q = F.pad(q, (0, -k % 128, 0, -n % 16)).unflatten(-2, (-1, 2, 8)).unflatten(-1, (-1, 2, 2, 4, 2, 4))
    # [n, h, g, c, u, e, t, b, i] -> [n, c, e, u, g, t, b, h, i]
    q = q.movedim((-9, -8, -7, -6, -5, -4, -3, -2, -1), (-9, -2, -5, -8, -6, -7, -4, -3, -1))
    if bits == 8:
        return q.flatten(-7).contiguous()
    high, low = q.unbind(-7)
    return (high << 4 | low & 15).flatten(-6).view(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`, padding included: -> int8 [..., N, K]."""
    if bits == 4:
        packed = packed.view(torch.int8)
        packed = torch.cat([packed >> 4, packed << 4 >> 4], -1)
    q = packed.unflatten(-1, (2, 2, 8, 4, 2, 2, 4))
    q = q.movedim((-9, -2, -5, -8, -6, -7, -4, -3, -1), (-9, -8, -7, -6, -5, -4, -3, -2, -1))
    return q.flatten(-6).flatten(-4, -2)


# -- the product ----------------


@triton.jit
def _quantized_kernel(
    digits_ptr,
    unit_ptr,
    squares_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    residual_ptr,
    experts_ptr,
    letters,
    leave,  # not None: one row leaves (digits, units) of its results, and what `bounds.py` knows of these
    # and, of the norm that comes next, the gain and the sums of squares
    out_ptr,
    rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    SILU: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALVES: tl.constexpr,  # the digits are four of one row
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    W_AHEAD: tl.constexpr,
    X_AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    """TILES * 16 rows of the matrix times COLUMNS / 2 rows of activations.

    Warp i takes the chunks of 128 columns i, i + WARPS, i + 2 WARPS, ... of the matrix. The loop is unrolled: it loads
    the weights of a step W_AHEAD steps before it multiplies them, the digits X_AHEAD steps before.
    """
    CHUNKS: tl.constexpr = (K + 127) // 128
    STEPS: tl.constexpr = (CHUNKS + WARPS - 1) // WARPS
    ROW: tl.constexpr = BITS == 8 and GROUP == K and zero_ptr is None  # a scale multiplies the result of its row
    SCALES: tl.constexpr = 0 if ROW else 128 // GROUP if GROUP < 128 and GROUP < K else 1  # in a row of a chunk
    BYTES: tl.constexpr = 256 * BITS  # bytes of 16 rows of a chunk
    OUT: tl.constexpr = N // 2 if SILU else N
    M: tl.constexpr = 1 if HALVES else COLUMNS // 2
    BLOCK_N: tl.constexpr = TILES * (8 if SILU else 16)
    start = tl.program_id(0) * BLOCK_N
    m = tl.program_id(1)
    launch.launch_next(PDL)
    if experts_ptr is not None:  # every row of activations has a matrix and columns of its own
        launch.wait_for_previous(PDL)
        expert = tl.load(experts_ptr + m)
        digits_ptr += m * (CHUNKS * 1024)
        unit_ptr += m * (CHUNKS * 8)
        squares_ptr = squares_ptr if squares_ptr is None else squares_ptr + m * CHUNKS
        out_ptr += m * OUT
        residual_ptr = residual_ptr if residual_ptr is None else residual_ptr + m * OUT
        w_ptr += expert * ((N + 15) // 16 * CHUNKS * BYTES)
        scale_ptr += expert * N * (K // GROUP)
        zero_ptr = zero_ptr if zero_ptr is None else zero_ptr + expert * N * (K // GROUP)
        rows = 1

    # Weights are loaded as [4 t, 8 g, WARPS, TILES, e and u, 16], digits as [4 t, 8 n, WARPS, 2 e, COLUMNS/8, 16]; n is
    # a column.
    t = tl.arange(0, 4)[:, None, None, None, None, None]
    g = tl.arange(0, 8)[:, None, None, None, None]
    chunk = tl.arange(0, WARPS)[:, None, None, None]
    lane = (g * 4 + t) * 16
    w_ptr += (start // 16).to(tl.int64) * (CHUNKS * BYTES) + chunk * BYTES + lane
    tile = tl.arange(0, TILES)[:, None, None]
    tile = tile // 2 + tile % 2 * (OUT // 16) if SILU else tile
    w_offset = (tile * (CHUNKS * BYTES) + tl.arange(0, BITS // 2)[:, None] * 512 + tl.arange(0, 16))[None, None, None]
    w_exists = (start // 16 + tile) * 16 < N
    digits_ptr += chunk * 1024 + lane
    column = tl.arange(0, COLUMNS // 8)[:, None] * 8 + g
    e = tl.arange(0, 2)[:, None, None]
    x_offset = (e * 512 + tl.arange(0, COLUMNS // 8)[:, None] * (CHUNKS * 1024) + tl.arange(0, 16))[None, None, None]
    # Units and scales are loaded where the products of their columns and rows are, [4 t, 8 g, WARPS, columns/8 or
    # rows/8, 1].
    t = tl.arange(0, 4)[:, None, None, None, None]
    g = tl.arange(0, 8)[:, None, None, None]
    warp = tl.arange(0, WARPS)[:, None, None]
    unit_offset = tl.arange(0, COLUMNS // 8)[:, None] * (CHUNKS * 8) + warp * 8 + (g[None] if HALVES else t * 2)
    row = start + interleave_gates(tl.arange(0, TILES * 2)[:, None] * 8, OUT, SILU) + g
    acc = tl.zeros([WARPS, TILES * 2, 8, COLUMNS // 8, 4], tl.float32)
    w_lanes, scale_lanes = (w_ptr, w_offset, w_exists, chunk), (scale_ptr, row, warp * 128)
    x_lanes, unit_lanes = (digits_ptr, x_offset, column, chunk), (unit_ptr, unit_offset, warp)
    weights, digits = tl.tuple([]), tl.tuple([])
    if ROW:
        channel = start + interleave_gates(tl.arange(0, TILES * 16), OUT, SILU)
        channel = tl.load(scale_ptr + channel, channel < N, 0)
    for i in tl.static_range(STEPS + W_AHEAD):
        if i < STEPS:
            weights = weights + (_load_weights(w_lanes, scale_lanes, i, OUT % BLOCK_N == 0, N, K, GROUP, SCALES, BITS),)
        if i == W_AHEAD - 1:
            launch.wait_for_previous(PDL)
            added = load_for_result(start, rows, bias_ptr, residual_ptr, letters, out_ptr, N, TILES * 16, M, SILU)
            if leave is not None:
                if SILU:
                    unit = tl.load(leave[2] + start // 128)
                else:
                    bound = _load_bound(leave, start, residual_ptr, unit_ptr, BLOCK_N, CHUNKS)
            if squares_ptr is not None:
                SUMS: tl.constexpr = K // 16 if HALVES else CHUNKS
                m = tl.arange(0, M)[:, None]
                b = tl.arange(0, triton.next_power_of_2(SUMS))
                squares = tl.load(squares_ptr + m * SUMS + b, (m < rows) & (b < SUMS), 0)
        # After the wait the digits of X_AHEAD steps are loaded, and those of one more step in each step.
        for j in tl.static_range(
            0 if i < W_AHEAD else i - W_AHEAD + X_AHEAD, 0 if i < W_AHEAD - 1 else i - W_AHEAD + X_AHEAD + 1
        ):
            if j < STEPS:
                digits = digits + (_load_digits(x_lanes, unit_lanes, 2 if HALVES else rows, j, CHUNKS, SCALES),)
        if i >= W_AHEAD:
            launch.keep_loads_here(PDL)
            if launch.always_true(eps, i):
                at = (row, warp * 128 + (i - W_AHEAD) * WARPS * 128)
                w, x = weights[i - W_AHEAD], digits[i - W_AHEAD]
                acc = _add_products(acc, w, x, zero_ptr, at, N, K, GROUP, SCALES, BITS, ASM)
    y = acc.reshape(WARPS, TILES * 16, COLUMNS // 2)
    if HALVES:
        y = tl.sum(y * tl.where(tl.arange(0, COLUMNS // 2) == 0, 65536.0, 1.0), 2)[:, :, None]
    y = _sum_warps(y)
    if squares_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares, 1) / K + eps)[None]
    if BITS == 4:
        y *= 0.0625  # for `_nibbles_times_16`
    if ROW:
        y *= channel.to(tl.float32)[:, None]
    y = store_result(y, added, start, rows, letters, out_ptr, N, SILU)
    if leave is not None:
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
        if not SILU:
            y, unit = _begin_norm(y, bound, start, leave[4])
        store_four_digits(y, start, unit, leave)


@triton.jit
def _load_bound(leave, start, residual_ptr, unit_ptr, RESULTS: tl.constexpr, CHUNKS: tl.constexpr):
    """What `_begin_norm` needs, loaded long before: gains, residuals of the chunk, the units of x, two factors."""
    gain = tl.load(leave[3] + start + tl.arange(0, RESULTS))
    residual = tl.load(residual_ptr + start // 128 * 128 + tl.arange(0, 128))
    i = tl.arange(0, triton.next_power_of_2(CHUNKS))
    factors = leave[2] + start // 128 * 2
    return gain, residual, tl.load(unit_ptr + i * 8, i < CHUNKS, 0), tl.load(factors), tl.load(factors + 1)


@triton.jit
def _begin_norm(y, bound, start, squares_ptr):
    """y [results, columns] times the gains, and the unit of its first column, whose squares are summed and stored."""
    gain, residual, units, per_residual, per_length = bound
    squares = tl.where(tl.arange(0, y.shape[1]) == 0, y * y, 0.0).reshape(y.shape[0] // 16, 16 * y.shape[1])
    tl.store(squares_ptr + start // 16 + tl.arange(0, y.shape[0] // 16), tl.sum(squares, 1))
    length = tl.sum(units) * 367833  # at most sqrt(128) * 32512 units for every 128 numbers
    unit = tl.max(tl.abs(residual.to(tl.float32))) * per_residual + length * per_length
    return y * gain.to(tl.float32)[:, None], tl.maximum(unit, 1e-30)


@triton.jit
def _load(ptr, valid, ALL: tl.constexpr, POLICY: tl.constexpr):
    """What is at ptr, and zeros where it is not valid. ALL: it is valid everywhere."""
    if ALL:
        return tl.load(ptr, eviction_policy=POLICY)
    return tl.load(ptr, valid, 0, eviction_policy=POLICY)


@triton.jit
def _load_weights(
    w_lanes,
    scale_lanes,
    STEP: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    BITS: tl.constexpr,
):
    """Of the STEP-th chunk of every warp: weights [PARTS * WARPS, rows, columns], for int8 those of e = 0 and those of
    e = 1, and the scales, unless a row has one. ALL_ROWS: no tile reaches beyond the matrix.

    One load brings both e, and both digits' below. For Triton's coalescing looks at all operations before and behind
    every load: with two loads and more operations `down` of Llama-2-7B compiled in 5.0 s instead of 2.9.
    """
    w_ptr, offset, exists, chunk = w_lanes
    scale_ptr, row, k = scale_lanes
    WARPS: tl.constexpr = chunk.shape[0]
    CHUNKS: tl.constexpr = (K + 127) // 128
    PARTS: tl.constexpr = 2 if SCALES > 1 else 1  # as in `_add_products`
    ALL: tl.constexpr = ALL_ROWS and (STEP + 1) * WARPS <= CHUNKS
    ptr = launch.deal_to_lanes(w_ptr + STEP * WARPS * (256 * BITS), offset)
    w = _load(ptr, exists & (chunk + STEP * WARPS < CHUNKS), ALL, "evict_first")
    TILES: tl.constexpr = w.shape[3]
    w = w.reshape(4, 8, WARPS, TILES, BITS // 4, 2, 2, 2, 4)  # t, g, warp, tile, e, u, b, h, i
    w = w.permute(2, 3, 7, 1, 5, 6, 0, 8, 4) if PARTS == 1 else w.permute(5, 2, 3, 7, 1, 6, 0, 8, 4)
    if BITS == 8:
        loaded = tl.tuple(tl.split(w.reshape(PARTS * WARPS, TILES * 16, 64 // PARTS, 2)))
    else:
        loaded = tl.tuple([w.reshape(PARTS * WARPS, TILES * 16, 64 // PARTS)])
    if SCALES > 0:
        at = (row, k + STEP * WARPS * 128)
        loaded = loaded + (_load_of_groups(scale_ptr, at, N, K, GROUP, SCALES, ALL),)
    return loaded


@triton.jit
def _load_digits(x_lanes, unit_lanes, rows, STEP: tl.constexpr, CHUNKS: tl.constexpr, SCALES: tl.constexpr):
    """(digits [PARTS * WARPS, rows, columns] of e = 0, of e = 1, their units) for the STEP-th chunk of every warp."""
    digits_ptr, offset, column, chunk = x_lanes
    unit_ptr, unit_offset, warp = unit_lanes
    WARPS: tl.constexpr = chunk.shape[0]
    BLOCKS: tl.constexpr = offset.shape[4]
    PARTS: tl.constexpr = 2 if SCALES > 1 else 1  # as in `_add_products`
    ALL: tl.constexpr = (STEP + 1) * WARPS <= CHUNKS  # warps have a chunk
    ptr = launch.deal_to_lanes(digits_ptr + STEP * WARPS * 1024, offset)
    real = column < 2 * rows
    real = real if ALL else real & (chunk + STEP * WARPS < CHUNKS)
    d = _load(ptr, real, ALL and BLOCKS > 1, "")  # what unused columns hold is not stored
    d = d.reshape(4, 8, WARPS, 2, BLOCKS, 2, 2, 4)  # t, n, warp, e, 8 columns, u, b, i
    d = d.permute(2, 5, 6, 0, 7, 4, 1, 3) if PARTS == 1 else d.permute(5, 2, 6, 0, 7, 4, 1, 3)
    digits = tl.tuple(tl.split(d.reshape(PARTS * WARPS, 64 // PARTS, BLOCKS * 8, 2)))
    ptr = launch.spread_over_lanes(unit_ptr + (unit_offset + STEP * WARPS * 8), [4, 8, WARPS, BLOCKS, 1])
    unit = _load(ptr, warp + STEP * WARPS < CHUNKS, ALL, "")
    return digits + (unit.permute(2, 1, 3, 0, 4).reshape(WARPS, 1, 8, BLOCKS, 4),)


@triton.jit
def _add_products(
    acc,
    weights,
    digits,
    zero_ptr,
    at,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    BITS: tl.constexpr,
    ASM: tl.constexpr,
):
    """acc [WARPS, rows/8, 8, columns/8, 4 pairs of columns] + the products of one chunk of 128 columns in every warp.

    The integer sums run over as many columns as share a scale: over the chunk, over each u, or over each u and e.
    """
    WARPS: tl.constexpr = acc.shape[0]
    TILES: tl.constexpr = acc.shape[1] // 2
    COLUMNS: tl.constexpr = acc.shape[3] * 8
    PARTS: tl.constexpr = 2 if SCALES > 1 else 1  # 2: each u has a scale of its own
    SPLIT: tl.constexpr = 2 if SCALES == 4 else 1  # 2: each e, too
    if zero_ptr is not None:
        zero = _load_of_groups(zero_ptr, at, N, K, GROUP, SCALES, False)
    y = tl.zeros([PARTS * WARPS, TILES * 16, COLUMNS], tl.int32)
    x_sum = tl.zeros([PARTS * WARPS, TILES * 16, COLUMNS], tl.int32)
    for e in tl.static_range(2):
        a = weights[e] if BITS == 8 else _nibbles_times_16(weights[0], e == 1, ASM)
        y = tl.dot(a, digits[e], y, out_dtype=tl.int32)
        if zero_ptr is not None:
            x_sum = tl.dot(tl.full(a.shape, 16 if BITS == 4 else 1, tl.int8), digits[e], x_sum, out_dtype=tl.int32)
        if e == 1 or SPLIT == 2:
            product = _join_digits(y).reshape(PARTS, WARPS, TILES * 2, 8, COLUMNS // 8, 4)
            if zero_ptr is not None:  # sum of (q - zero) x = sum of q x - zero * sum of x
                product -= _join_digits(x_sum).reshape(product.shape) * _beside_products(zero, PARTS, e)
                x_sum = tl.zeros([PARTS * WARPS, TILES * 16, COLUMNS], tl.int32)
            if SCALES > 0:
                product *= _beside_products(weights[BITS // 4], PARTS, e)
            acc += (tl.sum(product, 0) if PARTS > 1 else product.reshape(acc.shape)) * digits[2]
            y = tl.zeros([PARTS * WARPS, TILES * 16, COLUMNS], tl.int32)
    return acc


@triton.jit
def _nibbles_times_16(w, LOW: tl.constexpr, ASM: tl.constexpr):
    """The high or the low int4 of every byte, times 16, as int8: a mask, and for the low ones a shift."""
    if ASM:  # four bytes at a time, where the compiler would take one by one
        SHIFT: tl.constexpr = "shl.b32 u, $1, 4;" if LOW else "mov.b32 u, $1;"
        CODE: tl.constexpr = f"{{ .reg .b32 u; {SHIFT} and.b32 $0, u, 0xf0f0f0f0; }}"
        return tl.inline_asm_elementwise(CODE, "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4)
    if LOW:
        w = w << 4
    return (w & 0xF0).to(tl.int8, bitcast=True)


@triton.jit
def _join_digits(y):
    """Sums [.., columns] of high and low digits in turns -> float32 [.., columns/2] of 256 * high + low, added as
    integers. |q x| <= 2^7 * 2^15 for each of 128 k fits 32 bits. The pair is in one lane.
    """
    high, low = tl.split(y.reshape(y.shape[0], y.shape[1], y.shape[2] // 2, 2))
    return (high * 256 + low).to(tl.float32)


@triton.jit
def _load_of_groups(
    ptr, at, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, ALL: tl.constexpr
):
    """The scales or zero points of rows in the chunk at column k, all SCALES in one load: [4 t (all equal), 8 g, WARPS,
    rows/8, 1, SCALES]. ALL: all rows and chunks exist.
    """
    row, k = at
    ptr = (ptr + (row * (K // GROUP) + k // GROUP))[None, :, :, :, :, None]
    valid = ((row < N) & (k < K))[None, :, :, :, :, None]
    SHAPE: tl.constexpr = [4, ptr.shape[1], ptr.shape[2], ptr.shape[3], 1, SCALES]
    if SCALES > 1:
        g = tl.arange(0, SCALES)[None, None, None, None, None]
        ptr = launch.deal_to_lanes(tl.broadcast_to(ptr, SHAPE), g)
        if K % 128 > 0:
            valid = valid & (k[None, None, :, :, :, None] + g * GROUP < K)
    else:
        ptr = launch.spread_over_lanes(ptr, SHAPE)
    return _load(ptr, valid, ALL and K % 128 == 0, "")


@triton.jit
def _beside_products(x, PARTS: tl.constexpr, E: tl.constexpr):
    """Values of `_load_of_groups`, of one e if each has its own, in the shape of the products, without moving a
    register.
    """
    SPLIT: tl.constexpr = x.shape[5] // PARTS
    x = x.to(tl.float32)
    if SPLIT == 2:
        first, second = tl.split(x.reshape(4, 8, x.shape[2], x.shape[3], PARTS, 2))
        x = second if E == 1 else first
    else:
        x = x.reshape(4, 8, x.shape[2], x.shape[3], PARTS)
    return x.permute(4, 2, 3, 1, 0).reshape(PARTS, x.shape[2], x.shape[3], 8, 1, 4)


@triton.jit
def _sum_warps(y):
    """[WARPS, rows, columns] -> [rows, columns]."""
    for _ in tl.static_range(5):  # up to 32 warps
        if y.shape[0] > 1:
            y, other = launch.halve_warps(y)
            y += other
    return y.reshape(y.shape[1], y.shape[2])


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    silu_mul: bool,
    experts: Tensor | None,
    bits: int,
    letters: Letters = None,
    digits: Digits | None = None,
    leave: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """`linear`; letters as in `dense.run`, digits: those of x if there are any, leave as in the kernel."""
    (rows, k), n = x.shape, scale.shape[-2]
    out = empty_result(x, n, silu_mul)
    x, residual = x.contiguous(), residual if residual is None else residual.contiguous()
    if digits is None:
        separate = experts is not None
        digits = fill_digits_(x, norm_weight, empty_digits(x, rows, k, norm_weight is not None, separate), separate)
    tile = tiles.choose(f"int{bits}", k, n, rows if experts is None else 1, silu_mul)
    steps = triton.cdiv(triton.cdiv(k, 128), tile.warps)
    grid = (triton.cdiv(out.shape[1], tile.rows // 2 if silu_mul else tile.rows), 1 if experts is None else rows)
    sizes = {"N": n, "K": k, "GROUP": k // scale.shape[-1], "BITS": bits, "SILU": silu_mul}
    _quantized_kernel[grid](
        *digits[:3],
        weight,
        scale,
        zero,
        bias,
        residual,
        experts,
        letters,
        leave,
        out,
        rows,
        eps,
        **sizes,
        COLUMNS=digits.columns,
        HALVES=digits.halves,
        TILES=tile.rows // 16,
        WARPS=tile.warps,
        W_AHEAD=min(tile.w_ahead, steps),
        X_AHEAD=min(tile.x_ahead, steps),
        ASM=not INTERPRETED,
        **launch.options(tile.warps),
    )
    return out


Operands = tuple[Tensor, Tensor, Tensor | None]  # weight, scale, zero


@launch.operator("quantized", lambda x, weight, scale, *rest: empty_result(x, scale.shape[-2], silu_mul=rest[-3]))
def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    silu_mul: bool,
    experts: Tensor | None,
    bits: int,
) -> Tensor:
    """x [M, K], M <= 16 -> [M, N], or [M, N/2] with silu_mul: as `dense.linear`, for `pack(q, bits)`, scale [N, G] and
    zero [N, G] or None; K / G is K or a power of 2 from 32 on. With experts (int64 [M]) all three have a leading E.
    """
    return run(x, weight, scale, zero, bias, norm_weight, eps, residual, silu_mul, experts, bits)


# -- the whole matrix ----------------


@triton.jit
def _dequantize_kernel(
    w_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PART: tl.constexpr,
):
    """16 rows of CHUNKS chunks of 128 columns: read in the order of memory, put into that of rows in registers. PART
    values in a row share a scale.
    """
    first = tl.program_id(1) * CHUNKS
    w = floats_of_rows(w_ptr, scale_ptr, zero_ptr, tl.program_id(0), first, N, K, GROUP, BITS, CHUNKS, PART)
    n = tl.program_id(0) * 16 + tl.arange(0, 16)[:, None]
    k = first * 128 + tl.arange(0, CHUNKS * 128)
    tl.store(out_ptr + n.to(tl.int64) * K + k, w.to(out_ptr.dtype.element_ty), (n < N) & (k < K))


@triton.jit
def floats_of_rows(
    w_ptr,
    scale_ptr,
    zero_ptr,
    tile,
    first,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PART: tl.constexpr,
):
    """The 16 rows of one tile in CHUNKS chunks of 128 columns, from chunk `first` on, in float32."""
    ALL: tl.constexpr = (K + 127) // 128
    BYTES: tl.constexpr = BITS * 256
    PARTS: tl.constexpr = CHUNKS * 128 // PART
    i = tl.arange(0, CHUNKS * BYTES)
    w_ptr += (tile.to(tl.int64) * ALL + first) * BYTES
    q = tl.load(w_ptr + i, first * BYTES + i < ALL * BYTES, 0)
    if BITS == 4:  # [chunks, u, g, t, b, h, i, e]
        q = q.to(tl.int8, bitcast=True)
        q = tl.join(q >> 4, q << 4 >> 4).reshape(CHUNKS, 2, 8, 4, 2, 2, 4, 2).permute(5, 2, 0, 1, 7, 3, 4, 6)
    else:  # [chunks, e, u, g, t, b, h, i]
        q = q.reshape(CHUNKS, 2, 2, 8, 4, 2, 2, 4).permute(6, 3, 0, 2, 1, 4, 5, 7)
    n = tile * 16 + tl.arange(0, 16)[:, None]
    w = q.reshape(16, PARTS, PART).to(tl.float32)
    if scale_ptr is not None:
        k = first * 128 + tl.arange(0, PARTS) * PART
        at = n * (K // GROUP) + k // GROUP
        valid = (n < N) & (k < K)
        if zero_ptr is not None:
            w -= tl.load(zero_ptr + at, valid, 0).to(tl.float32)[:, :, None]
        w *= tl.load(scale_ptr + at, valid, 0).to(tl.float32)[:, :, None]
    return w.reshape(16, CHUNKS * 128)


@launch.operator("dequantize", lambda weight, scale, zero, n, k, dtype, bits: weight.new_empty(n, k, dtype=dtype))
def dequantize(
    weight: Tensor, scale: Tensor | None, zero: Tensor | None, n: int, k: int, dtype: torch.dtype, bits: int
) -> Tensor:
    """The matrix [N, K] in `dtype` for `pack(q, bits)`, scale [N, G] and zero [N, G] or None; scale None: its integers.
    For prefill, whose product with many rows takes far longer than this pass over the weights.
    """
    out, per_program = torch.empty(n, k, dtype=dtype, device=weight.device), 4
    group = k if scale is None else k // scale.shape[-1]
    _dequantize_kernel[weight.shape[0], triton.cdiv(weight.shape[1], per_program)](
        weight, scale, zero, out, N=n, K=k, GROUP=group, BITS=bits, CHUNKS=per_program, PART=math.gcd(group, 128)
    )
    return out

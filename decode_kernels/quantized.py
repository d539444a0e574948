"""int8 and int4 weights, packed as `linear.pack_int8` and `linear.pack_int4` do, times 1 to 16 rows of activations.

Knows the digits of activations, the product of integers on the tensor cores, and how a packed matrix becomes a plain
one again. Refuses to know layers and files. Letters of axes are those of `linear._blocks`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from decode_kernels import INTERPRETED, group_size, out_features
from decode_kernels.dense import interleave_gates as _row
from decode_kernels.dense import load_bias_and_residual as _added
from decode_kernels.dense import store_result as _finish
from decode_kernels.launch import deal_to_lanes, halve_warps, launch_options, operator
from decode_kernels.tiles import quantized_tile


@triton.jit
def _digits_kernel(
    x_ptr: tl.tensor, norm_ptr: tl.tensor, digits_ptr: tl.tensor, step_ptr: tl.tensor, squares_ptr: tl.tensor,
    K: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """128 activations of a row (times the norm's weight, if there is a norm) as pairs of int8 with one step: each
    is step * (256 high + low), rounded to a part in 65,024 of the largest, a tenth of bf16's own rounding at most.
    The norm's factor comes later, on the results: here only sums of squares, one a program.

    They are columns COLUMNS m and COLUMNS m + 1 of `digits` [columns/8, K/128, 2 e, 8 n, 4 t, 2 u, 8] (letters as
    in `_blocks`). `step` is [columns/8, K/128, 8]: every second one, so that no lane has to load its neighbour's.
    """
    ALL: tl.constexpr = (K + 127) // 128
    row = tl.program_id(0)
    group = tl.program_id(1)
    r = tl.arange(0, 16)[:, None]  # eights of a group: u, e, t of `_blocks`
    j = tl.arange(0, 8)
    k = group * 128 + r * 8 + j
    if PDL:
        gdc_launch_dependents()
    if norm_ptr is not None:
        gain = tl.load(norm_ptr + k, k < K, 0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * K + k, k < K, 0).to(tl.float32)
    if norm_ptr is not None:
        tl.store(squares_ptr + row * ALL + group, tl.sum(x * x))
        x *= gain
    step = tl.maximum(tl.max(tl.abs(x)), 1e-30) / 32512
    step += 0 * tl.sum(x)  # what is not finite shall not become so
    x = x * (1 / step)
    x = (x + tl.where(x < 0, -0.5, 0.5)).to(tl.int32)
    high = (x + 128) >> 8
    column = row * COLUMNS
    block = column // 8 * ALL + group
    at = digits_ptr + block * 1024 + column % 8 * 64 + r // 4 % 2 * 512 + r % 4 * 16 + r // 8 * 8 + j
    tl.store(at, high.to(tl.int8))
    tl.store(at + 64, (x - (high << 8)).to(tl.int8))
    tl.store(step_ptr + block * 8 + column % 8, step)


@triton.jit
def _nibble(w: tl.tensor, LOW: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """The high or the low int4 of every byte, times 16, as int8."""
    if ASM:  # four at a time; the compiler would take them one by one
        SHIFT: tl.constexpr = "shl.b32 u, $1, 4;" if LOW else "mov.b32 u, $1;"
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 u; {SHIFT} and.b32 $0, u, 0xf0f0f0f0; }}",
            "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    if LOW:
        w = w << 4
    return (w & 0xF0).to(tl.int8, bitcast=True)


@triton.jit
def _quantized_kernel(
    digits_ptr: tl.tensor, step_ptr: tl.tensor, squares_ptr: tl.tensor, w_ptr: tl.tensor, scale_ptr: tl.tensor,
    zero_ptr: tl.tensor, bias_ptr: tl.tensor, residual_ptr: tl.tensor, experts_ptr: tl.tensor, out_ptr: tl.tensor,
    rows: tl.tensor, eps: tl.tensor, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    SILU: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    NEAR: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
) -> None:  # fmt: skip
    """TILES * 16 rows of the matrix times COLUMNS / 2 rows of activations: every warp takes each WARPS-th chunk of
    128 k, asks for its weights AHEAD steps before it multiplies them and for its digits NEAR steps before.
    """
    ALL: tl.constexpr = (K + 127) // 128
    STEPS: tl.constexpr = (ALL + WARPS - 1) // WARPS
    PARTS: tl.constexpr = 2 if BITS == 4 and GROUP < 128 else 1  # u: of a chunk, with scales of their own
    SPLIT: tl.constexpr = 2 if BITS == 4 and GROUP < 64 else 1  # e: likewise
    BYTES: tl.constexpr = 256 * BITS  # of 16 rows of a chunk
    OUT: tl.constexpr = N // 2 if SILU else N
    BLOCK: tl.constexpr = TILES * (8 if SILU else 16)
    FULL: tl.constexpr = STEPS - (ALL % WARPS != 0)  # steps that have a chunk for every warp
    LOADS: tl.constexpr = BITS // 4  # a lane's 16 bytes are 8 k of two rows in int8, 16 k in int4
    start = tl.program_id(0) * BLOCK
    m = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    if experts_ptr is not None:  # a row has a matrix and columns of its own
        if PDL:
            gdc_wait()
        expert = tl.load(experts_ptr + m)
        digits_ptr += m * (ALL * 1024)
        step_ptr += m * (ALL * 8)
        squares_ptr = squares_ptr if squares_ptr is None else squares_ptr + m * ALL
        out_ptr += m * OUT
        residual_ptr = residual_ptr if residual_ptr is None else residual_ptr + m * OUT
        w_ptr += expert * ((N + 15) // 16 * ALL * BYTES)
        scale_ptr += expert * N * (K // GROUP)
        zero_ptr = zero_ptr if zero_ptr is None else zero_ptr + expert * N * (K // GROUP)
        rows = 1
    # weights [4 t, 8 g, WARPS, TILES, 2 u, 16] and digits [4 t, 8 n, WARPS, COLUMNS/8, 16]: what a lane loads is
    # what it needs; lanes, then warps, are dealt to the axes in order, the others are offsets of one address
    t = tl.arange(0, 4)[:, None, None, None, None, None]
    g = tl.arange(0, 8)[:, None, None, None, None]
    chunk = tl.arange(0, WARPS)[:, None, None, None]
    lane = (g * 4 + t) * 16
    w_ptr += (start // 16).to(tl.int64) * (ALL * BYTES) + chunk * BYTES + lane
    tile = tl.arange(0, TILES)[:, None, None]
    tile = tile // 2 + tile % 2 * (OUT // 16) if SILU else tile
    inner = (tile * (ALL * BYTES) + tl.arange(0, 2)[:, None] * 512 + tl.arange(0, 16))[None, None, None]
    there = (start // 16 + tile) * 16 < N
    digits_ptr += chunk * 1024 + lane
    column = tl.arange(0, COLUMNS // 8)[:, None] * 8 + g
    block = (tl.arange(0, COLUMNS // 8)[:, None] * (ALL * 1024) + tl.arange(0, 16))[None, None, None]
    # factors of the products in the places of these: [4 t, 8 g, WARPS, columns/8 or rows/8, 1 or PARTS]
    t = tl.arange(0, 4)[:, None, None, None, None]
    g = tl.arange(0, 8)[:, None, None, None]
    w = tl.arange(0, WARPS)[:, None, None]
    factor = tl.arange(0, COLUMNS // 8)[:, None] * (ALL * 8) + w * 8 + t * 2
    row = tl.arange(0, TILES * 2)[:, None] * 8
    row = start + _row(row, OUT, SILU) + g
    part = w * 128 + tl.arange(0, PARTS) * 64
    acc = tl.zeros([WARPS, TILES * 2, 8, COLUMNS // 8, 4], tl.float32)
    weights, scales, digits, steps = tl.tuple([]), tl.tuple([]), tl.tuple([]), tl.tuple([])
    if BITS == 8:
        channel = start + _row(tl.arange(0, TILES * 16), OUT, SILU)
        channel = tl.load(scale_ptr + channel, channel < N, 0)
    for i in tl.static_range(STEPS + AHEAD):
        for e in tl.static_range(LOADS if i < STEPS else 0):
            at = deal_to_lanes(w_ptr + (i * WARPS * BYTES + e * 1024), inner)
            if i < FULL and OUT % BLOCK == 0:
                weights = weights + (tl.load(at, eviction_policy="evict_first"),)
            else:
                here = there & (chunk + i * WARPS < ALL)
                weights = weights + (tl.load(at, here, 0, eviction_policy="evict_first"),)
        for e in tl.static_range(SPLIT if BITS == 4 and i < STEPS else 0):
            scales = scales + (_of_group(scale_ptr, row, part + i * WARPS * 128 + e * 32, N, K, GROUP),)
        if i == AHEAD - 1:
            if PDL:
                gdc_wait()
            bias, residual = _added(start, rows, bias_ptr, residual_ptr, out_ptr, N, TILES * 16, COLUMNS // 2, SILU)
            if squares_ptr is not None:
                m = tl.arange(0, COLUMNS // 2)[:, None]
                b = tl.arange(0, triton.next_power_of_2(ALL))
                squares = tl.load(squares_ptr + m * ALL + b, (m < rows) & (b < ALL), 0)
        # at first the digits of NEAR steps, then those of one step more each time
        for j in tl.static_range(0 if i < AHEAD else i - AHEAD + NEAR, 0 if i < AHEAD - 1 else i - AHEAD + 1 + NEAR):
            if j < STEPS:
                for e in tl.static_range(2):
                    at = deal_to_lanes(digits_ptr + (j * WARPS * 1024 + e * 512), block)
                    if COLUMNS > 8 and j < FULL:  # the columns of no row may hold anything
                        digits = digits + (tl.load(at),)
                    else:
                        known = (column < 2 * rows) & (chunk + j * WARPS < ALL)
                        digits = digits + (tl.load(at, known, 0),)
                at = tl.broadcast_to(step_ptr + (factor + j * WARPS * 8), [4, 8, WARPS, COLUMNS // 8, 1])
                at = tl.max_contiguous(at, [64, 32, 16, 1, 128])
                steps = steps + (tl.load(at, w + j * WARPS < ALL, 0),)
        if PDL and i >= AHEAD:  # returns at once, but keeps the compiler from moving the loads down to their uses
            gdc_wait()
        if i >= AHEAD:  # noqa: SIM102
            if eps != -1 - i:  # always: but the compiler moves no product up across a branch, in front of a load
                step = steps[i - AHEAD].permute(2, 1, 3, 0, 4).reshape(1, WARPS, 1, 8, COLUMNS // 8, 4)
                y = tl.zeros([PARTS * WARPS, TILES * 16, COLUMNS], tl.int32)
                total = tl.zeros([PARTS * WARPS, TILES * 16, COLUMNS], tl.int32)
                for e in tl.static_range(2):
                    a = weights[2 * (i - AHEAD) + e] if BITS == 8 else _nibble(weights[i - AHEAD], e == 1, ASM)
                    a = a.reshape(4, 8, WARPS, TILES, 2, 2, 2, 4)  # t, g, warp, tile, u, b, h, i
                    d = digits[2 * (i - AHEAD) + e]
                    d = d.reshape(4, 8, WARPS, COLUMNS // 8, 2, 2, 4)  # t, n, warp, 8 columns, u, b, i
                    if PARTS == 1:
                        a, d = a.permute(2, 3, 6, 1, 4, 5, 0, 7), d.permute(2, 4, 5, 0, 6, 3, 1)
                    else:
                        a, d = a.permute(4, 2, 3, 6, 1, 5, 0, 7), d.permute(4, 2, 5, 0, 6, 3, 1)
                    a = a.reshape(PARTS * WARPS, TILES * 16, 64 // PARTS)
                    d = d.reshape(PARTS * WARPS, 64 // PARTS, COLUMNS)
                    y = tl.dot(a, d, y, out_dtype=tl.int32)
                    if zero_ptr is not None:
                        total = tl.dot(tl.full(a.shape, 16, tl.int8), d, total, out_dtype=tl.int32)
                    if e == 1 or SPLIT == 2:
                        product = _whole(y).reshape(PARTS, WARPS, TILES * 2, 8, COLUMNS // 8, 4)
                        if zero_ptr is not None:  # (q - zero) x = q x - zero x
                            k = part + (i - AHEAD) * WARPS * 128 + e * 32
                            zero = _of_group(zero_ptr, row, k, N, K, GROUP)
                            product -= _whole(total).reshape(product.shape) * _factor(zero)
                            total = tl.zeros([PARTS * WARPS, TILES * 16, COLUMNS], tl.int32)
                        if BITS == 4:
                            product *= _factor(scales[(i - AHEAD) * SPLIT + e * (SPLIT - 1)])
                        acc += tl.sum(product * step, 0)
                        y = tl.zeros([PARTS * WARPS, TILES * 16, COLUMNS], tl.int32)
    y = acc.reshape(WARPS, TILES * 16, COLUMNS // 2)
    # the sums of all warps into one: tl.sum would meet itself in shared memory's banks
    for _ in tl.static_range(5):
        if y.shape[0] > 1:
            y, other = halve_warps(y)
            y += other
    y = y.reshape(TILES * 16, COLUMNS // 2)
    if squares_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares, 1) / K + eps)[None]
    if BITS == 4:
        y *= 0.0625  # `_nibble`
    else:
        y *= channel.to(tl.float32)[:, None]
    _finish(y, bias, residual, start, rows, out_ptr, N, SILU)


@triton.jit
def _of_group(ptr: tl.tensor, row: tl.tensor, k: tl.tensor, N: tl.constexpr, K: tl.constexpr,
              GROUP: tl.constexpr) -> tl.tensor:  # fmt: skip
    """The scales or zeros of rows at k."""
    at = (ptr + (row * (K // GROUP) + k // GROUP))[None, :, :, :, :, None]
    at = tl.broadcast_to(at, [4, at.shape[1], at.shape[2], at.shape[3], at.shape[4], 1])
    here = ((row < N) & (k < K))[None, :, :, :, :, None]
    return tl.load(tl.max_contiguous(at, [64, 32, 16, 8, 1, 128]), here, 0)


@triton.jit
def _whole(y: tl.tensor) -> tl.tensor:
    """Sums of both digits as one: |q x| <= 2^7 2^7 2^8 for each of 128 k fits 32 bits. The pair is in one lane."""
    y = y.reshape(y.shape[0], y.shape[1], y.shape[2] // 2, 2) * tl.where(tl.arange(0, 2) == 0, 256, 1)
    return tl.sum(y, 3).to(tl.float32)


@triton.jit
def _factor(x: tl.tensor) -> tl.tensor:
    """x [4 t (all equal), 8 g, WARPS, rows/8, PARTS, 1] in the place of products, no register moved."""
    x = x.to(tl.float32).permute(4, 2, 3, 1, 0, 5)
    return x.reshape(x.shape[0], x.shape[1], x.shape[2], 8, 1, 4)


@triton.jit
def _dequantize_kernel(
    w_ptr: tl.tensor, scale_ptr: tl.tensor, zero_ptr: tl.tensor, out_ptr: tl.tensor, N: tl.constexpr,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr, PART: tl.constexpr,
) -> None:  # fmt: skip
    """16 rows of CHUNKS chunks of 128 k: read in the order of `_blocks`, put into that of rows in registers. PART
    values in a row share a scale.
    """
    ALL: tl.constexpr = (K + 127) // 128
    BYTES: tl.constexpr = BITS * 256
    PARTS: tl.constexpr = CHUNKS * 128 // PART
    first = tl.program_id(1) * CHUNKS
    i = tl.arange(0, CHUNKS * BYTES)
    w_ptr += (tl.program_id(0).to(tl.int64) * ALL + first) * BYTES
    q = tl.load(w_ptr + i, first * BYTES + i < ALL * BYTES, 0)
    if BITS == 4:  # [chunks, u, g, t, b, h, i, e]
        q = q.to(tl.int8, bitcast=True)
        q = tl.join(q >> 4, q << 4 >> 4).reshape(CHUNKS, 2, 8, 4, 2, 2, 4, 2).permute(5, 2, 0, 1, 7, 3, 4, 6)
    else:  # [chunks, e, u, g, t, b, h, i]
        q = q.reshape(CHUNKS, 2, 2, 8, 4, 2, 2, 4).permute(6, 3, 0, 2, 1, 4, 5, 7)
    n = tl.program_id(0) * 16 + tl.arange(0, 16)[:, None]
    w = q.reshape(16, PARTS, PART).to(tl.float32)
    if scale_ptr is not None:
        k = first * 128 + tl.arange(0, PARTS) * PART
        at = n * (K // GROUP) + k // GROUP
        valid = (n < N) & (k < K)
        if zero_ptr is not None:
            w -= tl.load(zero_ptr + at, valid, 0).to(tl.float32)[:, :, None]
        w *= tl.load(scale_ptr + at, valid, 0).to(tl.float32)[:, :, None]
    k = first * 128 + tl.arange(0, CHUNKS * 128)
    w = w.to(out_ptr.dtype.element_ty).reshape(16, CHUNKS * 128)
    tl.store(out_ptr + n.to(tl.int64) * K + k, w, (n < N) & (k < K))


def _dequantize(
    weight: Tensor, scale: Tensor | None, zero: Tensor | None, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(n, k, dtype=dtype, device=weight.device)
    group = group_size(weight, scale, k)
    bits, chunks = 8 if weight.dtype == torch.int8 else 4, 4
    _dequantize_kernel[weight.shape[0], triton.cdiv(weight.shape[1], chunks)](
        weight, scale, zero, out, n, k, group, bits, chunks, math.gcd(group, 128)
    )
    return out


def _dequantize_shape(
    weight: Tensor, scale: Tensor | None, zero: Tensor | None, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    return weight.new_empty(n, k, dtype=dtype)


dequantize = operator("dequantize", _dequantize, _dequantize_shape)


def _linear(
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
) -> Tensor:
    rows, k = x.shape
    x, residual = x.contiguous(), residual if residual is None else residual.contiguous()
    n = out_features(weight, scale)
    n_out = n // 2 if silu_mul else n
    out = torch.empty(rows, n_out, dtype=x.dtype, device=x.device)
    chunks, spacing = triton.cdiv(k, 128), 2 if experts is None else 8
    blocks = triton.cdiv(rows * spacing, 8)
    columns = 8 if experts is not None else max(8, triton.next_power_of_2(rows * 2))
    digits = torch.empty(max(blocks, columns // 8), chunks * 1024, dtype=torch.int8, device=x.device)
    step = torch.empty(digits.shape[0], chunks, 8, dtype=torch.float32, device=x.device)
    squares = None
    if norm_weight is not None:
        squares = torch.empty(rows, chunks, dtype=torch.float32, device=x.device)
    _digits_kernel[(rows, chunks)](x, norm_weight, digits, step, squares, k, spacing, **launch_options(1))
    bits = 8 if weight.dtype == torch.int8 else 4
    tiles, warps, ahead, near = quantized_tile(bits, k, n, rows if experts is None else 1, silu_mul)
    most = triton.cdiv(chunks, warps)
    grid = (triton.cdiv(n_out, tiles * (8 if silu_mul else 16)), 1 if experts is None else rows)
    _quantized_kernel[grid](
        digits, step, squares, weight, scale, zero, bias, residual, experts, out, rows, eps, n, k,
        group_size(weight, scale, k), bits, silu_mul, columns, tiles, warps, min(ahead, most), min(near, most),
        ASM=not INTERPRETED, **launch_options(warps),
    )  # fmt: skip
    return out


def _linear_shape(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, norm_weight: Tensor | None,
    eps: float, residual: Tensor | None, silu_mul: bool, experts: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], out_features(weight, scale) // (2 if silu_mul else 1))


linear = operator("quantized_linear", _linear, _linear_shape)

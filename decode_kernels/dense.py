"""16-bit weights times 1 to 16 rows of activations.

Knows how a matrix of bf16 or fp16 is streamed once, and what is fused around that. Refuses to know layers and files.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from decode_kernels import INTERPRETED, tiles
from decode_kernels.launch import _at, _dot, _launch, _shared_memory, operator


@triton.jit
def _row_kernel(
    x_ptr: tl.tensor, w_ptr: tl.tensor, bias_ptr: tl.tensor, norm_ptr: tl.tensor, residual_ptr: tl.tensor,
    experts_ptr: tl.tensor, out_ptr: tl.tensor, rows: tl.tensor, eps: tl.tensor, N: tl.constexpr, K: tl.constexpr,
    SILU: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr, EACH: tl.constexpr,
    AHEAD: tl.constexpr, NEAR: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK results of M (1 or 4) rows of activations: every warp takes each WARPS-th chunk of EACH k, asks for
    its weights AHEAD steps before it multiplies them and for its activations NEAR steps before.

    The eight columns of m16n8k16 are M rows of activations cut into PIECES = 8 / M, the sixteen rows 2 M rows of
    the matrix, cut likewise. What a lane loads, 512 / M bytes of a row with its neighbours, is its operand, and of
    the sums those of a row's piece with another piece of the activations are thrown away. (M = 2 would be summed
    over lanes that are no neighbours, 1, 4 and 8 apart, which Triton 3.6 does wrongly, over 1, 2 and 4.)
    """
    OUT: tl.constexpr = N // 2 if SILU else N
    PIECES: tl.constexpr = 8 // M
    SUB: tl.constexpr = EACH // (PIECES * 32)
    PAIRS: tl.constexpr = BLOCK // M if SILU else BLOCK // (2 * M)  # of M rows, with SILU gates and ups
    SPAN: tl.constexpr = WARPS * EACH
    STEPS: tl.constexpr = (K + SPAN - 1) // SPAN
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if PDL:
        gdc_launch_dependents()
    first = tl.program_id(1)
    if experts_ptr is not None:
        if PDL:
            gdc_wait()
        w_ptr += tl.load(experts_ptr + first) * N * K
        rows = 1
    start = tl.program_id(0) * BLOCK
    w_ptr += start.to(tl.int64) * K
    x_ptr += first * K
    # activations [4 t, PIECES, M, WARPS, SUB, 8], weights [.., WARPS, PAIRS, 2, SUB, 8]: lanes, then warps, are
    # dealt to the axes in order
    k = tl.arange(0, PIECES)[:, None, None, None, None] * 4 + tl.arange(0, 4)[:, None, None, None, None, None]
    k = k * 8 + tl.arange(0, 8) + tl.arange(0, SUB)[:, None] * (PIECES * 32)
    k += tl.arange(0, WARPS)[:, None, None] * EACH
    m = tl.arange(0, M)[:, None, None, None]
    w_k = k[:, :, :, :, None, None]
    half = tl.arange(0, 2)[:, None, None]
    row = tl.arange(0, PAIRS)[:, None, None, None] * (M if SILU else 2 * M) + m[:, :, :, :, None, None]
    row = row if SILU else row + half * M
    there = start + row < OUT
    row = row + half * OUT if SILU else row
    n = start + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, M)
    here = (n < OUT) & (column < rows)
    at = (first + column) * OUT + n
    residual = tl.zeros([BLOCK, M], dtype)
    acc = tl.zeros([WARPS, PAIRS * 16, 8], tl.float32)
    squares = tl.zeros([4, PIECES, M, WARPS], tl.float32)
    weights, gains, xs = tl.tuple([]), tl.tuple([]), tl.tuple([])
    for i in tl.static_range(STEPS + AHEAD):
        if i < STEPS:
            ptr = tl.max_contiguous(w_ptr + i * SPAN + (row * K + w_k), [64, 32, 16, 8, 1, 1, 1, 128])
            if (i + 1) * SPAN <= K and OUT % BLOCK == 0:
                weights = weights + (tl.load(ptr, eviction_policy="evict_first"),)
            else:
                valid = there & (i * SPAN + w_k < K)
                weights = weights + (tl.load(ptr, valid, 0, eviction_policy="evict_first"),)
            if norm_ptr is not None:
                ptr = _at(norm_ptr + i * SPAN, tl.broadcast_to(k, [4, PIECES, M, WARPS, SUB, 8]))
                gains = gains + (tl.load(ptr, i * SPAN + k < K, 0),)
        if i == AHEAD - 1:
            if PDL:
                gdc_wait()
            if residual_ptr is not None:
                residual = tl.load(residual_ptr + at, here, 0)
        # at first the activations of NEAR steps, then those of one step more each time
        for j in tl.static_range(0 if i < AHEAD else i - AHEAD + NEAR, 0 if i < AHEAD - 1 else i - AHEAD + 1 + NEAR):
            if j < STEPS:
                xs = xs + (tl.load(_at(x_ptr + j * SPAN, m * K + k), (m < rows) & (j * SPAN + k < K), 0),)
        if PDL and i >= AHEAD:  # returns at once, but keeps the compiler from moving the loads down to their uses
            gdc_wait()
        if i >= AHEAD:  # noqa: SIM102
            if eps != -1 - i:  # always: but the compiler moves no product up across a branch, in front of a load
                x = xs[i - AHEAD]
                if norm_ptr is not None:
                    x = x.to(tl.float32)
                    squares += tl.sum(tl.sum(x * x, 5), 4)
                    x = (x * gains[i - AHEAD].to(tl.float32)).to(dtype)
                w = weights[i - AHEAD].reshape(4, PIECES, M, WARPS, PAIRS, 2, SUB, 2, 2, 2)
                w = w.permute(3, 4, 5, 2, 1, 6, 7, 8, 0, 9).reshape(WARPS, PAIRS * 16, SUB * 32)
                x = x.reshape(4, PIECES, M, WARPS, SUB, 2, 2, 2).permute(3, 4, 5, 6, 0, 7, 2, 1)
                acc = _dot(w, x.reshape(WARPS, SUB * 32, 8), acc, ASM)
    y = acc.reshape(WARPS, PAIRS * 2 * M, PIECES, M, PIECES)
    y = tl.where(tl.arange(0, PIECES)[:, None, None] == tl.arange(0, PIECES), y, 0.0)
    y = tl.sum(y.permute(1, 3, 0, 2, 4).reshape(PAIRS * 2 * M, M, WARPS * PIECES * PIECES), 2)
    if norm_ptr is not None:
        squares = tl.sum(squares.permute(2, 0, 1, 3).reshape(M, 4 * PIECES * WARPS), 1)
        y *= tl.rsqrt(squares / K + eps)
    other = y
    if SILU:
        y, other = tl.split(y.reshape(PAIRS, 2, M, M).permute(0, 2, 3, 1))
        y, other = y.reshape(BLOCK, M), other.reshape(BLOCK, M)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, n < OUT, 0).to(tl.float32)
    if SILU:
        if bias_ptr is not None:
            other += tl.load(bias_ptr + OUT + n, n < OUT, 0).to(tl.float32)
        y = y / (1 + tl.exp(-y)) * other
    y += residual.to(tl.float32)
    tl.store(out_ptr + at, y.to(dtype), here)


@triton.jit
def _norm_kernel(
    x_ptr: tl.tensor, norm_ptr: tl.tensor, out_ptr: tl.tensor, eps: tl.tensor, K: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """RMSNorm of one row."""
    k = tl.arange(0, WIDTH)
    if PDL:
        gdc_launch_dependents()
    gain = tl.load(norm_ptr + k, k < K, 0).to(tl.float32)
    if PDL:
        gdc_wait()
    at = tl.program_id(0) * K + k
    x = tl.load(x_ptr + at, k < K, 0).to(tl.float32)
    x *= gain * tl.rsqrt(tl.sum(x * x) / K + eps)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), k < K)


@triton.jit
def _rows_kernel(
    x_ptr: tl.tensor, w_ptr: tl.tensor, bias_ptr: tl.tensor, residual_ptr: tl.tensor, out_ptr: tl.tensor,
    rows: tl.tensor, N: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
    SPAN: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
) -> None:  # fmt: skip
    """Several rows: BLOCK rows of the matrix are the wide operand of the tensor cores, the activations the narrow
    one; the weights of EARLY steps are asked for before the wait, then the loads of STAGES steps are on their way
    through shared memory.
    """
    OUT: tl.constexpr = N // 2 if SILU else N
    start = tl.program_id(0) * (BLOCK // 2 if SILU else BLOCK)
    row = _row(tl.arange(0, BLOCK), OUT, SILU)[:, None]
    m = tl.arange(0, M)[:, None]
    k = tl.arange(0, SPAN)
    w_ptr += start.to(tl.int64) * K  # what differs between lanes is 32 bits wide: half of the loop was addresses
    if PDL:
        gdc_launch_dependents()
    weights, xs = tl.tuple([]), tl.tuple([])
    for i in tl.static_range(EARLY):
        weights = weights + (tl.load(w_ptr + i * SPAN + (row * K + k), (start + row < N) & (i * SPAN + k < K), 0),)
    if PDL:
        gdc_wait()
    for i in tl.static_range(EARLY):
        xs = xs + (tl.load(x_ptr + i * SPAN + (m * K + k), (m < rows) & (i * SPAN + k < K), 0),)
    bias, residual = _added(start, rows, bias_ptr, residual_ptr, out_ptr, N, BLOCK, M, SILU)
    acc = tl.zeros([BLOCK, M], tl.float32)
    for first in tl.range(EARLY * SPAN, K, SPAN, num_stages=STAGES):
        if K % SPAN == 0 and N % BLOCK == 0:
            w = tl.load(w_ptr + first + (row * K + k))
        else:
            w = tl.load(w_ptr + first + (row * K + k), (start + row < N) & (first + k < K), 0)
        x = tl.load(x_ptr + first + (m * K + k), (m < rows) & (first + k < K), 0)
        acc = _dot(w, x.T, acc, ASM)
    for i in tl.static_range(EARLY):
        acc = _dot(weights[i], xs[i].T, acc, ASM)
    _finish(acc, bias, residual, start, rows, out_ptr, N, SILU)


@triton.jit
def _row(i: tl.tensor, OUT: tl.constexpr, SILU: tl.constexpr) -> tl.tensor:
    """Which row of the matrix comes i-th: with SILU 16 gates, their 16 ups, and so on."""
    return i // 32 * 16 + i // 16 % 2 * OUT + i % 16 if SILU else i


@triton.jit
def _added(
    start: tl.tensor, rows: tl.tensor, bias_ptr: tl.tensor, residual_ptr: tl.tensor, out_ptr: tl.tensor,
    N: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, SILU: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """(bias [BLOCK], residual [results, M]), or zeros: asked for long before `_finish` needs them."""
    OUT: tl.constexpr = N // 2 if SILU else N
    RESULTS: tl.constexpr = BLOCK // 2 if SILU else BLOCK
    bias = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    residual = tl.zeros([RESULTS, M], out_ptr.dtype.element_ty)
    if bias_ptr is not None:
        n = start + _row(tl.arange(0, BLOCK), OUT, SILU)
        bias = tl.load(bias_ptr + n, n < N, 0)
    if residual_ptr is not None:
        n = start + tl.arange(0, RESULTS)[:, None]
        m = tl.arange(0, M)
        residual = tl.load(residual_ptr + m * OUT + n, (n < OUT) & (m < rows), 0)
    return bias, residual


@triton.jit
def _finish(
    y: tl.tensor, bias: tl.tensor, residual: tl.tensor, start: tl.tensor, rows: tl.tensor, out_ptr: tl.tensor,
    N: tl.constexpr, SILU: tl.constexpr,
) -> None:  # fmt: skip
    """Bias, silu(gate) * up, residual and store of y [rows of the matrix in the order of `_row`, tokens]."""
    BLOCK: tl.constexpr = y.shape[0]
    M: tl.constexpr = y.shape[1]
    OUT: tl.constexpr = N // 2 if SILU else N
    RESULTS: tl.constexpr = BLOCK // 2 if SILU else BLOCK
    y += bias.to(tl.float32)[:, None]
    if SILU:
        gate, up = tl.split(y.reshape(BLOCK // 32, 2, 16, M).permute(0, 2, 3, 1))
        y = (gate / (1 + tl.exp(-gate)) * up).reshape(RESULTS, M)
    y += residual.to(tl.float32)
    n = start + tl.arange(0, RESULTS)[:, None]
    m = tl.arange(0, M)
    tl.store(out_ptr + m * OUT + n, y.to(out_ptr.dtype.element_ty), (n < OUT) & (m < rows))


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    silu_mul: bool,
    experts: Tensor | None,
) -> Tensor:
    rows, k = x.shape
    x, residual = x.contiguous(), residual if residual is None else residual.contiguous()
    n = weight.shape[-2]
    n_out = n // 2 if silu_mul else n
    out = torch.empty(rows, n_out, dtype=x.dtype, device=x.device)
    together = rows if experts is None else 1
    if norm_weight is not None and (together > 1 or x.dtype == torch.float16):  # gain * x may not fit float16
        width, normed = triton.next_power_of_2(k), torch.empty_like(x)
        _norm_kernel[(rows,)](x, norm_weight, normed, eps, k, width, **_launch(8))
        x, norm_weight = normed, None
    if together <= 4:
        block, warps, each, ahead, near = tiles.row_tile(k, n, together, silu_mul)
        most = triton.cdiv(k, warps * each)
        _row_kernel[(triton.cdiv(n_out, block), rows // together)](
            x, weight, bias, norm_weight, residual, experts, out, rows, eps, n, k, silu_mul,
            1 if together == 1 else 4, block, warps, each, min(ahead, most), min(near, most),
            ASM=not INTERPRETED, **_launch(warps),
        )  # fmt: skip
        return out
    shared = 0 if INTERPRETED else _shared_memory()
    block, span, warps, stages, early = tiles.rows_tile(k, n, rows, silu_mul, shared)
    _rows_kernel[(triton.cdiv(n_out, block // 2 if silu_mul else block),)](
        x, weight, bias, residual, out, rows, n, k, silu_mul, 8 if rows <= 8 else 16, block, span, stages, early,
        ASM=not INTERPRETED, **_launch(warps, stages),
    )  # fmt: skip
    return out


def _linear_shape(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, eps: float, residual: Tensor | None,
    silu_mul: bool, experts: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], weight.shape[-2] // (2 if silu_mul else 1))


linear = operator("dense_linear", _linear, _linear_shape)

"""16-bit weights times 1 to 32 rows of activations, with what stands before and after the product fused into it.

Knows how a matrix of bf16 or fp16 is streamed once. Refuses to know layers and files.

    y = x' W^T + bias,    x' = x / rms(x) * gain  (RMSNorm, optional)
    y = silu(y[:, :N/2]) * y[:, N/2:]  (SwiGLU, optional: rows of W [0, N/2) are gates, the others ups)
    y = y + residual

x is [M, K], W is [N, K], and every sum is in float32. One row of activations reads all of W and multiplies every weight
once, so the time is that of reading W, if nothing else takes longer. Two kernels do this, for different M.

**One to four rows: `_gemv_kernel`.** The tensor cores' instruction m16n8k16 multiplies a 16 x 16 block of its first
operand by a 16 x 8 block of its second, and adds to 16 x 8 sums. One row of activations would fill one of the eight
columns, and a lane would load 4 bytes here and there. Instead both operands are cut into pieces: of the sixteen rows of
the first operand, eight are the eight pieces of one row of W and eight those of another, and the eight columns of the
second operand are the eight pieces of x. A lane then loads 16 bytes in a row, its neighbours the next 16, and what they
load is the operand as it is. Every piece of W meets every piece of x, the sums of equal pieces are added, and the
others are thrown away. Seven of eight products are wasted; they are free, while the conversions and additions of
ordinary multiply-adds took longer than reading (a step of Llama-2-7B: 3.138 ms instead of 3.243 on an H200, with 100 W
less).

Worked example. K = 16, so a piece has two elements; two rows of W in eight pieces against eight pieces of x:

    a = 1 2 | 3 4 | 5 6 | 7 8 | 9 10 | 11 12 | 13 14 | 15 16
    b = 1 1 | 1 1 | 1 1 | 1 1 | 1  1 |  1  1 |  1  1 |  1  1
    x = 1 1 | 2 2 | 3 3 | 4 4 | 5  5 |  6  6 |  7  7 |  8  8

    piece of a times piece of x:   x0   x1   x2   x3   x4   x5   x6   x7
    a0                              3    6    9   12   15   18   21   24
    a1                              7   14   21   28   35   42   49   56
    ...
    a7                             31   62   93  124  155  186  217  248

The diagonal, 3 + 14 + 33 + 60 + 95 + 138 + 189 + 248 = 780, is a x^T; that of the eight rows for b, 2 + 4 + 6 + ... +
16 = 72, is b x^T. Four rows of activations are cut into two pieces each, which are eight columns again, and eight rows
of W into two pieces each, sixteen rows again. (Two rows in four pieces each would be summed over lanes 1, 4 and 8
apart, for which Triton 3.6 makes shuffles of 1, 2 and 4, so two and three rows run the kernel for four.)

**Five to 32 rows: `_gemm_kernel`.** The tensor cores' usual product with W as the wide operand, whose loads pass
through shared memory several steps ahead. x is normed by a kernel of its own.

The loads of both kernels are issued before the wait for the kernel that computes x (`launch.wait_for_previous`), as far
as registers reach. How many rows of W a program takes and how far ahead it loads is in `tiles.py`.
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels import INTERPRETED, Letters, launch, tiles
from decode_kernels.letters import SLICE, send_results


@triton.jit
def _gemv_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    experts_ptr,
    letters,
    out_ptr,
    rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    SILU: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    W_AHEAD: tl.constexpr,
    X_AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    """BLOCK_N results for M rows of activations (M is 1, or 4 for two to four rows).

    Warp i takes the pieces of BLOCK_K columns i, i + WARPS, i + 2 WARPS, ... of the matrix. The loop is unrolled: it
    loads the weights of a step W_AHEAD steps before it multiplies them, the activations X_AHEAD steps before.
    """
    OUT: tl.constexpr = N // 2 if SILU else N
    PIECES: tl.constexpr = 8 // M
    SUB: tl.constexpr = BLOCK_K // (PIECES * 32)
    # pairs of M rows of the matrix: with SILU M gates and their M ups
    PAIRS: tl.constexpr = BLOCK_N // M if SILU else BLOCK_N // (2 * M)
    STEP_K: tl.constexpr = WARPS * BLOCK_K
    STEPS: tl.constexpr = (K + STEP_K - 1) // STEP_K
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    launch.launch_next(PDL)
    first_row = tl.program_id(1)
    if experts_ptr is not None:  # every row of activations has a matrix of its own
        launch.wait_for_previous(PDL)
        w_ptr += tl.load(experts_ptr + first_row) * N * K
        rows = 1
    start = tl.program_id(0) * BLOCK_N
    w_ptr += start.to(tl.int64) * K
    x_ptr += first_row * K

    # Activations are [4 t, PIECES, M, WARPS, SUB, 8], weights [4 t, PIECES, M, WARPS, PAIRS, 2, SUB, 8]. A lane has one
    # t, one piece and one m, and loads 8 numbers in a row; SUB counts its loads along a piece.
    k = tl.arange(0, PIECES)[:, None, None, None, None] * 4 + tl.arange(0, 4)[:, None, None, None, None, None]
    k = k * 8 + tl.arange(0, 8) + tl.arange(0, SUB)[:, None] * (PIECES * 32)
    k += tl.arange(0, WARPS)[:, None, None] * BLOCK_K
    m = tl.arange(0, M)[:, None, None, None]
    w_k = k[:, :, :, :, None, None]
    half = tl.arange(0, 2)[:, None, None]
    w_row = tl.arange(0, PAIRS)[:, None, None, None] * (M if SILU else 2 * M) + m[:, :, :, :, None, None]
    w_row = w_row if SILU else w_row + half * M
    w_exists = start + w_row < OUT
    w_row = w_row + half * OUT if SILU else w_row
    n = start + tl.arange(0, BLOCK_N)[:, None]
    column = tl.arange(0, M)
    result_exists = (n < OUT) & (column < rows)
    result = (first_row + column) * OUT + n
    residual = tl.zeros([BLOCK_N, M], dtype)
    number = tl.zeros([BLOCK_N, M], tl.int32)
    acc = tl.zeros([WARPS, PAIRS * 16, 8], tl.float32)
    squares = tl.zeros([4, PIECES, M, WARPS], tl.float32)
    weights, gains, xs = tl.tuple([]), tl.tuple([]), tl.tuple([])
    for i in tl.static_range(STEPS + W_AHEAD):
        if i < STEPS:
            ptr = launch.deal_to_lanes(w_ptr + i * STEP_K, w_row * K + w_k)
            if (i + 1) * STEP_K <= K and OUT % BLOCK_N == 0:
                weights = weights + (tl.load(ptr, eviction_policy="evict_first"),)
            else:
                exists = w_exists & (i * STEP_K + w_k < K)
                weights = weights + (tl.load(ptr, exists, 0, eviction_policy="evict_first"),)
            if norm_ptr is not None:
                ptr = launch.deal_to_lanes(norm_ptr + i * STEP_K, tl.broadcast_to(k, [4, PIECES, M, WARPS, SUB, 8]))
                gains = gains + (tl.load(ptr, i * STEP_K + k < K, 0),)
        if i == W_AHEAD - 1:
            launch.wait_for_previous(PDL)
            if residual_ptr is not None:
                residual = tl.load(residual_ptr + result, result_exists, 0)
            if letters is not None:
                number = tl.load(letters[0] + result // SLICE, result_exists, 0)
        # After the wait the activations of X_AHEAD steps are loaded, and those of one more step in each step.
        for j in tl.static_range(
            0 if i < W_AHEAD else i - W_AHEAD + X_AHEAD, 0 if i < W_AHEAD - 1 else i - W_AHEAD + X_AHEAD + 1
        ):
            if j < STEPS:
                ptr = launch.deal_to_lanes(x_ptr + j * STEP_K, m * K + k)
                xs = xs + (tl.load(ptr, (m < rows) & (j * STEP_K + k < K), 0),)
        if i >= W_AHEAD:
            launch.keep_loads_here(PDL)
            if launch.always_true(eps, i):
                x = xs[i - W_AHEAD]
                if norm_ptr is not None:
                    x = x.to(tl.float32)
                    squares += tl.sum(tl.sum(x * x, 5), 4)
                    x = (x * gains[i - W_AHEAD].to(tl.float32)).to(dtype)
                w = weights[i - W_AHEAD].reshape(4, PIECES, M, WARPS, PAIRS, 2, SUB, 2, 2, 2)
                w = w.permute(3, 4, 5, 2, 1, 6, 7, 8, 0, 9).reshape(WARPS, PAIRS * 16, SUB * 32)
                x = x.reshape(4, PIECES, M, WARPS, SUB, 2, 2, 2).permute(3, 4, 5, 6, 0, 7, 2, 1)
                acc = launch.dot(w, x.reshape(WARPS, SUB * 32, 8), acc, ASM)
    y = _sum_equal_pieces(acc, PIECES, M)
    if norm_ptr is not None:
        squares = tl.sum(squares.permute(2, 0, 1, 3).reshape(M, 4 * PIECES * WARPS), 1)
        y *= tl.rsqrt(squares / K + eps)
    up = y
    if SILU:
        y, up = tl.split(y.reshape(PAIRS, 2, M, M).permute(0, 2, 3, 1))
        y, up = y.reshape(BLOCK_N, M), up.reshape(BLOCK_N, M)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, n < OUT, 0).to(tl.float32)
    if SILU:
        if bias_ptr is not None:
            up += tl.load(bias_ptr + OUT + n, n < OUT, 0).to(tl.float32)
        y = y / (1 + tl.exp(-y)) * up
    y += residual.to(tl.float32)
    if letters is not None:
        send_results(y, result, result_exists, number, letters)
    else:
        tl.store(out_ptr + result, y.to(dtype), result_exists)


@triton.jit
def _sum_equal_pieces(acc, PIECES: tl.constexpr, M: tl.constexpr):
    """Sums [WARPS, rows of the matrix x PIECES, M x PIECES] of all pairs of pieces -> [rows of the matrix, M]: those
    of equal pieces are added over all warps, the others are dropped.
    """
    WARPS: tl.constexpr = acc.shape[0]
    ROWS: tl.constexpr = acc.shape[1] // PIECES
    y = acc.reshape(WARPS, ROWS, PIECES, M, PIECES)
    y = tl.where(tl.arange(0, PIECES)[:, None, None] == tl.arange(0, PIECES), y, 0.0)
    return tl.sum(y.permute(1, 3, 0, 2, 4).reshape(ROWS, M, WARPS * PIECES * PIECES), 2)


@triton.jit
def _rms_norm_kernel(x_ptr, norm_ptr, out_ptr, eps, K: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr):
    """RMSNorm of one row, for `_gemm_kernel`, and for float16, where gain * x of a row not yet normed may overflow."""
    k = tl.arange(0, WIDTH)
    launch.launch_next(PDL)
    gain = tl.load(norm_ptr + k, k < K, 0).to(tl.float32)
    launch.wait_for_previous(PDL)
    at = tl.program_id(0) * K + k
    x = tl.load(x_ptr + at, k < K, 0).to(tl.float32)
    x *= gain * tl.rsqrt(tl.sum(x * x) / K + eps)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), k < K)


@triton.jit
def _gemm_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    letters,
    out_ptr,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    SILU: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    """BLOCK_N rows of the matrix times M (8, 16 or 32) rows of activations, BLOCK_K columns a step.

    The weights of the first EARLY steps are loaded into registers before the wait. The loop is Triton's own pipeline,
    which has the loads of STAGES steps under way through shared memory; the early steps are multiplied after it.
    """
    OUT: tl.constexpr = N // 2 if SILU else N
    start = tl.program_id(0) * (BLOCK_N // 2 if SILU else BLOCK_N)
    w_row = interleave_gates(tl.arange(0, BLOCK_N), OUT, SILU)[:, None]
    m = tl.arange(0, M)[:, None]
    k = tl.arange(0, BLOCK_K)
    # Lanes add 32-bit offsets to this pointer. With 64-bit addresses half of the loop's instructions computed them.
    w_ptr += start.to(tl.int64) * K
    launch.launch_next(PDL)
    weights, xs = tl.tuple([]), tl.tuple([])
    for i in tl.static_range(EARLY):
        ptr = w_ptr + i * BLOCK_K + (w_row * K + k)
        weights = weights + (tl.load(ptr, (start + w_row < N) & (i * BLOCK_K + k < K), 0),)
    launch.wait_for_previous(PDL)
    for i in tl.static_range(EARLY):
        xs = xs + (tl.load(x_ptr + i * BLOCK_K + (m * K + k), (m < rows) & (i * BLOCK_K + k < K), 0),)
    added = load_for_result(start, rows, bias_ptr, residual_ptr, letters, out_ptr, N, BLOCK_N, M, SILU)
    acc = tl.zeros([BLOCK_N, M], tl.float32)
    for first in tl.range(EARLY * BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0 and N % BLOCK_N == 0:
            w = tl.load(w_ptr + first + (w_row * K + k))
        else:
            w = tl.load(w_ptr + first + (w_row * K + k), (start + w_row < N) & (first + k < K), 0)
        x = tl.load(x_ptr + first + (m * K + k), (m < rows) & (first + k < K), 0)
        acc = launch.dot(w, x.T, acc, ASM)
    for i in tl.static_range(EARLY):
        acc = launch.dot(weights[i], xs[i].T, acc, ASM)
    store_result(acc, added, start, rows, letters, out_ptr, N, SILU)


@triton.jit
def interleave_gates(i, OUT: tl.constexpr, SILU: tl.constexpr):
    """Which row of the matrix is the i-th of a block. With SILU 16 gates and their 16 ups take turns, so that a lane
    has both: rows 0..15, OUT..OUT + 15, 16..31, OUT + 16..OUT + 31, and so on.
    """
    return i // 32 * 16 + i // 16 % 2 * OUT + i % 16 if SILU else i


@triton.jit
def load_for_result(
    start,
    rows,
    bias_ptr,
    residual_ptr,
    letters,
    out_ptr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    M: tl.constexpr,
    SILU: tl.constexpr,
):
    """(bias [BLOCK_N], residual [results, M], numbers of the message [results, M]), or zeros, loaded long before
    `store_result` needs them.
    """
    OUT: tl.constexpr = N // 2 if SILU else N
    RESULTS: tl.constexpr = BLOCK_N // 2 if SILU else BLOCK_N
    bias = tl.zeros([BLOCK_N], out_ptr.dtype.element_ty)
    residual = tl.zeros([RESULTS, M], out_ptr.dtype.element_ty)
    number = tl.zeros([RESULTS, M], tl.int32)
    if bias_ptr is not None:
        n = start + interleave_gates(tl.arange(0, BLOCK_N), OUT, SILU)
        bias = tl.load(bias_ptr + n, n < N, 0)
    n = start + tl.arange(0, RESULTS)[:, None]
    m = tl.arange(0, M)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + m * OUT + n, (n < OUT) & (m < rows), 0)
    if letters is not None:
        number = tl.load(letters[0] + (m * OUT + n) // SLICE, (n < OUT) & (m < rows), 0)
    return bias, residual, number


@triton.jit
def store_result(y, added, start, rows, letters, out_ptr, N: tl.constexpr, SILU: tl.constexpr):
    """Bias, silu(gate) * up, residual and store of y [rows of the matrix as `interleave_gates` says, activations]; what
    it stores, in float32.
    """
    bias, residual, number = added
    BLOCK_N: tl.constexpr = y.shape[0]
    M: tl.constexpr = y.shape[1]
    OUT: tl.constexpr = N // 2 if SILU else N
    RESULTS: tl.constexpr = BLOCK_N // 2 if SILU else BLOCK_N
    y += bias.to(tl.float32)[:, None]
    if SILU:
        gate, up = tl.split(y.reshape(BLOCK_N // 32, 2, 16, M).permute(0, 2, 3, 1))
        y = (gate / (1 + tl.exp(-gate)) * up).reshape(RESULTS, M)
    y += residual.to(tl.float32)
    n = start + tl.arange(0, RESULTS)[:, None]
    m = tl.arange(0, M)
    if letters is not None:
        send_results(y, m * OUT + n, (n < OUT) & (m < rows), number, letters)
    else:
        tl.store(out_ptr + m * OUT + n, y.to(out_ptr.dtype.element_ty), (n < OUT) & (m < rows))
    return y


def _launch_rms_norm(x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    (rows, k), out = x.shape, x.new_empty(x.shape)
    _rms_norm_kernel[(rows,)](x, norm_weight, out, eps, K=k, WIDTH=triton.next_power_of_2(k), **launch.options(8))
    return out


def _launch_gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    experts: Tensor | None,
    letters: Letters,
    out: Tensor,
    eps: float,
    silu_mul: bool,
) -> None:
    rows, k = x.shape
    together = rows if experts is None else 1
    tile = tiles.choose("16-bit, few rows", k, weight.shape[-2], together, silu_mul)
    steps = triton.cdiv(k, tile.warps * tile.columns)
    _gemv_kernel[(triton.cdiv(out.shape[1], tile.rows), rows // together)](
        x,
        weight,
        bias,
        norm_weight,
        residual,
        experts,
        letters,
        out,
        rows,
        eps,
        N=weight.shape[-2],
        K=k,
        SILU=silu_mul,
        M=1 if together == 1 else 4,
        BLOCK_N=tile.rows,
        WARPS=tile.warps,
        BLOCK_K=tile.columns,
        W_AHEAD=min(tile.w_ahead, steps),
        X_AHEAD=min(tile.x_ahead, steps),
        ASM=not INTERPRETED,
        **launch.options(tile.warps),
    )


def _launch_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    letters: Letters,
    out: Tensor,
    silu_mul: bool,
) -> None:
    (rows, k), n = x.shape, weight.shape[-2]
    shared = 0 if INTERPRETED else launch.shared_memory()
    tile = tiles.choose("16-bit, many rows", k, n, rows, silu_mul, shared)
    _gemm_kernel[(triton.cdiv(out.shape[1], tile.rows // 2 if silu_mul else tile.rows),)](
        x,
        weight,
        bias,
        residual,
        letters,
        out,
        rows,
        N=n,
        K=k,
        SILU=silu_mul,
        M=max(8, triton.next_power_of_2(rows)),
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        STAGES=tile.stages,
        EARLY=tile.w_ahead,
        ASM=not INTERPRETED,
        **launch.options(tile.warps, tile.stages),
    )


def empty_result(x: Tensor, n: int, silu_mul: bool) -> Tensor:
    """What a product of x and n rows of a matrix returns, without contents."""
    return x.new_empty(x.shape[0], n // 2 if silu_mul else n)


@launch.operator("dense_linear", lambda x, weight, *rest: empty_result(x, weight.shape[-2], silu_mul=rest[-2]))
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    silu_mul: bool,
    experts: Tensor | None,
) -> Tensor:
    """The equations above in one pass over the weights: x [M, K], M <= 32 -> [M, N], or [M, N/2] with silu_mul.

    weight [N, K] in x's dtype, K a multiple of 8; with experts (int64 [M]) weight is [E, N, K] and row m of x uses
    matrix experts[m]. bias is [N], norm_weight [K], residual of the result's shape.
    """
    return run(x, weight, bias, norm_weight, eps, residual, silu_mul, experts)


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    silu_mul: bool,
    experts: Tensor | None,
    letters: Letters = None,
) -> Tensor:
    """`linear`; with letters its result is sent to all ranks, and what is returned waits for their sum."""
    rows, out = x.shape[0], empty_result(x, weight.shape[-2], silu_mul)
    x, residual = x.contiguous(), residual if residual is None else residual.contiguous()
    together = rows if experts is None else 1  # rows of activations that share a matrix
    if norm_weight is not None and (together > 1 or x.dtype == torch.float16):
        x, norm_weight = _launch_rms_norm(x, norm_weight, eps), None
    if together <= 4:
        _launch_gemv(x, weight, bias, norm_weight, residual, experts, letters, out, eps, silu_mul)
    else:
        _launch_gemm(x, weight, bias, residual, letters, out, silu_mul)
    return out

"""Triton kernels for decoding at the speed of the memory bus, each with an eager PyTorch twin.

Knows: how a matrix of 16-bit, int8 or int4 weights is streamed once for 1..16 rows of activations (`linear`), how new
tokens enter the cache and attend to the valid prefix of it (`decode_attention`), and how quantized weights lie in
memory for that (`pack_int8`, `pack_int4`). Refuses to know models, layers, files, and where weights come from. Imports
without Triton: then `supported` is False everywhere and the twins serve.

How they come near the memory's speed (measurements in benchmarks/NOTES.md):

- 16-bit weights and up to four rows: small programs that ask for all their weights at once, in the memory's order. The
  tensor cores multiply, at the price of products that nobody wants: converting and adding took longer than reading.
  More rows: the wanted products alone, the loads of the next steps passing through shared memory meanwhile.
- int8 and int4 weights: a GPU has no time to make floats of them. The activations become integers instead, two int8
  digits of a block floating-point number that is finer than bf16 (`_digits_kernel`), and the tensor cores multiply
  integers exactly. One row uses two of their eight columns, four rows use all: up to eight rows are nearly free.
- Registers are operands: weights are packed so that the 16 bytes which a lane loads are what m16n8k32 wants there.
  Lanes are dealt to axis 0 of such pointers, then 1, warps to axis 2, and the last axis is a lane's own. It takes
  `max_contiguous` to say so: of axes without contiguous addresses Triton 3.6 takes the first, later versions the last.
  Only the order of its numbers counts, for the last axis, which a lane loads in one piece, is contiguous or one long.
- The compiler must not move a load down to its use, nor a product up before a load. Nothing says so to it, but a second
  `gdc_wait`, which returns at once, stops the one, and a branch that is always taken the other.
- A kernel is launched while the one before it runs (programmatic dependent launch), asks for what no kernel writes, its
  weights above all, and then waits. A forward pass begins with PyTorch's own kernels, which end before the next starts.
"""

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # no Triton on this platform: the twins alone
    triton = None

MAX_ROWS = 16


def interpreted() -> bool:
    """Whether Triton runs its kernels in its CPU interpreter (for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result  # a question to the driver has no place in a graph
def supported(device: torch.device) -> bool:
    """Whether the Triton kernels run on this device; elsewhere `linear` and `decode_attention` are their twins."""
    if triton is None:
        return False
    if interpreted():
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


# ---------------------------------------------------------------- layouts


def _blocks(q: Tensor) -> Tensor:
    """int8 [..., N, K] -> [..., N/16, K/128, 2 e, 2 u, 8 g, 4 t, 2 b, 2 h, 4 i], padded with zeros to whole blocks.

    Row 16 n + 8 h + g, column 128 c + 64 u + 32 e + 8 t + 4 b + i: the axes from g on are what the 32 lanes of a warp
    hold, 16 bytes each, of one operand of the tensor cores' m16n8k32 instruction.
    """
    n, k = q.shape[-2:]
    q = F.pad(q, (0, -k % 128, 0, -n % 16)).unflatten(-2, (-1, 2, 8)).unflatten(-1, (-1, 2, 2, 4, 2, 4))
    return q.movedim((-9, -8, -7, -6, -5, -4, -3, -2, -1), (-9, -2, -5, -8, -6, -7, -4, -3, -1))


def pack_int8(q: Tensor) -> Tensor:
    """int8 [..., N, K] -> int8 [..., N/16, K/128, 2048] in the memory order of `_blocks`."""
    return _blocks(q).flatten(-7).contiguous()


def pack_int4(q: Tensor) -> Tensor:
    """int8 [..., N, K] with values -8..7 -> uint8 [..., N/16, K/128, 1024]: e = 0 in the high nibble, 1 in the low."""
    high, low = _blocks(q).unbind(-7)
    return (high << 4 | low & 15).flatten(-6).view(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `pack_int8` and `pack_int4`, padding included: -> int8 [..., N, K]."""
    if packed.dtype == torch.uint8:
        packed = packed.view(torch.int8)
        packed = torch.cat([packed >> 4, packed << 4 >> 4], -1)
    q = packed.unflatten(-1, (2, 2, 8, 4, 2, 2, 4))
    q = q.movedim((-9, -2, -5, -8, -6, -7, -4, -3, -1), (-9, -8, -7, -6, -5, -4, -3, -2, -1))
    return q.flatten(-6).flatten(-4, -2)


# ---------------------------------------------------------------- eager twins


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight in float32 (Zhang & Sennrich 2019), returned in x's dtype."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _plain(weight: Tensor, scale: Tensor | None) -> bool:
    """Whether these are int8 weights that are not packed."""
    return scale is not None and weight.dtype == torch.int8 and weight.dim() == scale.dim() + 1


def _out_features(weight: Tensor, scale: Tensor | None) -> int:
    return weight.shape[-2] if scale is None else scale.shape[-1 if weight.dtype == torch.int8 else -2]


def dequantize_reference(
    weight: Tensor, scale: Tensor | None, zero: Tensor | None, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    """Twin of `dequantize`; int8 may also lie as it is, [..., N, K]."""
    q = weight if _plain(weight, scale) else unpack(weight)[..., :n, :k]
    if scale is None:
        return q.to(dtype)
    if weight.dtype == torch.int8:
        return (q.float() * scale.float()[..., None]).to(dtype)
    q = q.float().unflatten(-1, (scale.shape[-1], -1))
    q = q if zero is None else q - zero.float()[..., None]
    return (q * scale.float()[..., None]).flatten(-2).to(dtype)


def linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    experts: Tensor | None = None,
) -> Tensor:
    """Twin of `linear`: any number of rows, any shape and dtype."""
    if norm_weight is not None:
        x = rms_norm_reference(x, norm_weight, eps)
    if experts is not None:
        weight, scale, zero = (t if t is None else t[experts] for t in (weight, scale, zero))
    late = scale if weight.dtype == torch.int8 else None  # a per-channel scale is cheaper, and exact, on the result
    if scale is None or _plain(weight, scale):
        w = weight.to(x.dtype)
    else:
        n, factor = _out_features(weight, scale), None if late is not None else scale
        w = dequantize_reference(weight, factor, zero, n, x.shape[-1], x.dtype)
    y = F.linear(x, w) if experts is None else torch.einsum("mk,mnk->mn", x, w)
    if late is not None:
        y = (y.float() * late.float()).to(x.dtype)
    if bias is not None:
        y = y + (bias if experts is None or bias.dim() == 1 else bias[experts])
    if silu_mul:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual


def decode_attention_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Twin of `decode_attention`: any T and positions; reads every slot it is given, so pass a narrowed cache."""
    b, t = positions.shape
    kv_heads, slots, dim = k_cache.shape[1:]
    qkv = qkv.view(b, t, -1, dim).transpose(1, 2)
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    q = q if q_norm is None else rms_norm_reference(q, q_norm, eps)
    k = k if k_norm is None else rms_norm_reference(k, k_norm, eps)
    cos, sin = cos.view(b, 1, t, -1), sin.view(b, 1, t, -1)
    q, k = (rotate(x, cos, sin) for x in (q, k))
    rows = torch.arange(b, device=qkv.device)[:, None]
    k_cache[rows, :, positions] = k.transpose(1, 2).to(k_cache.dtype)
    v_cache[rows, :, positions] = v.transpose(1, 2).to(v_cache.dtype)
    slot = torch.arange(slots, device=qkv.device)
    mask = slot <= positions[..., None]
    mask = mask if window == 0 else mask & (slot > positions[..., None] - window)
    group = heads // kv_heads  # the query heads of a group become rows: K and V are not repeated
    q = q.reshape(b, kv_heads, group * t, dim)
    out = F.scaled_dot_product_attention(q, k_cache.to(q.dtype), v_cache.to(q.dtype), mask.repeat(1, group, 1)[:, None])
    return out.reshape(b, heads, t, dim).transpose(1, 2).reshape(b * t, heads * dim)


def angles(positions: Tensor, inv_freq: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos, sin float32 [B, T, 1, Dh/2] of positions int64 [B, T]: a few hundred numbers, cheaper than a table."""
    angle = positions[:, :, None, None] * inv_freq
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def embed_reference(
    tokens: Tensor, positions: Tensor, table: Tensor, inv_freq: Tensor, factor: float = 1.0, first: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `embed`: any number of tokens."""
    if first is None:
        return F.embedding(tokens, table), *angles(positions, inv_freq, factor)
    tokens = tokens - first
    inside = (tokens >= 0) & (tokens < table.shape[0])
    x = F.embedding(tokens.where(inside, 0), table) * inside[..., None]
    return x, *angles(positions, inv_freq, factor)


def advance_reference_(tokens: Tensor, token: Tensor, position: Tensor, step: Tensor, out: Tensor) -> None:
    """Twin of `advance_`."""
    out.index_copy_(1, step, tokens[:, None])
    token.copy_(tokens.clamp(min=0)[:, None])
    position.add_(1)
    step.add_(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding (Su et al. 2021) of x [..., Dh] by cos, sin [..., Dh/2], in float32."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


# ---------------------------------------------------------------- linear: rows of 16-bit weights

if triton is not None:

    @triton.jit
    def _at(ptr: tl.tensor, offset: tl.tensor) -> tl.tensor:
        """ptr + offset, lanes, then warps, dealt to the axes in order; the last axis is a lane's own. The hint is the
        sum's: with an argument of a function it would not stay.
        """
        ptr += offset
        if len(ptr.shape) == 6:
            ptr = tl.max_contiguous(ptr, [64, 32, 16, 8, 1, 128])
        else:
            ptr = tl.max_contiguous(ptr, [64, 32, 16, 8, 1, 1, 128])
        return ptr

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
            for j in tl.static_range(
                0 if i < AHEAD else i - AHEAD + NEAR, 0 if i < AHEAD - 1 else i - AHEAD + 1 + NEAR
            ):
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
    def _dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor, ASM: tl.constexpr) -> tl.tensor:
        """acc + a @ b, batched or not. The interpreter (not ASM) knows no bf16 product."""
        if not ASM:
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, acc)

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

    @triton.jit
    def _halved(x: tl.tensor, AXIS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
        """The two halves of [n, rows, columns] along axis 0 or 1."""
        if AXIS == 0:
            x = x.reshape(2, x.shape[0] // 2, x.shape[1], x.shape[2]).permute(1, 2, 3, 0)
        else:
            x = x.reshape(x.shape[0], 2, x.shape[1] // 2, x.shape[2]).permute(0, 2, 3, 1)
        return tl.split(x)


# ---------------------------------------------------------------- linear: quantized weights

if triton is not None:

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
                at = _at(w_ptr + (i * WARPS * BYTES + e * 1024), inner)
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
            for j in tl.static_range(
                0 if i < AHEAD else i - AHEAD + NEAR, 0 if i < AHEAD - 1 else i - AHEAD + 1 + NEAR
            ):
                if j < STEPS:
                    for e in tl.static_range(2):
                        at = _at(digits_ptr + (j * WARPS * 1024 + e * 512), block)
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
                y, other = _halved(y, 0)
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


@torch.library.custom_op("decode::dequantize", mutates_args=())
def _dequantize(
    weight: Tensor, scale: Tensor | None, zero: Tensor | None, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(n, k, dtype=dtype, device=weight.device)
    group = _group_size(weight, scale, k)
    bits, chunks = 8 if weight.dtype == torch.int8 else 4, 4
    _dequantize_kernel[weight.shape[0], triton.cdiv(weight.shape[1], chunks)](
        weight, scale, zero, out, n, k, group, bits, chunks, math.gcd(group, 128)
    )
    return out


@_dequantize.register_fake
def _dequantize_shape(
    weight: Tensor, scale: Tensor | None, zero: Tensor | None, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    return weight.new_empty(n, k, dtype=dtype)


def dequantize(weight: Tensor, scale: Tensor | None, zero: Tensor | None, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The [..., N, K] matrix in `dtype` that a packed weight of `linear` stands for; scale None: its integers.

    What prefill multiplies by: one pass over the weights, little beside a product with many rows.
    """
    if supported(weight.device) and weight.dim() == 3 and not _plain(weight, scale):
        return _dequantize(weight, scale, zero, n, k, dtype)
    return dequantize_reference(weight, scale, zero, n, k, dtype)


# Tiles: what was fastest for Llama shapes on one H200 (NOTES.md has the sweeps); elsewhere they are right, if not best.


def _row_tile(k: int, n: int, rows: int, silu_mul: bool) -> tuple[int, int, int, int, int]:
    """(results, warps, k of a warp's step, and how many steps ahead weights and activations are asked for) of
    `_row_kernel`.
    """
    if rows > 1:
        if silu_mul:
            return 4, 8, 256, 2, 2
        return 8, (4 if n <= 8192 else 8), 128, 4, (4 if k <= 4096 else 2)
    if silu_mul:
        return 4, (2 if k <= 2048 else 4), 256, 4, 4
    if k <= 2048:
        return (2 if n <= 2048 else 4), 2, 256, 4, 4
    if k <= 4096:
        return 2, 4, 512, 2, 2
    return 2, *((4, 256, 4, 4) if k <= 8192 else (8, 256, 6, 6))


def _rows_tile(k: int, n: int, rows: int, silu_mul: bool, shared: int) -> tuple[int, int, int, int, int]:
    """(rows of the matrix, k at a time, warps, stages, early steps) of `_rows_kernel`; sm86's 99 KB of shared memory
    are enough.
    """
    if silu_mul:
        return (64, 128, 2, 3, 2) if rows <= 8 else (64, 64, 2, 6, 1)
    if k >= 4096 and 2048 < n <= 4096 and rows <= 8 and shared >= 160 * 1024:  # one program a multiprocessor
        return (32, 256, 2, 7, 2) if k > 8192 else (32, 256, 2, 6, 1)
    if n <= 8192:
        return (16, 512, 2, 4, 1) if rows <= 8 else (16, 256, 1, 6, 1)
    return (32, 128, 1, 5, 3) if rows <= 8 else (32, 128, 1, 6, 1)


def _quantized_tile(bits: int, k: int, n: int, rows: int, silu_mul: bool) -> tuple[int, int, int, int]:
    """(16-row tiles, warps, and how many steps ahead weights and digits are asked for) of `_quantized_kernel`: best is
    what lets all programs be resident at once.
    """
    narrow, short = n <= 8192 and not silu_mul, k <= 4096 and silu_mul
    if rows > 8:
        if narrow:
            return (2, 8, 2, 2) if k > 8192 and bits == 4 else (1, 4, 2, 2)
        return (2, 4, 2, 2) if short or bits == 4 else (2, 2, 2, 1)
    if bits == 8:
        if rows > 4:
            return (1, 4, 6, 3) if narrow else (2, 4, 1, 1) if short else (2, 4, 2, 1)
        return (2, 4, 2, 2) if not narrow else (1, 8, 4, 4) if k <= 8192 else (1, 4, 6, 6)
    if rows > 4:
        return (1, 8, 2 if k <= 16384 else 3, 1) if narrow else (2, 2, 2, 1) if short else (2, 4, 2, 1)
    if narrow:
        return (1, 4, 8, 4) if k <= 4096 else (1, 8, 4, 4)
    if short:
        return (2, 2, 2, 2) if rows == 1 else (2, 2, 3, 3)
    return 2, 4, 3, 3


def _group_size(weight: Tensor, scale: Tensor | None, k: int) -> int:
    return k if scale is None or weight.dtype == torch.int8 else k // scale.shape[-1]


def _fits(x: Tensor, weight: Tensor, scale: Tensor | None, silu_mul: bool, bias: Tensor | None) -> bool:
    """Whether the kernels cover these formats and shapes; the twin takes the rest."""
    k = x.shape[-1]
    if x.dtype not in (torch.bfloat16, torch.float16) or x.shape[0] > MAX_ROWS or (bias is not None and bias.dim() > 1):
        return False
    if scale is None:
        return k % 8 == 0 and weight.dtype == x.dtype
    group = _group_size(weight, scale, k)
    fits = group >= 32 and (group == k or group & (group - 1) == 0) and not _plain(weight, scale)
    return fits and (not silu_mul or _out_features(weight, scale) % 32 == 0)


@torch.library.custom_op("decode::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
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
    n = _out_features(weight, scale)
    n_out = n // 2 if silu_mul else n
    out = torch.empty(rows, n_out, dtype=x.dtype, device=x.device)
    if scale is None:
        together = rows if experts is None else 1
        if norm_weight is not None and (together > 1 or x.dtype == torch.float16):  # gain * x may not fit float16
            width, normed = triton.next_power_of_2(k), torch.empty_like(x)
            _norm_kernel[(rows,)](x, norm_weight, normed, eps, k, width, **_launch(x.device, 8))
            x, norm_weight = normed, None
        if together <= 4:
            block, warps, each, ahead, near = _row_tile(k, n, together, silu_mul)
            most = triton.cdiv(k, warps * each)
            _row_kernel[(triton.cdiv(n_out, block), rows // together)](
                x, weight, bias, norm_weight, residual, experts, out, rows, eps, n, k, silu_mul,
                1 if together == 1 else 4, block, warps, each, min(ahead, most), min(near, most),
                ASM=not interpreted(), **_launch(x.device, warps),
            )  # fmt: skip
            return out
        shared = 0 if interpreted() else _shared_memory()
        block, span, warps, stages, early = _rows_tile(k, n, rows, silu_mul, shared)
        _rows_kernel[(triton.cdiv(n_out, block // 2 if silu_mul else block),)](
            x, weight, bias, residual, out, rows, n, k, silu_mul, 8 if rows <= 8 else 16, block, span, stages, early,
            ASM=not interpreted(), **_launch(x.device, warps, stages),
        )  # fmt: skip
        return out
    chunks, spacing = triton.cdiv(k, 128), 2 if experts is None else 8
    blocks = triton.cdiv(rows * spacing, 8)
    columns = 8 if experts is not None else max(8, triton.next_power_of_2(rows * 2))
    digits = torch.empty(max(blocks, columns // 8), chunks * 1024, dtype=torch.int8, device=x.device)
    step = torch.empty(digits.shape[0], chunks, 8, dtype=torch.float32, device=x.device)
    squares = None
    if norm_weight is not None:
        squares = torch.empty(rows, chunks, dtype=torch.float32, device=x.device)
    _digits_kernel[(rows, chunks)](x, norm_weight, digits, step, squares, k, spacing, **_launch(x.device, 1))
    bits = 8 if weight.dtype == torch.int8 else 4
    tiles, warps, ahead, near = _quantized_tile(bits, k, n, rows if experts is None else 1, silu_mul)
    most = triton.cdiv(chunks, warps)
    grid = (triton.cdiv(n_out, tiles * (8 if silu_mul else 16)), 1 if experts is None else rows)
    _quantized_kernel[grid](
        digits, step, squares, weight, scale, zero, bias, residual, experts, out, rows, eps, n, k,
        _group_size(weight, scale, k), bits, silu_mul, columns, tiles, warps, min(ahead, most), min(near, most),
        ASM=not interpreted(), **_launch(x.device, warps),
    )  # fmt: skip
    return out


@_linear.register_fake
def _linear_shape(
    x: Tensor, weight: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None,
    norm_weight: Tensor | None, eps: float, residual: Tensor | None, silu_mul: bool, experts: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], _out_features(weight, scale) // (2 if silu_mul else 1))


def _shared_memory() -> int:
    """Bytes of shared memory that one program may have on the current device."""
    driver = triton.runtime.driver.active
    return driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"]


def _launch(device: torch.device, warps: int, stages: int = 1) -> dict[str, bool | int | None]:
    """Launch options: programmatic dependent launch (PDL) from sm90 on."""
    if interpreted():
        return {"PDL": False, "num_warps": warps}
    pdl = triton.runtime.driver.active.get_current_target().arch >= 90
    return {"PDL": pdl, "num_warps": warps, "num_stages": stages, "launch_pdl": pdl}


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    experts: Tensor | None = None,
) -> Tensor:
    """y = epilogue(norm(x) @ dequantized(weight).T), one pass over the weights: [M, K], M <= 16 -> [M, N or N/2].

    weight: [N, K] in x's dtype; `pack_int8`'s with scale [N]; or `pack_int4`'s with scale [N, G], G = K / group, and
    zero [N, G] (float; None when symmetric): w = (q - zero) * scale. With experts (int64 [M]) weight, scale and zero
    have a leading E, and row m uses matrix experts[m].
    norm_weight [K]: RMSNorm of x first. bias [N] is added; silu_mul: rows [0, N/2) are gates, the rest ups, and the
    result is silu(gate) * up; residual [M, N or N/2] is added last. Accumulates in float32. Other dtypes than bf16 and
    fp16, unaligned shapes and devices without the kernel go to the twin.
    """
    if not supported(x.device) or not _fits(x, weight, scale, silu_mul, bias):
        return linear_reference(x, weight, scale, zero, bias, norm_weight=norm_weight, eps=eps, residual=residual,
                                silu_mul=silu_mul, experts=experts)  # fmt: skip
    return _linear(x, weight, scale, zero, bias, norm_weight, eps, residual, silu_mul, experts)


# ---------------------------------------------------------------- attention

if triton is not None:

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
        k = tl.load(_at(lane, begin * WORDS), real & (slot < end - begin), 0)
        return k, tl.load(_at(v_lane, begin * WORDS), v_real & (v_slot < end - begin), 0)

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
        s = tl.where(seen, _dot(q, k, tl.zeros([WARPS, BLOCK, 16], tl.float32), ASM) * scale, -1e30)
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
        return top, total, _dot(v, p, acc, ASM)

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
        k_lane = _at(k_ptr.to(tl.pointer_type(tl.int32), bitcast=True), k_slot * HALF + k_word)
        v_lane = _at(v_ptr.to(tl.pointer_type(tl.int32), bitcast=True), v_slot * HALF + v_word)
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
            at = _at(at + v_slot * (STRIDE // 2), v_word)
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
        tl.store(_at(k_lane, first * HALF), key, wanted)
        tl.store(_at(v_lane, first * HALF), value, v_real & (v_slot < T) & writes)
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
                m, m1 = _halved(m, 0)
                total, total1 = _halved(total, 0)
                acc, acc1 = _halved(acc, 0)
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


ATTENTION_AHEAD = 4  # steps of the loop over the prefix that the L2 cache is asked for in advance, this one included


def _splits(heads: int, slots: int) -> int:
    """Into how many programs the prefix of every KV head is split: a choice, measured on one H200 (NOTES.md)."""
    return max(1, min(triton.cdiv(264, heads), slots // 512))


def _attention_tile(rows: int, splits: int, width: int) -> tuple[int, int]:
    """(rows of one program, warps) of `_attention_kernel`: their product is what the sum over warps needs of shared
    memory, 33 KB for heads of 128.
    """
    warps = 8 if splits == 1 and width <= 128 else 4
    return (8 if rows <= 8 or warps == 8 else 16), warps


@torch.library.custom_op("decode::attention", mutates_args=("k_cache", "v_cache"))
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
    rows, splits = t * heads // kv_heads, _splits(b * kv_heads, slots)
    block, warps = _attention_tile(rows, splits, width)
    rows = triton.cdiv(rows, block) * block
    out = torch.empty(b * t, heads * dim, dtype=qkv.dtype, device=qkv.device)
    part = None
    if splits > 1:
        part = torch.empty(b * kv_heads * splits * rows * (width + 2), dtype=torch.float32, device=qkv.device)
    launch = _launch(qkv.device, warps)
    scale = dim**-0.5 * 1.4426950408889634  # exp(x) = exp2(x log2(e))
    _attention_kernel[(b * kv_heads, splits, rows // block)](
        qkv, cos, sin, positions, k_cache, v_cache, q_norm, k_norm, out, part, eps, scale, slots, t, heads, kv_heads,
        dim, width, window, splits, rows, block, warps, ATTENTION_AHEAD, ASM=not interpreted(), **launch,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(b * t, heads)](
            part, positions, out, t, heads, kv_heads, dim, width, window, splits, rows, 16 * warps, **launch
        )
    return out


@_attention.register_fake
def _attention_shape(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float, window: int,
) -> Tensor:  # fmt: skip
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * k_cache.shape[1] * k_cache.shape[3])


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Attention of T <= 16 new tokens to a cache: qkv [B T, (H + 2 Hkv) Dh] (q, k, v heads) -> [B T, H Dh].

    Per head: optional RMSNorm of q and k by q_norm, k_norm [Dh]; half-split rotary embedding by cos, sin float32
    [B T, Dh/2]; k and v are written in place into k_cache, v_cache [B, Hkv, S, Dh] at positions int64 [B, T], which
    must be consecutive in each row; then softmax(q k / sqrt(Dh)) v over the slots <= position (and > position - window,
    if window > 0). The length is read on the device, so one captured graph serves every position, and slots behind it
    cost nothing. The prefix is split over the multiprocessors and read once for all query heads of a group.
    """
    t, dim = positions.shape[1], k_cache.shape[3]
    fits = t <= 16 and dim % 8 == 0 and dim <= 256 and qkv.dtype in (torch.bfloat16, torch.float16)
    fits = fits and k_cache.dtype == v_cache.dtype == qkv.dtype
    if not supported(qkv.device) or not fits:
        return decode_attention_reference(qkv, cos, sin, positions, k_cache, v_cache, q_norm, k_norm, eps, window)
    qkv, cos, sin, positions = (x.contiguous() for x in (qkv, cos, sin, positions))
    return _attention(qkv, cos, sin, positions, k_cache, v_cache, q_norm, k_norm, eps, window)


# ---------------------------------------------------------------- the two ends of a step

if triton is not None:

    @triton.jit
    def _embed_kernel(
        tokens_ptr: tl.tensor, pos_ptr: tl.tensor, table_ptr: tl.tensor, freq_ptr: tl.tensor, x_ptr: tl.tensor,
        cos_ptr: tl.tensor, sin_ptr: tl.tensor, factor: tl.tensor, first: tl.tensor, V: tl.tensor, D: tl.constexpr,
        HALF: tl.constexpr, WIDTH: tl.constexpr, ANGLES: tl.constexpr, PDL: tl.constexpr,
    ) -> None:  # fmt: skip
        """One token: its row of the embedding, and the angles of its position."""
        row = tl.program_id(0)
        if PDL:
            gdc_launch_dependents()
        token = tl.load(tokens_ptr + row) - first
        d = tl.arange(0, WIDTH)
        x = tl.load(table_ptr + token * D + d, (token >= 0) & (token < V) & (d < D), 0)
        i = tl.arange(0, ANGLES)
        angle = tl.load(pos_ptr + row).to(tl.float32) * tl.load(freq_ptr + i, i < HALF, 0)
        tl.store(x_ptr + row * D + d, x, d < D)
        tl.store(cos_ptr + row * HALF + i, tl.cos(angle) * factor, i < HALF)
        tl.store(sin_ptr + row * HALF + i, tl.sin(angle) * factor, i < HALF)

    @triton.jit
    def _ordered(x: tl.tensor, INF: tl.constexpr) -> tl.tensor:
        """16-bit floats as integers in their order, 1..65534; 65535 is what is not finite (exponent bits INF)."""
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        key = tl.where(bits < 0x8000, bits + 0x8000, 0x10000 - bits)
        return tl.where((bits & 0x7FFF) < INF, key, 65535)

    @triton.jit
    def _maxima_kernel(
        logits_ptr: tl.tensor, key_ptr: tl.tensor, V: tl.constexpr, BLOCKS: tl.constexpr, INF: tl.constexpr,
        PDL: tl.constexpr,
    ) -> None:  # fmt: skip
        """The largest of every 16 logits, as `_ordered`."""
        row = tl.program_id(1)
        block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
        at = block[:, None] * 16 + tl.arange(0, 16)
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        key = tl.where(at < V, _ordered(tl.load(logits_ptr + row * V + at, at < V, 0), INF), 0)
        tl.store(key_ptr + row * ((V + 15) // 16) + block, tl.max(key, 1), block * 16 < V)

    @triton.jit
    def _first(key: tl.tensor, k: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        """(which are the k largest, the first ones among equals; the place of each among them), by bisection."""
        least = 0
        for i in tl.static_range(16):
            middle = least + (32768 >> i)
            least = tl.where(tl.sum((key >= middle).to(tl.int32)) >= k, middle, least)
        spare = k - tl.sum((key > least).to(tl.int32))
        own = (key > least).to(tl.int32) * 65536 + (key == least).to(tl.int32)
        before = tl.cumsum(own) - own
        equals = before & 0xFFFF
        return (key > least) | ((key == least) & (equals < spare)), (before >> 16) + tl.minimum(equals, spare)

    @triton.jit
    def _mixed(x: tl.tensor) -> tl.tensor:
        """`sampling._mix`."""
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
        x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
        return x ^ ((x >> 31) & 0x1FFFFFFFF)

    @triton.jit
    def _sample_kernel(
        logits_ptr: tl.tensor, key_ptr: tl.tensor, chosen_ptr: tl.tensor, knobs_ptr: tl.tensor, seeds_ptr: tl.tensor,
        pos_ptr: tl.tensor, out_ptr: tl.tensor, seed_stride: tl.tensor, pos_stride: tl.tensor,
        V: tl.constexpr, K: tl.constexpr, MAXIMA: tl.constexpr, WIDTH: tl.constexpr, INF: tl.constexpr,
        PDL: tl.constexpr,
    ) -> None:  # fmt: skip
        """A row: the K largest logits lie in the K blocks with the largest maxima; then the race of `sampling.draw`."""
        BLOCKS: tl.constexpr = (V + 15) // 16
        MOST: tl.constexpr = min(K, BLOCKS)
        row = tl.program_id(0)
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        i = tl.arange(0, MAXIMA)
        key = tl.load(key_ptr + row * BLOCKS + i, i < BLOCKS, 0)
        noise = tl.load(seeds_ptr + row * seed_stride) * -0x61C8864680B583EB
        noise = _mixed(_mixed(noise) ^ tl.load(pos_ptr + row * pos_stride))
        heat, least = tl.load(knobs_ptr), tl.load(knobs_ptr + 2)
        largest = tl.max(key)
        chosen, place = _first(key, MOST)
        tl.store(chosen_ptr + row * MOST + place, i, chosen)
        tl.debug_barrier()  # the program reads what it has written
        j = tl.arange(0, WIDTH * 16)
        token = tl.load(chosen_ptr + row * MOST + j // 16, j < MOST * 16, 0) * 16 + j % 16
        valid = (j < MOST * 16) & (token < V)
        x = tl.load(logits_ptr + row * V + token, valid, 0)
        chosen, _ = _first(tl.where(valid, _ordered(x, INF), 0), K)
        top = tl.max(tl.where(valid, x.to(tl.float32), float("-inf")))
        p = tl.exp((x.to(tl.float32) - top) * heat)
        bits = _mixed(_mixed(noise + token)) & 0x7FFFFFFFFFFFFFFF
        u = tl.minimum(tl.maximum(bits.to(tl.float32) * 1.0842021724855044e-19, 1.0842021724855044e-19), 1 - 2.0**-24)
        e = tl.where(u < 0.015625, u * (1 + u * (0.5 + u * (1 / 3 + u * 0.25))), -tl.log(1 - u))  # -log1p(-u)
        score = tl.where(chosen & (p >= least), p / e, -1.0)
        token = tl.min(tl.where(score == tl.max(score), token, V))  # the first among equals
        tl.store(out_ptr + row, tl.where(largest == 65535, -1, token).to(tl.int64))

    @triton.jit
    def _advance_kernel(
        tokens_ptr: tl.tensor, token_ptr: tl.tensor, pos_ptr: tl.tensor, step_ptr: tl.tensor, out_ptr: tl.tensor,
        B: tl.tensor, S: tl.tensor, WIDTH: tl.constexpr, PDL: tl.constexpr,
    ) -> None:  # fmt: skip
        """All rows."""
        row = tl.arange(0, WIDTH)
        here = row < B
        step = tl.load(step_ptr)
        if PDL:
            gdc_wait()
        token = tl.load(tokens_ptr + row, here, 0)
        tl.store(out_ptr + row.to(tl.int64) * S + step, token, here)
        tl.store(token_ptr + row, tl.maximum(token, 0), here)
        tl.store(pos_ptr + row, tl.load(pos_ptr + row, here, 0) + 1, here)
        tl.debug_barrier()  # everyone has read the step
        tl.store(step_ptr, step + 1)


@torch.library.custom_op("decode::embed", mutates_args=())
def _embed(
    tokens: Tensor, positions: Tensor, table: Tensor, inv_freq: Tensor, factor: float, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    (b, t), d, half = tokens.shape, table.shape[1], inv_freq.shape[0]
    x, (cos, sin) = table.new_empty(b, t, d), (inv_freq.new_empty(b, t, 1, half) for _ in range(2))
    launch = _launch(tokens.device, 4)
    launch.pop("launch_pdl", None)  # begins when all before it has ended: later kernels need not wait for positions
    _embed_kernel[(b * t,)](
        tokens.contiguous(), positions.contiguous(), table, inv_freq, x, cos, sin, factor, first, table.shape[0], d,
        half, triton.next_power_of_2(d), triton.next_power_of_2(half), **launch,
    )  # fmt: skip
    return x, cos, sin


@_embed.register_fake
def _embed_shape(
    tokens: Tensor, positions: Tensor, table: Tensor, inv_freq: Tensor, factor: float, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    cos, sin = (inv_freq.new_empty(*tokens.shape, 1, inv_freq.shape[0]) for _ in range(2))
    return table.new_empty(*tokens.shape, table.shape[1]), cos, sin


def embed(
    tokens: Tensor, positions: Tensor, table: Tensor, inv_freq: Tensor, factor: float = 1.0, first: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """How a step begins, in one kernel: tokens, positions int64 [B, T] -> rows of table [V, D], and `angles`.

    first: of a slice of a larger table that begins with this id; ids outside get zeros.
    """
    if not supported(table.device):
        return embed_reference(tokens, positions, table, inv_freq, factor, first)
    return _embed(tokens, positions, table, inv_freq, factor, first or 0)


@torch.library.custom_op("decode::sample", mutates_args=())
def _sample(logits: Tensor, knobs: Tensor, seeds: Tensor, positions: Tensor, top_k: int) -> Tensor:
    logits, (b, v) = logits.contiguous(), logits.shape
    blocks, most = triton.cdiv(v, 16), min(top_k, triton.cdiv(v, 16))
    key = torch.empty(b, blocks, dtype=torch.int32, device=logits.device)
    chosen = torch.empty(b, most, dtype=torch.int32, device=logits.device)
    out = torch.empty(b, dtype=torch.int64, device=logits.device)
    inf, part = (0x7F80 if logits.dtype == torch.bfloat16 else 0x7C00), 64
    _maxima_kernel[(triton.cdiv(blocks, part), b)](logits, key, v, part, inf, **_launch(logits.device, 4))
    _sample_kernel[(b,)](
        logits, key, chosen, knobs, seeds, positions, out, seeds.expand(b).stride(0), positions.stride(0), v,
        top_k, triton.next_power_of_2(blocks), triton.next_power_of_2(most), inf, **_launch(logits.device, 16),
    )  # fmt: skip
    return out


@_sample.register_fake
def _sample_shape(logits: Tensor, knobs: Tensor, seeds: Tensor, positions: Tensor, top_k: int) -> Tensor:
    return positions.new_empty(logits.shape[0])


def samples(dtype: torch.dtype, vocabulary: int, structure: tuple[bool, int, bool, bool]) -> bool:
    """Whether `sample` can for logits of a model that runs by kernels. structure: `sampling.Structure`."""
    greedy, top_k, use_top_p, _ = structure
    few = greedy or (not use_top_p and 0 < top_k <= 256)
    return few and top_k < vocabulary <= 1 << 18 and dtype in (torch.bfloat16, torch.float16)


def sample(logits: Tensor, knobs: Tensor, seeds: Tensor, positions: Tensor, top_k: int) -> Tensor:
    """`sampling.sample`, its twin, with top-k (1 is greedy) and min-p, in two kernels: logits [B, V] -> int64 [B].

    knobs float32 [3] as `SamplingParams.knobs`; seeds int64 [B] or [1], positions int64 [B].
    """
    return _sample(logits, knobs, seeds, positions, top_k)


@torch.library.custom_op("decode::advance_", mutates_args=("token", "position", "step", "out"))
def _advance_(tokens: Tensor, token: Tensor, position: Tensor, step: Tensor, out: Tensor) -> None:
    width = triton.next_power_of_2(len(tokens))
    _advance_kernel[(1,)](tokens, token, position, step, out, *out.shape, width, **_launch(out.device, 1))


def advance_(tokens: Tensor, token: Tensor, position: Tensor, step: Tensor, out: Tensor) -> None:
    """How a step ends, in place: tokens int64 [B] go into column step [1] of out [B, S] and, -1 as 0, into token
    [B, 1]; position [B, 1] and step advance by one.
    """
    if not supported(out.device) or len(tokens) > 1024:
        return advance_reference_(tokens, token, position, step, out)
    return _advance_(tokens, token, position, step, out)

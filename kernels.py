"""Triton kernels for decoding at the speed of the memory bus, each with an eager PyTorch twin.

Knows: how a matrix of 16-bit, int8 or int4 weights is streamed once for 1..16 rows of activations (`linear`), how new
tokens enter the cache and attend to the valid prefix of it (`decode_attention`), and how int4 weights lie in memory for
that (`pack_int4`). Refuses to know models, layers, files, and where weights come from. Imports without Triton: then
`supported` is False everywhere and the twins serve.

One idea carries both kernels: *fragments*. A warp of 32 lanes is addressed as 8 x 4 (`g`, `t`), the shape in which the
tensor cores' m16n8k16 instruction expects its operands. Every lane loads 16 contiguous bytes of K; which logical k they
are does not matter as long as weights and activations agree, so the k axis is permuted until the loaded registers *are*
the operand. Nothing passes through shared memory but one sum over the warps at the end, and 8 rows cost what 1 costs.
"""

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


def supported(device: torch.device) -> bool:
    """Whether the Triton kernels run on this device; elsewhere `linear` and `decode_attention` are their twins."""
    if triton is None:
        return False
    if interpreted():
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


# ---------------------------------------------------------------- int4 layout


def pack_int4(q: Tensor) -> Tensor:
    """int8 [..., N, K] with values -8..7 -> int32 [..., N/16, K/64, 128], both rounded up and padded with zeros.

    The last axis holds a 16 x 64 tile as 32 lanes (8 g, 4 t) x 4 words (2 c, 2 s): one 16-byte load per lane. The
    eight nibbles of a word, low to high (h, i, e):
    weight[16 a + 8 h + g, 64 b + 32 c + 8 t + 4 s + 2 i + e] + 8.
    """
    n, k = q.shape[-2:]
    q = F.pad(q, (0, -k % 64, 0, -n % 16)) + 8
    lead = q.shape[:-2]
    tiles = q.reshape(-1, q.shape[-2] // 16, 2, 8, q.shape[-1] // 64, 2, 4, 2, 2, 2)  # L, a, h, g, b, c, t, s, i, e
    nibbles = tiles.permute(0, 1, 4, 3, 6, 5, 7, 9, 8, 2).to(torch.uint8)  # L, a, b, g, t, c, s, e, i, h
    packed = (nibbles[..., 0] | nibbles[..., 1] << 4).flatten(3).contiguous().view(torch.int32)
    return packed.reshape(*lead, tiles.shape[1], tiles.shape[4], 128)


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of `pack_int4`, padding included: int32 [..., A, B, 128] -> int8 [..., 16 A, 64 B]."""
    *lead, a, b, _ = packed.shape
    pairs = packed.contiguous().view(torch.uint8).reshape(-1, a, b, 8, 4, 2, 2, 2, 2)  # L, a, b, g, t, c, s, e, i
    nibbles = torch.stack([pairs & 15, pairs >> 4], -1).to(torch.int8) - 8
    return nibbles.permute(0, 1, 9, 3, 2, 5, 4, 6, 8, 7).reshape(*lead, 16 * a, 64 * b)


# ---------------------------------------------------------------- eager twins


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight in float32 (Zhang & Sennrich 2019), returned in x's dtype."""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def dequantize(weight: Tensor, scale: Tensor | None, zero: Tensor | None, k: int, dtype: torch.dtype) -> Tensor:
    """The [..., N, K] matrix in `dtype` that a weight in any of `linear`'s formats stands for."""
    if scale is None:
        return weight.to(dtype)
    if weight.dtype == torch.int8:
        return (weight.float() * scale.float()[..., None]).to(dtype)
    n, groups = scale.shape[-2:]
    q = unpack_int4(weight)[..., :n, :k].float().unflatten(-1, (groups, k // groups))
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
    late = scale if weight.dtype == torch.int8 else None  # a per-channel scale is cheaper on the result
    w = weight.to(x.dtype) if late is not None else dequantize(weight, scale, zero, x.shape[-1], x.dtype)
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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding (Su et al. 2021) of x [..., Dh] by cos, sin [..., Dh/2], in float32."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


# ---------------------------------------------------------------- linear

if triton is not None:

    @triton.jit
    def _dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor, ASM: tl.constexpr) -> tl.tensor:
        """acc + a @ b, batched. The interpreter (not ASM) knows no bf16 product."""
        if not ASM:
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, acc)

    @triton.jit
    def _pair(
        words: tl.tensor, i: tl.constexpr, dtype: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr
    ) -> tl.tensor:
        """Two weights of every int32 word -> [..., 2] in `dtype`: 16 bit both; int8 bytes 2 i, + 1; int4 nibbles i, + 4.

        Integers take three or four instructions a pair: in the low mantissa bits of 128 (bf16) or 1024 (fp16) a number
        u reads 128 + u or 1024 + u, and one packed multiply-add takes the offset off, exactly (Kim et al. 2022).
        """
        if BITS < 16 and not ASM:  # the interpreter knows no assembly
            if BITS == 8:
                low, high = words << (24 - 16 * i) >> 24, words << (16 - 16 * i) >> 24
            else:
                low, high = ((words >> (4 * i)) & 15) - 8, ((words >> (4 * i + 16)) & 15) - 8
            return tl.join(low, high).to(tl.float32).to(dtype)
        BF: tl.constexpr = dtype == tl.bfloat16
        TYPE: tl.constexpr = "bf16x2" if BF else "f16x2"
        MAGIC: tl.constexpr = "0x43004300" if BF else "0x64006400"
        if BITS == 4:  # 128 + u, u = q + 8
            ONE: tl.constexpr = "0x3f803f80" if BF else "0x3c003c00"
            BIAS: tl.constexpr = "0xc308c308" if BF else "0xe408e408"
            words = tl.inline_asm_elementwise(
                f"{{ .reg .b32 u, a, b; shr.u32 u, $1, {4 * i}; lop3.b32 u, u, 0x000f000f, {MAGIC}, 0xea;"
                f"mov.b32 a, {ONE}; mov.b32 b, {BIAS}; fma.rn.{TYPE} $0, u, a, b; }}",
                "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        if BITS == 8:  # (128 + low 7 bits) - (128 or, with the sign bit, 256)
            MINUS: tl.constexpr = "0xbf80bf80" if BF else "0xbc00bc00"
            BYTES: tl.constexpr = 0x4140 + 0x202 * i
            words = tl.inline_asm_elementwise(
                f"{{ .reg .b32 u, s, a; prmt.b32 u, $1, 0, {BYTES}; lop3.b32 s, u, 0x00800080, {MAGIC}, 0xea;"
                f"lop3.b32 u, u, 0x007f007f, {MAGIC}, 0xea; mov.b32 a, {MINUS}; fma.rn.{TYPE} $0, s, a, u; }}",
                "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        low = words.to(tl.int16).to(dtype, bitcast=True)
        return tl.join(low, (words >> 16).to(tl.int16).to(dtype, bitcast=True))

    @triton.jit
    def _load_weights(
        ptr: tl.tensor, it: tl.tensor, row_step: tl.tensor, rows_left: tl.tensor, SILU: tl.constexpr, K: tl.constexpr,
        BITS: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, MASK: tl.constexpr,
    ) -> tl.tensor:  # fmt: skip
        """Piece `it` of TILES x 16 rows, WARPS * CHUNKS chunks of k wide; tile r starts at row r * row_step.

        int32 [4 t, 8 g, WARPS, CHUNKS, TILES, H, 4 words]: H = 2 halves of 8 rows, but 1 for int4, whose words hold both.
        Triton deals lanes, then warps, to the axes in this order, after the last one.
        """
        t = tl.arange(0, 4)[:, None, None, None, None, None, None]
        g = tl.arange(0, 8)[:, None, None, None, None, None]
        w = it * WARPS + tl.arange(0, WARPS)[:, None, None, None, None]
        c = w * CHUNKS + tl.arange(0, CHUNKS)[:, None, None, None]
        r = tl.arange(0, TILES)[:, None, None]
        NEXT: tl.constexpr = 0 if SILU else 16  # gates and ups end together
        if BITS == 4:
            BLOCKS: tl.constexpr = (K + 63) // 64
            offset = (r * (row_step // 16) * BLOCKS + c) * 128 + (g * 4 + t) * 4 + tl.arange(0, 4)[None]
            mask = (c < BLOCKS) & (r * NEXT < rows_left)
        else:
            WORDS: tl.constexpr = K * BITS // 32
            row = tl.arange(0, 2)[:, None] * 8 + g
            k = (c * 4 + t) * 4
            offset = (r * row_step + row) * WORDS + k + tl.arange(0, 4)
            mask = (k < WORDS) & (r * NEXT + row < rows_left)
        if MASK:
            return tl.load(ptr + offset, mask, 0, eviction_policy="evict_first")
        return tl.load(ptr + offset, eviction_policy="evict_first")

    @triton.jit
    def _weight_operand(
        words: tl.tensor, dtype: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr,
        WARPS: tl.constexpr, PARTS: tl.constexpr, ASM: tl.constexpr,
    ) -> tl.tensor:  # fmt: skip
        """What `_load_weights` returned -> [PARTS * WARPS, TILES * 16, k of one part] in `dtype`, registers unmoved."""
        q = _pair(words, 0, dtype, BITS, ASM)
        if BITS == 4:  # join appends h, then the two pairs of four k; axes t, g, warp, chunk, r, (c, s), e, h, i
            q = tl.join(q, _pair(words, 1, dtype, BITS, ASM))
            q = tl.join(q, tl.join(_pair(words, 2, dtype, BITS, ASM), _pair(words, 3, dtype, BITS, ASM)))
            q = q.reshape(4, 8, WARPS, CHUNKS, TILES, 2, 2, 2, 2, 2).permute(3, 5, 2, 4, 8, 1, 6, 0, 9, 7)
        elif BITS == 8:  # t, g, warp, chunk, r, h, step, e, i
            q = tl.join(q, _pair(words, 1, dtype, BITS, ASM)).permute(3, 2, 4, 5, 1, 6, 0, 8, 7)
        else:  # t, g, warp, chunk, r, h, (step, i), e
            q = q.reshape(4, 8, WARPS, CHUNKS, TILES, 2, 2, 2, 2).permute(3, 2, 4, 5, 1, 6, 0, 7, 8)
        SPAN: tl.constexpr = CHUNKS * (32 if BITS == 16 else 64)
        WIDTH: tl.constexpr = 64 if BITS == 8 else 32  # k of a chunk of `_load_rows`
        q = q.reshape(PARTS, SPAN // WIDTH // PARTS, WARPS, TILES * 16, WIDTH).permute(0, 2, 3, 1, 4)
        return q.reshape(PARTS * WARPS, TILES * 16, SPAN // PARTS)

    @triton.jit
    def _load_rows(
        ptr: tl.tensor, it: tl.tensor, rows: tl.tensor, stride: tl.tensor, K: tl.constexpr, E: tl.constexpr,
        ROWS: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
    ) -> tl.tensor:  # fmt: skip
        """Piece `it` of `rows` rows of activations -> [4 t, 8 n, WARPS, CHUNKS, ROWS/8, E/8, 8]."""
        t = tl.arange(0, 4)[:, None, None, None, None, None, None] * E
        n = tl.arange(0, ROWS // 8)[:, None, None] * 8 + tl.arange(0, 8)[:, None, None, None, None, None]
        w = it * WARPS + tl.arange(0, WARPS)[:, None, None, None, None]
        k = (w * CHUNKS + tl.arange(0, CHUNKS)[:, None, None, None]) * (4 * E) + t + tl.arange(0, E // 8)[:, None] * 8
        return tl.load(ptr + n * stride + k + tl.arange(0, 8), (n < rows) & (k < K), 0)

    @triton.jit
    def _rows_operand(
        x: tl.tensor, E: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
        PARTS: tl.constexpr,
    ) -> tl.tensor:  # fmt: skip
        """What `_load_rows` returned -> [PARTS * WARPS, k of one part, ROWS], registers unmoved."""
        x = x.reshape(4, 8, WARPS, PARTS, CHUNKS // PARTS, ROWS // 8, E // PACK, PACK).permute(3, 2, 4, 6, 0, 7, 5, 1)
        return x.reshape(PARTS * WARPS, CHUNKS // PARTS * 4 * E, ROWS)

    @triton.jit
    def _linear_kernel(
        x_ptr: tl.tensor, w_ptr: tl.tensor, scale_ptr: tl.tensor, zero_ptr: tl.tensor, bias_ptr: tl.tensor,
        norm_ptr: tl.tensor, residual_ptr: tl.tensor, experts_ptr: tl.tensor, out_ptr: tl.tensor, rows: tl.tensor,
        eps: tl.tensor, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
        SILU: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
        PDL: tl.constexpr, ASM: tl.constexpr,
    ) -> None:  # fmt: skip
        """TILES x 16 outputs (with SILU: 16 gates and their 16 ups) of all rows; the warps share K among them."""
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        E: tl.constexpr = 16 if BITS == 8 else 8
        PACK: tl.constexpr = 4  # k in a row per lane: how Triton lays operands out that come from a join
        SPAN: tl.constexpr = CHUNKS * (32 if BITS == 16 else 64)  # k of one warp in one piece
        X_CHUNKS: tl.constexpr = SPAN // (4 * E)
        PARTS: tl.constexpr = SPAN // GROUP if GROUP < SPAN else 1  # partial sums with a scale of their own
        PIECES: tl.constexpr = (K + WARPS * SPAN - 1) // (WARPS * SPAN)
        OUT: tl.constexpr = N // 2 if SILU else N
        BLOCK: tl.constexpr = 16 if SILU else 16 * TILES
        MASK: tl.constexpr = K % (WARPS * SPAN) != 0 or OUT % BLOCK != 0
        row_step = OUT if SILU else 16
        start = tl.program_id(0) * BLOCK
        rows_left = OUT - start
        if experts_ptr is not None:  # one row per program, with a matrix of its own, known only after the wait
            m = tl.program_id(1)
            if PDL:
                gdc_wait()
            expert = tl.load(experts_ptr + m)
            x_ptr += m * K
            out_ptr += m * OUT
            residual_ptr = residual_ptr if residual_ptr is None else residual_ptr + m * OUT
            w_ptr += expert * (((N + 15) // 16) * ((K + 63) // 64) * 128 if BITS == 4 else N * (K * BITS // 32))
            scale_ptr = scale_ptr if scale_ptr is None else scale_ptr + expert * N * (K // GROUP)
            zero_ptr = zero_ptr if zero_ptr is None else zero_ptr + expert * N * (K // GROUP)
            rows = 1
        w_ptr += start.to(tl.int64) * ((K + 63) // 64 * 8 if BITS == 4 else K * BITS // 32)
        raw = _load_weights(w_ptr, 0, row_step, rows_left, SILU, K, BITS, TILES, CHUNKS, WARPS, MASK)
        if PDL:  # the first weights are on their way: now wait for the activations, then let the next kernel start
            gdc_wait()
            gdc_launch_dependents()
        r = tl.arange(0, TILES * 16)
        row = start + (r // 16) * row_step + r % 16
        row_valid = (r if not SILU else r % 16) < rows_left
        acc = tl.zeros([WARPS, TILES * 16, ROWS], tl.float32)
        gram = tl.zeros([PARTS * WARPS, 16, ROWS], tl.float32)
        for it in range(PIECES):
            x = _load_rows(x_ptr, it, rows, K, K, E, ROWS, X_CHUNKS, WARPS)
            if norm_ptr is not None:
                # the sums of squares are the diagonal of x x^T: one more matrix instruction, and 1/rms comes last
                both = tl.broadcast_to(x, [4, 8, WARPS, X_CHUNKS, 2, E // 8, 8])
                both = both.reshape(4, 8, WARPS, PARTS, X_CHUNKS // PARTS, 2, E // 2, 2).permute(3, 2, 5, 1, 4, 6, 0, 7)
                both = both.reshape(PARTS * WARPS, 16, SPAN // PARTS)
                gram = _dot(both, _rows_operand(x, E, 2, ROWS, X_CHUNKS, WARPS, PARTS), gram, ASM)
                gain = _load_rows(norm_ptr, it, ROWS, 0, K, E, ROWS, X_CHUNKS, WARPS)
                x = (x.to(tl.float32) * gain.to(tl.float32)).to(dtype)
            b = _rows_operand(x, E, PACK, ROWS, X_CHUNKS, WARPS, PARTS)
            a = _weight_operand(raw, dtype, BITS, TILES, CHUNKS, WARPS, PARTS, ASM)
            if it + 1 < PIECES:
                raw = _load_weights(w_ptr, it + 1, row_step, rows_left, SILU, K, BITS, TILES, CHUNKS, WARPS, MASK)
            if BITS == 4 and (GROUP < K or zero_ptr is not None):
                partial = _dot(a, b, tl.zeros([PARTS * WARPS, TILES * 16, ROWS], tl.float32), ASM)
                p = tl.arange(0, PARTS)[:, None, None]
                first = (it * WARPS + tl.arange(0, WARPS)[:, None]) * SPAN + p * (SPAN // PARTS)
                index = row * (K // GROUP) + first // GROUP
                valid = row_valid & (first < K)
                scale = tl.load(scale_ptr + index, valid, 0).to(tl.float32).reshape(PARTS * WARPS, TILES * 16, 1)
                if zero_ptr is not None:
                    zero = tl.load(zero_ptr + index, valid, 0).to(tl.float32).reshape(PARTS * WARPS, TILES * 16, 1)
                    ones = tl.full(a.shape, 1, tl.float32).to(dtype)
                    partial -= zero * _dot(ones, b, tl.zeros(partial.shape, tl.float32), ASM)
                acc += tl.sum((partial * scale).reshape(PARTS, WARPS, TILES * 16, ROWS), 0)
            else:
                acc = _dot(a, b, acc, ASM)
        y = tl.sum(acc, 0)
        if norm_ptr is not None:
            diagonal = tl.arange(0, 16)[:, None] == tl.arange(0, ROWS)
            squares = tl.sum(tl.where(diagonal, tl.sum(gram, 0), 0.0), 0)
            y *= tl.rsqrt(squares / K + eps)
        if BITS == 8 or (BITS == 4 and GROUP == K and zero_ptr is None):
            y *= tl.load(scale_ptr + row, row_valid, 0).to(tl.float32)[:, None]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + row, row_valid, 0).to(tl.float32)[:, None]
        if SILU:
            gate, up = tl.split(y.reshape(2, 16, ROWS).permute(1, 2, 0))
            y = gate / (1 + tl.exp(-gate)) * up
        n = start + tl.arange(0, BLOCK)[:, None]
        m = tl.arange(0, ROWS)
        valid = (n < OUT) & (m < rows)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + m * OUT + n, valid, 0).to(tl.float32)
        tl.store(out_ptr + m * OUT + n, y.to(dtype), valid)


def _tile(bits: int, n: int, k: int, silu_mul: bool) -> tuple[int, int, int]:
    """(row tiles, chunks, warps) of `_linear_kernel` for a matrix: measured on one H200, benchmarks/NOTES.md."""
    chunk = 32 if bits == 16 else 64
    chunks = 4 if bits == 16 else 2
    tiles = 2 if silu_mul or (bits == 4 and n >= 8192) else 1
    warps = 8
    while warps > 1 and warps * chunks * chunk > k:
        warps //= 2
    return tiles, chunks, warps


def _group_size(weight: Tensor, scale: Tensor | None, k: int) -> int:
    return k if scale is None or weight.dtype == torch.int8 else k // scale.shape[-1]


def _fits(x: Tensor, weight: Tensor, scale: Tensor | None, silu_mul: bool, bias: Tensor | None) -> bool:
    """Whether `_linear_kernel` covers these formats and shapes; the twin takes the rest."""
    k = x.shape[-1]
    if x.dtype not in (torch.bfloat16, torch.float16) or x.shape[0] > MAX_ROWS or (bias is not None and bias.dim() > 1):
        return False
    if weight.dtype == torch.int32:
        assert scale is not None
        group = _group_size(weight, scale, k)
        aligned = not silu_mul or scale.shape[-2] % 32 == 0
        return k % 32 == 0 and aligned and group >= 32 and (group == k or group & (group - 1) == 0)
    return k % (16 if weight.dtype == torch.int8 else 8) == 0 and weight.dtype in (x.dtype, torch.int8)


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
    bits = {torch.int32: 4, torch.int8: 8}.get(weight.dtype, 16)
    n = weight.shape[-2] if scale is None else scale.shape[-2 if bits == 4 else -1]
    n_out = n // 2 if silu_mul else n
    out = torch.empty(rows, n_out, dtype=x.dtype, device=x.device)
    tiles, chunks, warps = _tile(bits, n, k, silu_mul)
    grid = (triton.cdiv(n_out, 16 if silu_mul else 16 * tiles), 1 if experts is None else rows)
    row_block = 8 if rows <= 8 or experts is not None else 16
    _linear_kernel[grid](
        x, weight.view(torch.int32), scale, zero, bias, norm_weight, residual, experts, out, rows, eps, n, k,
        _group_size(weight, scale, k), bits, silu_mul, row_block, tiles, chunks, warps, **_launch(x.device, warps),
    )  # fmt: skip
    return out


@_linear.register_fake
def _linear_shape(
    x: Tensor, weight: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None,
    norm_weight: Tensor | None, eps: float, residual: Tensor | None, silu_mul: bool, experts: Tensor | None,
) -> Tensor:  # fmt: skip
    n = weight.shape[-2] if scale is None else scale.shape[-2 if weight.dtype == torch.int32 else -1]
    return x.new_empty(x.shape[0], n // 2 if silu_mul else n)


def _launch(device: torch.device, warps: int) -> dict[str, bool | int]:
    """Launch options: programmatic dependent launch from sm90 on, inline assembly wherever there is a GPU."""
    if interpreted():
        return {"PDL": False, "ASM": False, "num_warps": warps}
    pdl = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": pdl, "ASM": True, "num_warps": warps, "num_stages": 1, "launch_pdl": pdl}


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

    weight: [N, K] in x's dtype; int8 [N, K] with scale [N]; or int4 from `pack_int4` with scale [N, G], G = K / group,
    and zero [N, G] (float; None when symmetric): w = (q - zero) * scale. With experts (int64 [M]) weight, scale and
    zero have a leading E, and row m uses matrix experts[m].
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
    def _load_rotated(
        ptr: tl.tensor, row: tl.tensor, valid: tl.tensor, norm_ptr: tl.tensor, cos_ptr: tl.tensor,
        sin_ptr: tl.tensor, token: tl.tensor, d: tl.tensor, eps: tl.tensor, DIM: tl.constexpr, STRIDE: tl.constexpr,
    ) -> tl.tensor:  # fmt: skip
        """RMSNorm (optional) and half-split rotary embedding of heads at ptr + row, columns d -> float32 [rows, d]."""
        HALF: tl.constexpr = DIM // 2
        other = tl.where(d < HALF, d + HALF, d - HALF)
        valid = valid[:, None] & (d < DIM)
        x = tl.load(ptr + row[:, None] + d, valid, 0).to(tl.float32)
        y = tl.load(ptr + row[:, None] + other, valid, 0).to(tl.float32)
        if norm_ptr is not None:
            scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
            x *= scale * tl.load(norm_ptr + d, d < DIM, 0).to(tl.float32)
            y *= scale * tl.load(norm_ptr + other, d < DIM, 0).to(tl.float32)
        angle = token[:, None] * HALF + d % HALF
        cos, sin = tl.load(cos_ptr + angle, valid, 0), tl.load(sin_ptr + angle, valid, 0)
        return x * cos + tl.where(d < HALF, -y, y) * sin

    @triton.jit
    def _attention_kernel(
        qkv_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, pos_ptr: tl.tensor, k_ptr: tl.tensor,
        v_ptr: tl.tensor, q_norm_ptr: tl.tensor, k_norm_ptr: tl.tensor, out_ptr: tl.tensor, part_ptr: tl.tensor,
        eps: tl.tensor, scale: tl.tensor, slots: tl.tensor, T: tl.constexpr, HEADS: tl.constexpr,
        KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
        ROWS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
    ) -> None:  # fmt: skip
        """One split of the prefix for all query heads of one KV head; every warp walks slots of its own."""
        dtype: tl.constexpr = qkv_ptr.dtype.element_ty
        GROUP: tl.constexpr = HEADS // KV_HEADS
        STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
        STEP: tl.constexpr = 16 * WARPS  # slots per iteration
        bh = tl.program_id(0)
        split = tl.program_id(1)
        b = bh // KV_HEADS
        head = bh % KV_HEADS
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        first = tl.load(pos_ptr + b * T)
        k_ptr += bh.to(tl.int64) * slots * DIM
        v_ptr += bh.to(tl.int64) * slots * DIM

        # columns in the order of the tensor cores' operand: j = (c, s 4, t 4, e 2) -> d = 32 c + 8 t + 2 s + e
        j = tl.arange(0, WIDTH)
        d = j // 32 * 32 + j // 2 % 4 * 8 + j // 8 % 4 * 2 + j % 2
        r = tl.arange(0, ROWS)
        token = b * T + r // GROUP
        row_valid = r < T * GROUP
        q = _load_rotated(qkv_ptr, token * STRIDE + (head * GROUP + r % GROUP) * DIM, row_valid, q_norm_ptr, cos_ptr,
                          sin_ptr, token, d, eps, DIM, STRIDE)  # fmt: skip
        q = tl.broadcast_to((q * scale).to(dtype)[None], [WARPS, ROWS, WIDTH])

        begin = 0 if WINDOW == 0 else tl.maximum(first - WINDOW + 1, 0)
        share = tl.cdiv(tl.cdiv(first - begin, SPLITS), STEP) * STEP
        begin += split * share
        end = tl.minimum(begin + share, first)
        steps = tl.maximum(tl.cdiv(end - begin, STEP), 0)
        if split == 0:  # this one writes the new tokens' k and v and attends to them in one more step
            n = tl.arange(0, 16)
            token = b * T + n
            source = token * STRIDE + (HEADS + head) * DIM
            new = (n < T)[:, None] & (j < DIM)
            k = _load_rotated(qkv_ptr, source, n < T, k_norm_ptr, cos_ptr, sin_ptr, token, j, eps, DIM, STRIDE)
            v = tl.load(qkv_ptr + source[:, None] + KV_HEADS * DIM + j, new, 0)
            slot = tl.load(pos_ptr + token, n < T, 0)[:, None] * DIM + j
            tl.store(k_ptr + slot, k.to(k_ptr.dtype.element_ty), new)
            tl.store(v_ptr + slot, v.to(v_ptr.dtype.element_ty), new)
            tl.debug_barrier()

        # K as [4 t, 8 g, warp, c, 2 h, 8 e]: slot 8 h + g of the warp's 16, d = 32 c + 8 t + e
        # V as [4 t, 8 g, warp, 2 h, 2 i, c, 8 e]: slot 8 h + 2 t + i, d = 64 c + 8 g + e
        e = tl.arange(0, 8)
        w = tl.arange(0, WARPS)[:, None, None, None] * 16
        k_slot = w + tl.arange(0, 2)[:, None] * 8 + tl.arange(0, 8)[:, None, None, None, None]
        k_d = tl.arange(0, WIDTH // 32)[:, None, None] * 32 + tl.arange(0, 4)[:, None, None, None, None, None] * 8
        v_slot = tl.arange(0, 2)[:, None, None, None] * 8 + tl.arange(0, 2)[:, None, None]
        v_slot += w[:, None] + tl.arange(0, 4)[:, None, None, None, None, None, None] * 2
        v_d = tl.arange(0, WIDTH // 64)[:, None] * 64 + tl.arange(0, 8)[:, None, None, None, None, None] * 8
        m = tl.full([WARPS, ROWS], -1e30, tl.float32)
        total = tl.zeros([WARPS, ROWS], tl.float32)
        acc = tl.zeros([WARPS, ROWS, WIDTH], tl.float32)
        i = 0
        while i < steps + (split == 0).to(tl.int32):  # not range(): the interpreter cannot on a loaded bound
            base = tl.where(i < steps, begin + i * STEP, first)
            limit = tl.where(i < steps, end, first + T)
            k = tl.load(k_ptr + (base + k_slot) * DIM + k_d + e, (base + k_slot < limit) & (k_d < DIM), 0)
            v = tl.load(v_ptr + (base + v_slot) * DIM + v_d + e, (base + v_slot < limit) & (v_d < DIM), 0)
            k = k.to(dtype).reshape(4, 8, WARPS, WIDTH // 32, 2, 4, 2).permute(2, 3, 5, 0, 6, 4, 1)
            s = _dot(q, k.reshape(WARPS, WIDTH, 16), tl.zeros([WARPS, ROWS, 16], tl.float32), ASM)
            slot = base + tl.arange(0, WARPS)[:, None, None] * 16 + tl.arange(0, 16)
            last = first + (r // GROUP)[:, None]
            seen = (slot < limit) & (slot <= last) & ((WINDOW == 0) | (slot > last - WINDOW))
            s = tl.where(seen, s, -1e30)
            top = tl.maximum(m, tl.max(s, 2))
            p = tl.where(seen, tl.exp2(s - top[:, :, None]), 0.0)
            fade = tl.exp2(m - top)
            total = total * fade + tl.sum(p, 2)
            v = v.to(dtype).permute(2, 3, 0, 4, 5, 6, 1).reshape(WARPS, 16, WIDTH)  # d = (block, e, g)
            acc = _dot(p.to(dtype), v, acc * fade[:, :, None], ASM)
            m = top
            i += 1
        top = tl.max(m, 0)
        fade = tl.exp2(m - top[None])
        total = tl.sum(total * fade, 0)
        out = tl.sum(acc * fade[:, :, None], 0)
        d = j // 64 * 64 + j % 8 * 8 + j // 8 % 8
        if SPLITS == 1:
            where = (b * T + r // GROUP) * (HEADS * DIM) + (head * GROUP + r % GROUP) * DIM
            out = (out / total[:, None]).to(dtype)
            tl.store(out_ptr + where[:, None] + d, out, row_valid[:, None] & (d < DIM))
        else:
            where = (bh * SPLITS + split) * ROWS + r
            tl.store(part_ptr + where[:, None] * (WIDTH + 2) + 2 + d, out, row_valid[:, None])
            tl.store(part_ptr + where * (WIDTH + 2), top, row_valid)
            tl.store(part_ptr + where * (WIDTH + 2) + 1, total, row_valid)

    @triton.jit
    def _combine_kernel(
        part_ptr: tl.tensor, out_ptr: tl.tensor, T: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
        DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
        ASM: tl.constexpr,
    ) -> None:  # fmt: skip
        """Joins the splits of one token and head (Dao et al. 2023, flash-decoding)."""
        GROUP: tl.constexpr = HEADS // KV_HEADS
        token = tl.program_id(0)
        head = tl.program_id(1)
        row = token % T * GROUP + head % GROUP
        split = tl.arange(0, triton.next_power_of_2(SPLITS))
        where = (((token // T) * KV_HEADS + head // GROUP) * SPLITS + split) * ROWS + row
        d = tl.arange(0, WIDTH)
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        top = tl.load(part_ptr + where * (WIDTH + 2), split < SPLITS, -1e30)
        weight = tl.exp2(top - tl.max(top, 0))
        total = tl.sum(tl.load(part_ptr + where * (WIDTH + 2) + 1, split < SPLITS, 0) * weight, 0)
        x = tl.load(part_ptr + where[:, None] * (WIDTH + 2) + 2 + d, (split < SPLITS)[:, None], 0)
        out = tl.sum(x * weight[:, None], 0) / total
        tl.store(out_ptr + (token * HEADS + head) * DIM + d, out.to(out_ptr.dtype.element_ty), d < DIM)


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
    heads = qkv.shape[1] // dim - 2 * kv_heads
    width = max(64, triton.next_power_of_2(dim))
    rows = max(16, triton.next_power_of_2(t * heads // kv_heads))
    warps = 4
    splits = max(1, min(triton.cdiv(264, b * kv_heads), triton.cdiv(slots, 256), 64))
    out = torch.empty(b * t, heads * dim, dtype=qkv.dtype, device=qkv.device)
    part = None
    if splits > 1:
        part = torch.empty(b * kv_heads * splits * rows * (width + 2), dtype=torch.float32, device=qkv.device)
    launch = _launch(qkv.device, warps)
    scale = dim**-0.5 * 1.4426950408889634  # exp(x) = exp2(x log2(e))
    _attention_kernel[(b * kv_heads, splits)](
        qkv, cos, sin, positions, k_cache, v_cache, q_norm, k_norm, out, part, eps, scale, slots, t, heads, kv_heads,
        dim, width, window, splits, rows, warps, **launch,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(b * t, heads)](part, out, t, heads, kv_heads, dim, width, splits, rows, **launch)
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
    if not supported(qkv.device) or not fits:
        return decode_attention_reference(qkv, cos, sin, positions, k_cache, v_cache, q_norm, k_norm, eps, window)
    qkv, cos, sin, positions = (x.contiguous() for x in (qkv, cos, sin, positions))
    return _attention(qkv, cos, sin, positions, k_cache, v_cache, q_norm, k_norm, eps, window)

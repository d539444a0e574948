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


@torch.compiler.assume_constant_result  # a question to the driver has no place in a graph
def supported(device: torch.device) -> bool:
    """Whether the Triton kernels run on this device; elsewhere `linear` and `decode_attention` are their twins."""
    if triton is None:
        return False
    if interpreted():
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


# ---------------------------------------------------------------- int4 layout


def pack_int4(q: Tensor) -> Tensor:
    """int8 [..., N, K] with values -8..7 -> int32 [..., N, K/8], K rounded up to a multiple of 128 with zeros.

    Word 4 t + c of a block of 128 k holds k = 32 c + 8 t + (0..7), so that lane t of four loads with its 16 bytes one
    word of every group of 32. The nibbles of a word, low to high (e, i) = (0, 0), (0, 1), .. (1, 3), are
    k = 2 i + e of those eight, plus 8: `_pair` takes i and i + 4 at once.
    """
    k = q.shape[-1]
    words = (F.pad(q, (0, -k % 128)) + 8).unflatten(-1, (-1, 4, 4, 4, 2))  # block, c, t, i, e
    nibbles = words.transpose(-4, -3).transpose(-2, -1).flatten(-2).to(torch.uint8)
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).flatten(-4).view(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of `pack_int4`, padding included: int32 [..., N, K/8] -> int8 [..., N, K]."""
    pairs = packed.view(torch.uint8).unflatten(-1, (-1, 4, 4, 4))  # block, t, c, bytes
    nibbles = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2).unflatten(-1, (2, 4))  # e, i
    return nibbles.transpose(-2, -1).transpose(-4, -3).flatten(-5).to(torch.int8) - 8


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
    groups = scale.shape[-1]
    q = unpack_int4(weight)[..., :k].float().unflatten(-1, (groups, k // groups))
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
        """Two weights of every int32 word -> [..., 2] in `dtype`: both; int8 bytes 2 i, 2 i + 1; int4 nibbles i, i + 4.

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
        base: tl.tensor, words_left: tl.tensor, live: tl.tensor, TILE_PITCH: tl.constexpr, HALF_PITCH: tl.constexpr,
        TILES: tl.constexpr, EVEN: tl.constexpr,
    ) -> tl.tensor:  # fmt: skip
        """A chunk: 64 bytes of every row of the tiles, as int32 [4 t, 8 g, WARPS, TILES, 2 h, 4 words].

        base points at tile 0, h = 0 for [4, 8, WARPS, 1, 1, 1]; Triton deals lanes, then warps, to the axes in this
        order, after the last one. The other axes are constants, added last: immediate offsets of one address.
        """
        tiles = tl.arange(0, TILES)[:, None, None] * TILE_PITCH
        where = base + (tiles + tl.arange(0, 2)[:, None] * HALF_PITCH + tl.arange(0, 4))[None, None, None]
        if EVEN:
            return tl.load(where, live, eviction_policy="evict_first")
        return tl.load(where, live & (words_left > 0), 0, eviction_policy="evict_first")

    @triton.jit
    def _load_scales(base: tl.tensor, k: tl.tensor, valid: tl.tensor, K: tl.constexpr, GROUP: tl.constexpr,
                     PARTS: tl.constexpr) -> tl.tensor:  # fmt: skip
        """The groups' scales (or zeros) of a chunk at k: [4 t (all equal), 8 g, WARPS, TILES, 2 h, PARTS]."""
        k = k + tl.arange(0, PARTS) * (128 // PARTS)
        return tl.load(base + k // GROUP, valid & (k < K), 0)

    @triton.jit
    def _scaled(partial: tl.tensor, scale: tl.tensor) -> tl.tensor:
        """partial [PARTS * WARPS, rows, tokens] times what `_load_scales` returned."""
        B: tl.constexpr = partial.shape[0]
        R: tl.constexpr = partial.shape[1]
        T: tl.constexpr = partial.shape[2]
        scale = scale.to(tl.float32).permute(5, 2, 3, 4, 1, 0).reshape(B, R, 1, 4, 1)
        return (partial.reshape(B, R, T // 8, 4, 2) * scale).reshape(B, R, T)

    @triton.jit
    def _weight_operand(
        words: tl.tensor, dtype: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, ASM: tl.constexpr
    ) -> tl.tensor:
        """What `_load_weights` returned -> [PARTS * WARPS, TILES * 16, k of one part] in `dtype`, registers unmoved."""
        WARPS: tl.constexpr = words.shape[2]
        ROWS: tl.constexpr = words.shape[3] * 16
        q = _pair(words, 0, dtype, BITS, ASM)
        if BITS == 16:  # t, g, warp, tile, h, step, i, e
            q = q.reshape(4, 8, WARPS, ROWS // 16, 2, 2, 2, 2).permute(2, 3, 4, 1, 5, 0, 6, 7)
        else:  # t, g, warp, tile, h, word, e, i
            q = tl.join(q, _pair(words, 1, dtype, BITS, ASM))
            if BITS == 8:
                q = q.permute(2, 3, 4, 1, 5, 0, 7, 6)
            else:  # and step; a word of every lane makes 32 k of one group
                q = tl.join(q, tl.join(_pair(words, 2, dtype, BITS, ASM), _pair(words, 3, dtype, BITS, ASM)))
                q = q.permute(5, 2, 3, 4, 1, 8, 0, 7, 6).reshape(PARTS, 4 // PARTS, WARPS, ROWS, 32)
                q = q.permute(0, 2, 3, 1, 4)
        return q.reshape(PARTS * WARPS, ROWS, 512 // BITS // PARTS)

    @triton.jit
    def _load_rows(
        base: tl.tensor, k_left: tl.tensor, valid: tl.tensor, BITS: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr
    ) -> tl.tensor:
        """The k of a weight chunk of 16-bit rows: int32 [4 t, 8 n, WARPS, units, ROWS/8, E/8, 4 words]."""
        E: tl.constexpr = 16 if BITS == 8 else 8  # k in a row of one lane
        unit = tl.arange(0, 128 // BITS // E)[:, None, None, None] * (4 * E) + tl.arange(0, E // 8)[:, None] * 8
        where = base + (unit // 2 + tl.arange(0, 4))[None, None, None]
        if EVEN:
            return tl.load(where, valid)
        return tl.load(where, valid & (unit < k_left), 0)

    @triton.jit
    def _rows_operand(
        words: tl.tensor, gain: tl.tensor, dtype: tl.constexpr, PARTS: tl.constexpr, ASM: tl.constexpr
    ) -> tl.tensor:
        """What `_load_rows` returned, times gain if any -> [PARTS * WARPS, k of one part, ROWS], registers unmoved."""
        WARPS: tl.constexpr = words.shape[2]
        UNITS: tl.constexpr = words.shape[3]
        ROWS: tl.constexpr = words.shape[4] * 8
        E: tl.constexpr = words.shape[5] * 8
        x = _pair(words, 0, dtype, 16, ASM)
        if gain is not None:
            x = (x.to(tl.float32) * _pair(gain, 0, dtype, 16, ASM).to(tl.float32)).to(dtype)
        x = x.reshape(4, 8, WARPS, PARTS, UNITS // PARTS, ROWS // 8, E // 4, 4).permute(3, 2, 4, 6, 0, 7, 5, 1)
        return x.reshape(PARTS * WARPS, UNITS // PARTS * 4 * E, ROWS)

    @triton.jit
    def _inverse_rms(
        x_ptr: tl.tensor, rows: tl.tensor, eps: tl.tensor, K: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr
    ) -> tl.tensor:
        """1 / sqrt(mean(x^2) + eps) of the M rows, [ROWS]; it scales the results, not the activations."""
        m = tl.arange(0, M)[:, None]
        squares = tl.zeros([M], tl.float32)
        for start in range(0, K, 4096 // M):
            k = start + tl.arange(0, 4096 // M)
            x = tl.load(x_ptr + m * K + k, (m < rows) & (k < K), 0).to(tl.float32)
            squares += tl.sum(x * x, 1)
        mine = tl.arange(0, ROWS)[:, None] == tl.arange(0, M)
        return tl.rsqrt(tl.sum(tl.where(mine, squares, 0.0), 1) / K + eps)

    @triton.jit
    def _linear_kernel(
        x_ptr: tl.tensor, w_ptr: tl.tensor, scale_ptr: tl.tensor, zero_ptr: tl.tensor, bias_ptr: tl.tensor,
        norm_ptr: tl.tensor, residual_ptr: tl.tensor, experts_ptr: tl.tensor, out_ptr: tl.tensor, rows: tl.tensor,
        eps: tl.tensor, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, SILU: tl.constexpr,
        M: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
        PDL: tl.constexpr, ASM: tl.constexpr,
    ) -> None:  # fmt: skip
        """TILES * 16 rows of the matrix; the warps share them in pieces of K."""
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        ROWS: tl.constexpr = 16 if M > 8 else 8
        CHUNK: tl.constexpr = 512 // BITS  # k of 64 bytes
        PARTS: tl.constexpr = 128 // GROUP if BITS == 4 and GROUP < 128 else 1  # of a chunk, with scales of their own
        PIECE: tl.constexpr = WARPS * CHUNKS * CHUNK
        PIECES: tl.constexpr = (K + PIECE - 1) // PIECE
        PITCH: tl.constexpr = (K + 127) // 128 * 16 if BITS == 4 else K * BITS // 32  # words of a row
        OUT: tl.constexpr = N // 2 if SILU else N
        BLOCK: tl.constexpr = TILES * (8 if SILU else 16)
        HALF: tl.constexpr = OUT if SILU else 8  # rows from the lower half of a tile (gates) to its upper half (ups)
        NEXT: tl.constexpr = 8 if SILU else 16  # rows from one tile to the next
        EVEN: tl.constexpr = K % PIECE == 0 and OUT % BLOCK == 0
        GROUPED: tl.constexpr = BITS == 4 and (GROUP < K or zero_ptr is not None)
        start = tl.program_id(0) * BLOCK
        if experts_ptr is not None:  # one row per program, with a matrix of its own, known only after the wait
            m = tl.program_id(1)
            if PDL:
                gdc_wait()
            expert = tl.load(experts_ptr + m)
            x_ptr += m * K
            out_ptr += m * OUT
            residual_ptr = residual_ptr if residual_ptr is None else residual_ptr + m * OUT
            w_ptr += expert * N * PITCH
            scale_ptr = scale_ptr if scale_ptr is None else scale_ptr + expert * N * (K // GROUP)
            zero_ptr = zero_ptr if zero_ptr is None else zero_ptr + expert * N * (K // GROUP)
            rows = 1
        t = tl.arange(0, 4)[:, None, None, None, None, None]
        g = tl.arange(0, 8)[:, None, None, None, None]
        w = tl.arange(0, WARPS)[:, None, None, None] * (CHUNKS * CHUNK)  # first k of a warp
        row = start + g + tl.arange(0, TILES)[:, None, None] * NEXT + tl.arange(0, 2)[:, None] * HALF + t * 0
        here = row < N
        left = tl.where(here, K - w - t * (CHUNK // 4), 0)  # of k, for a lane
        lane = w_ptr + (start + g).to(tl.int64) * PITCH + (w * BITS // 32 + t * 4)
        words, scales = tl.tuple([]), tl.tuple([])
        for c in tl.static_range(CHUNKS):
            words = words + (
                _load_weights(lane + c * 16, left - c * CHUNK, True, NEXT * PITCH, HALF * PITCH, TILES, EVEN),
            )
            if GROUPED:
                scales = scales + (_load_scales(scale_ptr + row * (K // GROUP), w + c * CHUNK, here, K, GROUP, PARTS),)
        if (
            PDL
        ):  # the first weights are on their way; activations are there after the wait; then the next kernel may start
            gdc_wait()
            gdc_launch_dependents()
        E: tl.constexpr = CHUNK // 4 if BITS > 4 else 8  # k in a row of a lane
        n = tl.arange(0, ROWS // 8)[:, None, None] * 8 + tl.arange(0, 8)[:, None, None, None, None, None]
        k = w[:, None] + tl.arange(0, 4)[:, None, None, None, None, None, None] * E
        known = n < rows
        x_lane = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + (n * K + k) // 2
        if norm_ptr is not None:
            norm_lane = norm_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + (n * 0 + k) // 2
        x, gains = tl.tuple([]), tl.tuple([])
        for c in tl.static_range(CHUNKS):
            x = x + (_load_rows(x_lane + c * CHUNK // 2, K - k - c * CHUNK, known, BITS, ROWS, EVEN),)
            if norm_ptr is not None:
                gains = gains + (_load_rows(norm_lane + c * CHUNK // 2, K - k - c * CHUNK, known, BITS, ROWS, EVEN),)
        if norm_ptr is not None:
            norm = _inverse_rms(x_ptr, rows, eps, K, M, ROWS)
        # what comes last is loaded now: at the end, every program would wait for the memory once more
        r = tl.arange(0, TILES * 16)
        r = start + r // 16 * NEXT + r // 8 % 2 * HALF + r % 8
        if BITS < 16 and not GROUPED:
            late = tl.load(scale_ptr + r, r < N, 0)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + r, r < N, 0)
        r = start + tl.arange(0, BLOCK)[:, None]
        m = tl.arange(0, ROWS)
        valid = (r < OUT) & (m < rows)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + m * OUT + r, valid, 0)
        acc = tl.zeros([WARPS, TILES * 16, ROWS], tl.float32)
        for it in range(PIECES):
            now, now_x, now_gains, now_scales = words, x, gains, scales
            words, x, gains, scales = tl.tuple([]), tl.tuple([]), tl.tuple([]), tl.tuple([])
            first = (it + 1) * PIECE
            more = it + 1 < PIECES
            for c in tl.static_range(CHUNKS):
                b = _rows_operand(now_x[c], now_gains[c] if norm_ptr is not None else None, dtype, PARTS, ASM)
                a = _weight_operand(now[c], dtype, BITS, PARTS, ASM)
                offset = first + c * CHUNK
                ahead = lane + (first * BITS // 32 + c * 16)
                words = words + (_load_weights(ahead, left - offset, more, NEXT * PITCH, HALF * PITCH, TILES, EVEN),)
                x = x + (_load_rows(x_lane + offset // 2, K - k - offset, known & more, BITS, ROWS, EVEN),)
                if norm_ptr is not None:
                    gain = _load_rows(norm_lane + offset // 2, K - k - offset, known & more, BITS, ROWS, EVEN)
                    gains = gains + (gain,)
                if GROUPED:
                    scale = _load_scales(scale_ptr + row * (K // GROUP), w + offset, here & more, K, GROUP, PARTS)
                    scales = scales + (scale,)
                    none = tl.zeros([PARTS * WARPS, TILES * 16, ROWS], tl.float32)
                    partial = _dot(a, b, none, ASM)
                    if zero_ptr is not None:
                        zero = _load_scales(zero_ptr + row * (K // GROUP), w + offset - PIECE, here, K, GROUP, PARTS)
                        ones = tl.full(a.shape, 1, tl.float32).to(dtype)
                        partial -= _scaled(_dot(ones, b, none, ASM), zero)
                    partial = _scaled(partial, now_scales[c])
                    acc += tl.sum(partial.reshape(PARTS, WARPS, TILES * 16, ROWS), 0)
                else:
                    acc = _dot(a, b, acc, ASM)
        y = tl.sum(acc, 0)
        if norm_ptr is not None:
            y *= norm
        if BITS < 16 and not GROUPED:
            y *= late.to(tl.float32)[:, None]
        if bias_ptr is not None:
            y += bias.to(tl.float32)[:, None]
        if SILU:
            gate, up = tl.split(y.reshape(TILES, 2, 8, ROWS).permute(0, 2, 3, 1))
            y = (gate / (1 + tl.exp(-gate)) * up).reshape(BLOCK, ROWS)
        if residual_ptr is not None:
            y += residual.to(tl.float32)
        tl.store(out_ptr + m * OUT + r, y.to(dtype), valid)


def _tile(bits: int, k: int, rows: int) -> tuple[int, int, int]:
    """(16-row tiles, chunks, warps) of `_linear_kernel`: 32 KB on their way to every program, 16 KB for many rows.

    One multiprocessor of an H200 needs about 64 KB on their way to run at the speed of the memory (NOTES.md). More
    chunks for more rows would not fit its registers, nor would more tiles.
    """
    chunks, warps = 4, 8
    if bits < 16 and rows > 8:  # registers
        chunks = bits // 4
    elif bits == 4 and k > warps * chunks * 128:  # more than one piece: the next one needs registers, too
        chunks = 2
    while warps > 1 and warps * chunks * 512 // bits > k:
        warps //= 2
    while chunks > 1 and chunks * 512 // bits > k:
        chunks //= 2
    return 1, chunks, warps


def _group_size(weight: Tensor, scale: Tensor | None, k: int) -> int:
    return k if scale is None or weight.dtype == torch.int8 else k // scale.shape[-1]


def _fits(x: Tensor, weight: Tensor, scale: Tensor | None, silu_mul: bool, bias: Tensor | None) -> bool:
    """Whether `_linear_kernel` covers these formats and shapes; the twin takes the rest."""
    k = x.shape[-1]
    if x.dtype not in (torch.bfloat16, torch.float16) or x.shape[0] > MAX_ROWS or (bias is not None and bias.dim() > 1):
        return False
    if weight.dtype == torch.int32:
        group = _group_size(weight, scale, k)
        return k % 8 == 0 and group >= 32 and (group == k or group & (group - 1) == 0)
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
    x, residual = x.contiguous(), residual if residual is None else residual.contiguous()
    bits = {torch.int32: 4, torch.int8: 8}.get(weight.dtype, 16)
    n = weight.shape[-2]
    n_out = n // 2 if silu_mul else n
    out = torch.empty(rows, n_out, dtype=x.dtype, device=x.device)
    tiles, chunks, warps = _tile(bits, k, 1 if experts is not None else rows)
    grid = (triton.cdiv(n_out, tiles * (8 if silu_mul else 16)), 1 if experts is None else rows)
    row_block = 1 if experts is not None else triton.next_power_of_2(rows)
    _linear_kernel[grid](
        x, weight.view(torch.int32), scale, zero, bias, norm_weight, residual, experts, out, rows, eps, n, k,
        _group_size(weight, scale, k), bits, silu_mul, row_block, tiles, chunks, warps,
        **_launch(x.device, warps, 128 if bits < 16 else None),
    )  # fmt: skip
    return out


@_linear.register_fake
def _linear_shape(
    x: Tensor, weight: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None,
    norm_weight: Tensor | None, eps: float, residual: Tensor | None, silu_mul: bool, experts: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], weight.shape[-2] // (2 if silu_mul else 1))


def _launch(device: torch.device, warps: int, registers: int | None = None) -> dict[str, bool | int | None]:
    """Launch options: programmatic dependent launch from sm90 on, inline assembly wherever there is a GPU."""
    if interpreted():
        return {"PDL": False, "ASM": False, "num_warps": warps}
    pdl = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": pdl, "ASM": True, "num_warps": warps, "num_stages": 1, "launch_pdl": pdl, "maxnreg": registers}


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
    def _rotated(
        ptr: tl.tensor, valid: tl.tensor, norm_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, token: tl.tensor,
        d: tl.tensor, DIM: tl.constexpr,
    ) -> tl.tensor:  # fmt: skip
        """Columns d of heads at ptr, times the norm's weight, rotated by half-split rotary embedding, in float32."""
        HALF: tl.constexpr = DIM // 2
        other = tl.where(d < HALF, d + HALF, d - HALF)
        x = tl.load(ptr + d, valid, 0).to(tl.float32)
        y = tl.load(ptr + other, valid, 0).to(tl.float32)
        if norm_ptr is not None:
            x *= tl.load(norm_ptr + d, d < DIM, 0).to(tl.float32)
            y *= tl.load(norm_ptr + other, d < DIM, 0).to(tl.float32)
        cos = tl.load(cos_ptr + token * HALF + d % HALF, valid, 0)
        sin = tl.load(sin_ptr + token * HALF + d % HALF, valid, 0)
        return x * cos + tl.where(d < HALF, -y, y) * sin

    @triton.jit
    def _head_rms(
        ptr: tl.tensor, valid: tl.tensor, norm_ptr: tl.tensor, eps: tl.tensor, DIM: tl.constexpr, WIDTH: tl.constexpr
    ) -> tl.tensor:
        """1 / rms of the heads at ptr [n], or ones when there is no norm."""
        if norm_ptr is None:
            return valid.to(tl.float32)
        d = tl.arange(0, WIDTH)
        x = tl.load(ptr[:, None] + d, valid[:, None] & (d < DIM), 0).to(tl.float32)
        return tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)

    @triton.jit
    def _attend(
        q: tl.tensor, k: tl.tensor, v: tl.tensor, seen: tl.tensor, m: tl.tensor, total: tl.tensor, acc: tl.tensor,
        ASM: tl.constexpr,
    ) -> tl.tensor:  # fmt: skip
        """One step of the online softmax: every warp adds its own 16 slots to its own sums."""
        WARPS: tl.constexpr = q.shape[0]
        WIDTH: tl.constexpr = q.shape[2]
        k = k.reshape(4, 8, WARPS, WIDTH // 32, 2, 4, 2).permute(2, 3, 5, 0, 6, 4, 1).reshape(WARPS, WIDTH, 16)
        s = tl.where(seen, _dot(q, k, tl.zeros([WARPS, 16, 16], tl.float32), ASM), -1e30)
        top = tl.maximum(m, tl.max(s, 2))
        p = tl.where(seen, tl.exp2(s - top[:, :, None]), 0.0)
        fade = tl.exp2(m - top)
        v = v.permute(2, 3, 0, 4, 5, 6, 1).reshape(WARPS, 16, WIDTH)  # d in the order c, e, g
        return top, total * fade + tl.sum(p, 2), _dot(p.to(q.dtype), v, acc * fade[:, :, None], ASM)

    @triton.jit
    def _attention_kernel(
        qkv_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, pos_ptr: tl.tensor, k_ptr: tl.tensor,
        v_ptr: tl.tensor, q_norm_ptr: tl.tensor, k_norm_ptr: tl.tensor, out_ptr: tl.tensor, part_ptr: tl.tensor,
        eps: tl.tensor, scale: tl.tensor, slots: tl.tensor, T: tl.constexpr, HEADS: tl.constexpr,
        KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
        ROWS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
    ) -> None:  # fmt: skip
        """One split of the prefix for 16 rows (query heads x tokens) of one KV head; every warp walks its own slots."""
        dtype: tl.constexpr = qkv_ptr.dtype.element_ty
        GROUP: tl.constexpr = HEADS // KV_HEADS
        STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
        STEP: tl.constexpr = 16 * WARPS  # slots per iteration
        bh = tl.program_id(0)
        split = tl.program_id(1)
        b = bh // KV_HEADS
        head = bh % KV_HEADS
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        first = tl.load(pos_ptr + b * T).to(tl.int32)
        k_ptr += bh.to(tl.int64) * slots * DIM
        v_ptr += bh.to(tl.int64) * slots * DIM
        begin = 0 if WINDOW == 0 else tl.maximum(first - WINDOW + 1, 0)
        share = tl.cdiv(tl.cdiv(first - begin, SPLITS), STEP) * STEP
        begin += split * share
        end = tl.minimum(begin + share, first)

        # columns in the order of the tensor cores' operand: j = (c, s 4, t 4, e 2) -> d = 32 c + 8 t + 2 s + e
        j = tl.arange(0, WIDTH)
        d = j // 32 * 32 + j // 2 % 4 * 8 + j // 8 % 4 * 2 + j % 2
        r = tl.program_id(2) * 16 + tl.arange(0, 16)
        token = b * T + r // GROUP
        at = qkv_ptr + token * STRIDE + (head * GROUP + r % GROUP) * DIM
        valid = r < T * GROUP
        q = _rotated(at[:, None], valid[:, None] & (d < DIM), q_norm_ptr, cos_ptr, sin_ptr, token[:, None], d, DIM)
        q *= _head_rms(at, valid, q_norm_ptr, eps, DIM, WIDTH)[:, None] * scale
        q = tl.broadcast_to(q.to(dtype)[None], [WARPS, 16, WIDTH])

        # K as [4 t, 8 g, warp, c, 2 h, 8 e]: slot 8 h + g of the warp's 16, d = 32 c + 8 t + e
        # V as [4 t, 8 g, warp, 2 h, 2 i, c, 8 e]: slot 8 h + 2 t + i, d = 64 c + 8 g + e
        e = tl.arange(0, 8)
        w = tl.arange(0, WARPS)[:, None, None, None] * 16
        k_slot = w + tl.arange(0, 2)[:, None] * 8 + tl.arange(0, 8)[:, None, None, None, None]
        k_d = tl.arange(0, WIDTH // 32)[:, None, None] * 32 + tl.arange(0, 4)[:, None, None, None, None, None] * 8
        v_slot = tl.arange(0, 2)[:, None, None, None] * 8 + tl.arange(0, 2)[:, None, None]
        v_slot += w[:, None] + tl.arange(0, 4)[:, None, None, None, None, None, None] * 2
        v_d = tl.arange(0, WIDTH // 64)[:, None] * 64 + tl.arange(0, 8)[:, None, None, None, None, None] * 8
        slot = tl.arange(0, WARPS)[:, None, None] * 16 + tl.arange(0, 16)
        row_token = (r // GROUP)[:, None]
        m = tl.full([WARPS, 16], -1e30, tl.float32)
        total = tl.zeros([WARPS, 16], tl.float32)
        acc = tl.zeros([WARPS, 16, WIDTH], tl.float32)
        if split == 0:  # the new tokens: into the cache, and attended to from there (by every block of rows alike)
            source = qkv_ptr + b * T * STRIDE + (HEADS + head) * DIM
            n = tl.arange(0, 16)
            rms = _head_rms(source + n * STRIDE, n < T, k_norm_ptr, eps, DIM, WIDTH)
            new = (n < T)[:, None] & (j < DIM)
            key = _rotated(source + n[:, None] * STRIDE, new, k_norm_ptr, cos_ptr, sin_ptr, b * T + n[:, None], j, DIM)
            key = (key * rms[:, None]).to(dtype)
            value = tl.load(source + n[:, None] * STRIDE + KV_HEADS * DIM + j, new, 0)
            into = tl.load(pos_ptr + b * T + n, n < T, 0)[:, None] * DIM + j
            tl.store(k_ptr + into, key.to(k_ptr.dtype.element_ty), new)
            tl.store(v_ptr + into, value.to(v_ptr.dtype.element_ty), new)
            tl.debug_barrier()
            k = tl.load(k_ptr + (first + k_slot) * DIM + k_d + e, (k_slot < T) & (k_d < DIM), 0).to(dtype)
            v = tl.load(v_ptr + (first + v_slot) * DIM + v_d + e, (v_slot < T) & (v_d < DIM), 0).to(dtype)
            seen = (slot <= row_token) & ((WINDOW == 0) | (slot > row_token - WINDOW))
            m, total, acc = _attend(q, k, v, seen, m, total, acc, ASM)
        while begin < end:  # not range(): the interpreter cannot on a loaded bound
            s = begin + k_slot
            k = tl.load(k_ptr + s * DIM + k_d + e, (s < end) & (k_d < DIM), 0).to(dtype)
            s = begin + v_slot
            v = tl.load(v_ptr + s * DIM + v_d + e, (s < end) & (v_d < DIM), 0).to(dtype)
            s = begin + slot
            seen = (s < end) & ((WINDOW == 0) | (s > first + row_token - WINDOW))
            m, total, acc = _attend(q, k, v, seen, m, total, acc, ASM)
            begin += STEP
        top = tl.max(m, 0)
        fade = tl.exp2(m - top[None])
        total = tl.sum(total * fade, 0)
        out = tl.sum(acc * fade[:, :, None], 0)
        d = j // 64 * 64 + j % 8 * 8 + j // 8 % 8
        if SPLITS == 1:
            where = (b * T + r // GROUP) * (HEADS * DIM) + (head * GROUP + r % GROUP) * DIM
            tl.store(out_ptr + where[:, None] + d, (out / total[:, None]).to(dtype), valid[:, None] & (d < DIM))
        else:
            where = ((bh * SPLITS + split) * ROWS + r) * (WIDTH + 2)
            tl.store(part_ptr + where[:, None] + 2 + d, out, valid[:, None])
            tl.store(part_ptr + where, top, valid)
            tl.store(part_ptr + where + 1, total, valid)

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


def _splits(heads: int, slots: int) -> int:
    """Into how many programs the prefix of every KV head is split: a choice, measured on one H200 (NOTES.md)."""
    return max(1, min(triton.cdiv(264, heads), slots // 512))


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
    rows = triton.cdiv(t * heads // kv_heads, 16) * 16
    warps, splits = 4, _splits(b * kv_heads, slots)
    out = torch.empty(b * t, heads * dim, dtype=qkv.dtype, device=qkv.device)
    part = None
    if splits > 1:
        part = torch.empty(b * kv_heads * splits * rows * (width + 2), dtype=torch.float32, device=qkv.device)
    launch = _launch(qkv.device, warps)
    scale = dim**-0.5 * 1.4426950408889634  # exp(x) = exp2(x log2(e))
    _attention_kernel[(b * kv_heads, splits, rows // 16)](
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

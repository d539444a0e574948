"""The two ends of a decode step: a token's embedding and angles; the choice of the next token, and moving on.

Knows vocabularies, logits and the state of a step. Refuses to know what lies between: layers and caches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from decode_kernels.launch import launch_options, operator


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


def _embed(
    tokens: Tensor, positions: Tensor, table: Tensor, inv_freq: Tensor, factor: float, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    (b, t), d, half = tokens.shape, table.shape[1], inv_freq.shape[0]
    x, (cos, sin) = table.new_empty(b, t, d), (inv_freq.new_empty(b, t, 1, half) for _ in range(2))
    launch = launch_options(4)
    launch.pop("launch_pdl", None)  # begins when all before it has ended: later kernels need not wait for positions
    _embed_kernel[(b * t,)](
        tokens.contiguous(), positions.contiguous(), table, inv_freq, x, cos, sin, factor, first, table.shape[0], d,
        half, triton.next_power_of_2(d), triton.next_power_of_2(half), **launch,
    )  # fmt: skip
    return x, cos, sin


def _embed_shape(
    tokens: Tensor, positions: Tensor, table: Tensor, inv_freq: Tensor, factor: float, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    cos, sin = (inv_freq.new_empty(*tokens.shape, 1, inv_freq.shape[0]) for _ in range(2))
    return table.new_empty(*tokens.shape, table.shape[1]), cos, sin


embed = operator("embed", _embed, _embed_shape)


def _sample(logits: Tensor, knobs: Tensor, seeds: Tensor, positions: Tensor, top_k: int) -> Tensor:
    logits, (b, v) = logits.contiguous(), logits.shape
    blocks, most = triton.cdiv(v, 16), min(top_k, triton.cdiv(v, 16))
    key = torch.empty(b, blocks, dtype=torch.int32, device=logits.device)
    chosen = torch.empty(b, most, dtype=torch.int32, device=logits.device)
    out = torch.empty(b, dtype=torch.int64, device=logits.device)
    inf, part = (0x7F80 if logits.dtype == torch.bfloat16 else 0x7C00), 64
    _maxima_kernel[(triton.cdiv(blocks, part), b)](logits, key, v, part, inf, **launch_options(4))
    _sample_kernel[(b,)](
        logits, key, chosen, knobs, seeds, positions, out, seeds.expand(b).stride(0), positions.stride(0), v,
        top_k, triton.next_power_of_2(blocks), triton.next_power_of_2(most), inf, **launch_options(16),
    )  # fmt: skip
    return out


def _sample_shape(logits: Tensor, knobs: Tensor, seeds: Tensor, positions: Tensor, top_k: int) -> Tensor:
    return positions.new_empty(logits.shape[0])


sample = operator("sample", _sample, _sample_shape)


def _advance_(tokens: Tensor, token: Tensor, position: Tensor, step: Tensor, out: Tensor) -> None:
    width = triton.next_power_of_2(len(tokens))
    _advance_kernel[(1,)](tokens, token, position, step, out, *out.shape, width, **launch_options(1))


def _advance_shape(tokens: Tensor, token: Tensor, position: Tensor, step: Tensor, out: Tensor) -> None:
    """Nothing comes out."""


advance_ = operator("advance_", _advance_, _advance_shape, ("token", "position", "step", "out"))

"""Bounds that no result of a product exceeds, of which `digits.py` makes units before any result is known.

Knows the lengths of a quantized matrix's rows. Refuses to know activations, and who leaves digits.

No product w x is larger than the length of w times that of x, and behind a norm x is a vector of length sqrt(K) at
most, times the norm's gain. The formulas and an example are in `quantized.py`.

One kernel does all of it, once for each matrix. With some ten of PyTorch's operators, each of which a GPU loads when it
is first used, a first token of Llama-2-7B came 4 s later.
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels.quantized import Operands, floats_of_rows

CHUNKS = tl.constexpr(4)  # of 128 columns at a time


@triton.jit
def _bounds_kernel(
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    before_ptr,
    after_ptr,
    out_ptr,
    length,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    PART: tl.constexpr,
):
    """128 results, in units of 2^-30: gate * up for an x times the gain `before` of that length, or two numbers, the
    gain `after` and that times w x.
    """
    GATED: tl.constexpr = after_ptr is None
    largest = 0.0
    for i in range(8):
        tile = tl.program_id(0) * 8 + i
        bound = _of_rows(w_ptr, scale_ptr, zero_ptr, bias_ptr, before_ptr, tile, length, N, K, GROUP, BITS, PART)
        if GATED:
            tile += N // 32
            up = _of_rows(w_ptr, scale_ptr, zero_ptr, bias_ptr, before_ptr, tile, length, N, K, GROUP, BITS, PART)
            bound *= up
        largest = tl.maximum(largest, tl.max(bound))
    if GATED:
        tl.store(out_ptr + tl.program_id(0), tl.maximum(largest / 1073741824, 1e-30))
    else:
        gain = tl.load(after_ptr + tl.program_id(0) * 128 + tl.arange(0, 128)).to(tl.float32)
        gain = tl.max(tl.abs(gain)) / 1073741824
        tl.store(out_ptr + tl.program_id(0) * 2, gain)
        tl.store(out_ptr + tl.program_id(0) * 2 + 1, gain * largest)


@triton.jit
def _of_rows(
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    gain_ptr,
    tile,
    length,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    PART: tl.constexpr,
):
    """What the results of one tile's 16 rows cannot exceed."""
    squares = tl.zeros([16], tl.float32)
    for first in range(0, (K + 127) // 128, CHUNKS):
        w = floats_of_rows(w_ptr, scale_ptr, zero_ptr, tile, first, N, K, GROUP, BITS, CHUNKS, PART)
        if gain_ptr is not None:
            k = first * 128 + tl.arange(0, CHUNKS * 128)
            w *= tl.load(gain_ptr + k, k < K, 0).to(tl.float32)[None]
        squares += tl.sum(w * w, 1)
    bound = tl.sqrt(squares) * length
    if bias_ptr is not None:
        bound += tl.abs(tl.load(bias_ptr + tile * 16 + tl.arange(0, 16)).to(tl.float32))
    return bound


def known_units(operands: Operands, bias: Tensor | None, gain: Tensor, bits: int) -> Tensor:
    """The units [N / 256] of 128 results silu(gate) * up each, behind a norm with that gain."""
    return _launch(operands, bias, gain, None, len(gain), bits)


def unit_factors(operands: Operands, k: int, gain: Tensor, bits: int) -> Tensor:
    """[N / 128, 2]: a unit of 128 results times their gains is the first times the largest residual and the second
    times the length of x.
    """
    return _launch(operands, None, None, gain, k, bits)


def _launch(
    operands: Operands, bias: Tensor | None, before: Tensor | None, after: Tensor | None, k: int, bits: int
) -> Tensor:
    packed, scale, zero = operands
    n, group = len(scale), k // scale.shape[-1]
    out = scale.new_empty((n // 256,) if after is None else (n // 128, 2), dtype=torch.float32)
    length = 1.0 if before is None else k**0.5
    _bounds_kernel[(len(out),)](
        packed,
        scale,
        zero,
        bias,
        before,
        after,
        out,
        length,
        N=n,
        K=k,
        GROUP=group,
        BITS=bits,
        PART=math.gcd(group, 128),
    )
    return out

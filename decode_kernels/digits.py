"""Activations as integers: two int8 digits of a block floating-point number, for products with int8 and int4 weights.

Knows the digits, their layout, and who leaves them for whom. Refuses to know weights.

128 activations of a row share a unit, a 32,512th (127 * 256) of the largest. Each becomes
a whole number of units, written as 256 * high + low with both digits in -128..127.

Worked example: 0.3 beside a largest value of 2. The unit is 2 / 32512 = 0.0000615157, and 0.3 is 4876.8 units, rounded
4877 = 256 * 19 + 13: the digits are 19 and 13, and those of 2 are 127 and 0. Multiplied by weights q = 5 and q = 3:

    high digits: 5 * 19 + 3 * 127 = 476        low digits: 5 * 13 + 3 * 0 = 65
    together:    (256 * 476 + 65) units = 121921 units = 7.50006, where 5 * 0.3 + 3 * 2 is 7.5

The error of an activation is at most half a unit, a 65,024th part of the largest of the 128, while bf16 rounds the
largest itself by up to a 512th.

Where the kernel that computes activations has 128 of a row, it makes their digits itself, and no kernel stands between
it and the product: attention does so, and a sum over ranks. A kernel of its own takes 1.2 us of a step, of 13 the layer
of Llama-3.1-8B in int4 on an H200 (`benchmarks/NOTES.md`).

**Four digits, where the largest is not known.** The product with gates and ups computes 16 of the 128 in a program. But
there is a bound that none of them exceeds (`bounds.known_units`), and that is 2^30 units. It is some thousand times
the largest, so of 31 bits 18 or more are left for that. An activation is written as 65536 * H + L, and H and L as two
digits each, where the digits of two rows of activations would be. The product is as quick with two rows as with one,
and adds up 65536 times the first result and the second. A step of Llama-3.1-8B in int4 at position 2,048 takes 1.489 ms
so, and 1.518 with a kernel for these digits; 1.467 ms where the product behind attention does the same.

Worked example: the bound is 64 and 0.3 comes. The unit is 64 / 2^30 = 2^-24, and 0.3 is 5033164.8 units, rounded
5033165 = 65536 * 77 - 13107. As 77 = 256 * 0 + 77 and -13107 = 256 * -51 - 51, the digits are 0, 77, -51 and -51.
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels import launch
from decode_kernels.letters import LETTERS, receive_sum


class Digits(NamedTuple):
    """Of activations, for a product. halves: four of one row, H in the place of a first row and L of a second."""

    digits: Tensor
    units: Tensor
    squares: Tensor | None  # sums of 128 squares, of halves those of 16, if there is a norm
    columns: int
    halves: bool = False


Incoming = tuple[Tensor, Tensor, int] | None  # the letters of a sum over ranks: `letters.receive_sum`


@triton.jit
def _digits_kernel(
    x_ptr,
    norm_ptr,
    digits_ptr,
    unit_ptr,
    squares_ptr,
    incoming,  # not None: x is a sum over ranks, which is received and stored, too
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The digits of 128 activations of a row, times the norm's gain if there is a norm, and the sum of their squares:
    columns COLUMNS m and COLUMNS m + 1 for row m.
    """
    CHUNKS: tl.constexpr = (K + 127) // 128
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    d = tl.arange(0, 16)[:, None] * 8 + tl.arange(0, 8)
    k = chunk * 128 + d
    launch.launch_next(PDL)
    if norm_ptr is not None:
        gain = tl.load(norm_ptr + k, k < K, 0).to(tl.float32)
    if incoming is not None:
        x = receive_sum(incoming, row * CHUNKS + chunk, True, SIZE).reshape(16, 8).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * K + k, x)
        x = x.to(tl.float32)
    else:
        launch.wait_for_previous(PDL)
        x = tl.load(x_ptr + row * K + k, k < K, 0).to(tl.float32)
    if norm_ptr is not None:
        tl.store(squares_ptr + row * CHUNKS + chunk, tl.sum(x * x))
        x *= gain
    largest = tl.max(tl.abs(x))
    store_digits(x, largest, tl.sum(x), d, row * COLUMNS, chunk, None, digits_ptr, unit_ptr, CHUNKS)
    if incoming is not None:
        launch.wait_for_previous(PDL)


@triton.jit
def store_digits(x, largest, total, d, column, chunk, real, digits_ptr, unit_ptr, CHUNKS: tl.constexpr):
    """The digits of activations x, each number d of its 128: columns `column` and column + 1 of `digits` [columns/8,
    K/128, 2 e, 8 n, 4 t, 2 u, 8]. The units [columns/8, K/128, 8] are at the places of the high digits alone: no lane
    has to load its neighbour's. largest and total are the largest |x| and the sum of x of the 128; real may be None.
    """
    unit = tl.maximum(largest, 1e-30) / 32512
    unit += 0 * total  # NaN if an activation is infinite or NaN: the result must not look finite
    x = x * (1 / unit)
    x = (x + tl.where(x < 0, -0.5, 0.5)).to(tl.int32)
    high = (x + 128) >> 8
    block = column // 8 * CHUNKS + chunk
    at = digits_ptr + (block * 1024 + column % 8 * 64) + (d // 32 % 2 * 512 + d // 8 % 4 * 16 + d // 64 * 8 + d % 8)
    tl.store(at, high.to(tl.int8), real)
    tl.store(at + 64, (x - (high << 8)).to(tl.int8), real)
    tl.store(unit_ptr + (block * 8 + column % 8), unit, real)


@triton.jit
def store_four_digits(x, start, unit, leave):
    """The four digits, columns 0 to 3, of the first column of x [results, columns], results from `start` on, in a unit
    that is known. leave: (digits, units, ..). Every 16 results have a unit of their own, units [K/128, 8], which is NaN
    if one of them has no digits: infinite, NaN, or beyond the bound.
    """
    digits_ptr, unit_ptr = leave[0], leave[1]
    column = tl.arange(0, x.shape[1])
    n = start + tl.arange(0, x.shape[0])[:, None] + column * 0
    x = x * (1 / unit)
    tl.store(unit_ptr + start // 16 + tl.arange(0, x.shape[0] // 16), unit)
    tl.debug_barrier()  # of two stores to one place the second counts
    tl.store(unit_ptr + n // 16, float("nan"), (column == 0) & ~(tl.abs(x) < 2e9))
    x = (x + tl.where(x < 0, -0.5, 0.5)).to(tl.int32) + 0x808080
    at = digits_ptr + (n // 128 * 1024 + n // 32 % 2 * 512 + n // 8 % 4 * 16 + n // 64 % 2 * 8 + n % 8)
    for i in tl.static_range(4):
        digit = (x >> (24 - 8 * i)) - (128 if i > 0 else 0)
        tl.store(at + 64 * i, digit.to(tl.int8), column == 0)


def empty_digits(x: Tensor, rows: int, k: int, norm: bool, separate: bool = False) -> Digits:
    """For rows of k activations like x, without contents. separate: every row has eight columns of its own."""
    columns = 8 if separate else max(8, triton.next_power_of_2(rows * 2))
    chunks, blocks = triton.cdiv(k, 128), rows if separate else columns // 8
    digits = x.new_empty(blocks, chunks * 1024, dtype=torch.int8)
    unit = x.new_empty(blocks, chunks, 8, dtype=torch.float32)
    return Digits(digits, unit, x.new_empty(rows, chunks, dtype=torch.float32) if norm else None, columns)


def fill_digits_(
    x: Tensor, norm_weight: Tensor | None, empty: Digits, separate: bool = False, incoming: Incoming = None
) -> Digits:
    """The digits of x [rows, k]; with incoming letters x is filled, too."""
    (rows, k), (digits, unit, squares, *_) = x.shape, empty
    grid, spacing = (rows, triton.cdiv(k, 128)), 8 if separate else 2
    size = 0 if incoming is None else len(incoming[0]) // LETTERS.value
    _digits_kernel[grid](
        x, norm_weight, digits, unit, squares, incoming, K=k, COLUMNS=spacing, SIZE=size, **launch.options(1)
    )
    return empty


class Left:
    """Digits of activations that the kernel which computed these has left for the product that reads them next. gain:
    that of the norm between the two, by which the digits are multiplied already.
    """

    def __init__(self, gain: Tensor | None = None) -> None:
        self.kept: tuple[Tensor, Digits] | None = None
        self.gain = gain

    def keep(self, x: Tensor, digits: Digits) -> None:
        self.kept = x, digits

    def __call__(self, x: Tensor) -> Digits | None:
        """Those of x, if it is what was kept last."""
        if self.kept is None or (self.kept[0].data_ptr(), self.kept[0].shape) != (x.data_ptr(), x.shape):
            return None
        digits, self.kept = self.kept[1], None
        return digits

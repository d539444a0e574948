"""Products of many rows of activations with a weight on a CPU, whose numbers are written out for each of them.

Knows in which dtype, order and pieces a library multiplies large matrices fastest. Refuses to know modules, and how
4-bit weights and blocks of rows lie in memory: `cpu_int4.py` and `cpu_blocks.py` write those out.

MKL multiplies W x^T faster than x W^T: 16, 64, 128 rows by 3072 x 576 take 1.1, 2.2, 3.8 ms for 2.3, 3.8, 5.2 (two
cores with AVX2), and 512 the same. In pieces 128 rows by 8192 x 2048 of int8 take 31 ms for 55.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 2 << 20  # weights of which floats are made at a time: for many more, the system clears new memory every time
PAD = 16  # floats more in a row: rows that lie a multiple of 4,096 bytes apart share a place in the cache


@cache
def wide(dtype: torch.dtype) -> torch.dtype:
    """In which oneDNN multiplies many rows fastest: 16 bits need instructions for them, and fp16's come with AMX."""
    return dtype if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() else torch.float32


def piece(k: int, multiple: int = 1) -> int:
    """Rows of a weight [N, K] that are written out at a time."""
    return multiple * max(1, PIECE // (multiple * k))


def multiply(x: Tensor, w: Tensor) -> Tensor:
    """Many rows x [M, K] by w [N, K], whose numbers are exact in x's dtype: [M, N], whose columns may be contiguous."""
    return F.linear(x, w) if w.dtype == wide(x.dtype) else PlainProduct(w, x.dtype)(x)


class Product:
    """Many rows x [M, K] by one weight [N, K], for activations in `dtype`.

    `__call__` gives [M, N] in that dtype. Where products are in float32, as `wide` says, `add_` and `gated` take them
    as they come: transposed, and in the order of the matrices, which int4 has of its own.
    """

    leaving: tuple[int, int] | None = None  # that order: of each so many times so many rows the transpose; None: none
    unit = 1  # rows that lie together: `gated` serves halves of whole ones
    scale: Tensor | None = None  # float32 [N, 1], of rows
    bias: Tensor | None = None  # [N], which `gated` does not add

    def __init__(self, n: int, k: int, dtype: torch.dtype, multiple: int = 1) -> None:
        """multiple: of how many rows a piece must hold one."""
        self.n, self.dtype, self.wide = n, dtype, wide(dtype)
        self.by_rows = self.wide == dtype  # whether results come with their rows contiguous, and not their columns
        self.order: Callable[[Tensor], Tensor] = lambda y: y  # of [..., N] a view in the order of the matrices
        self.rows = piece(k, multiple)

    def matrices(self) -> Iterator[Tensor]:
        """The weight, unless scaled later, in the dtype `wide`: [rows, K], and the last piece what is left."""
        raise NotImplementedError

    def shares(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the product each piece's share, and where it goes in y [M, N], in the same order."""
        scales = [None] * -(-self.n // self.rows) if self.scale is None else self.scale.split(self.rows)
        for w, scale, columns in zip(self.matrices(), scales, y.split(self.rows, 1)):
            share = x @ w.T if self.by_rows else (w @ x.T).T
            columns = self.order(columns)
            yield (share if scale is None else share * scale.T).view(columns.shape), columns

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[M, N]. After W x^T its columns are contiguous, with gaps: without, one thread alone would transpose it."""
        y = torch.empty(len(x), self.n, dtype=dtype or self.dtype)
        if not self.by_rows:
            y = torch.empty(self.n, len(x) + PAD, dtype=y.dtype)[:, :-PAD].T
        for share, columns in self.shares(x.to(self.wide), y):
            columns.copy_(share)
        return y if self.bias is None else y.add_(self.bias)

    def add_(self, y: Tensor, x: Tensor) -> None:
        """To y [M, N], contiguous, the product of x, both float32."""
        for share, columns in self.shares(x, y):
            columns.add_(share)
        if self.bias is not None:
            y.add_(self.bias)

    def gated(self, x: Tensor) -> Tensor:
        """silu(gate) * up for a weight whose first half are the gates, x float32: float32 [M, N / 2]."""
        y = x.new_empty(self.n, len(x))
        for w, rows in zip(self.matrices(), y.split(self.rows)):
            torch.mm(w, x.T, out=rows)
        gate, up = (y if self.scale is None else y.mul_(self.scale)).chunk(2)
        return F.silu(gate, inplace=True).mul_(up).T


class PlainProduct(Product):
    """The same of a weight [N, K] in 16 bits, or of int8 with scales [N, 1] perhaps."""

    def __init__(self, w: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> None:
        super().__init__(w.shape[0], w.shape[1], dtype)
        self.w, self.scale = w, scale

    def matrices(self) -> Iterator[Tensor]:
        return (part.to(self.wide) for part in self.w.split(self.rows))

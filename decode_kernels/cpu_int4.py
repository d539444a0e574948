"""int4 weights on a CPU: the layout of PyTorch's operator for them, its inverse, and products with many rows.

Knows `_convert_weight_to_int4pack_for_cpu` and `_weight_int4pack_mm_for_cpu`. Refuses to know modules.

The layout has blocks of rows, in a block one column after the other, two rows a byte: either half a block apart, or
neighbours. How many and which depends on the processor, and packing tells it. Example with halves: of the rows 0, 1, 2
and 3 the column 5 6 7 8 becomes 0x75 and 0x86. The operator takes q + 8 and multiplies by (q + 8 - 8) * scale + shift.

The operator makes floats of the weights anew for every four rows of activations. For many rows they are written out
once, and oneDNN multiplies: 3072 x 576 with 128 rows takes 3.8 ms instead of 5.3, with 512 rows 10.3 instead of 21.0
(one thread of an AMD EPYC). For a compiled layer see `cpu_loops.sums_int4`, and `lay` for vectors of 256 bits.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
LAID = 64  # rows in a block of `lay`


def pack(q: Tensor) -> Tensor:
    """int8 [N, K] in the layout, uint8 [N, K / 2]."""
    return aten._convert_weight_to_int4pack_for_cpu((q + 8).int(), 1)


def unpack(packed: Tensor, n: int, k: int, block: int = 0) -> Tensor:
    """The inverse of `pack`, int8 [N, K], for blocks of `block` rows (0: as found out)."""
    parts = _parts(packed, n, k, block or block_rows())
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts]) - 8


def few(x: Tensor, packed: Tensor, constants: Tensor) -> Tensor:
    """x [M, K] by (q * scale + shift) [N, K]: [M, N] by the operator; constants [G, N, 2]: scales and shifts."""
    return aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, x.shape[-1] // len(constants), constants)


def row(packed: Tensor, constants: Tensor) -> Callable[[Tensor], Tensor]:
    """`few` for a row [1, K] that is contiguous, with all that the weight decides looked up once."""
    group = 2 * packed.shape[-1] // len(constants)
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, group, constants)


def many(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, block: int = 0) -> Tensor:
    """x [M, K] by ((q - zero) * scale) [N, K]: [M, N]; scale, zero [N, G]. block: as of `_columns`."""
    (n, groups), k, dtype = scale.shape, x.shape[-1], wide(x.dtype)
    w = _columns(packed, n, k, block).sub_(8).to(dtype).view(groups, -1, n)  # exact in 16 bits, and so is q - zero
    scales, zeros = (t if t is None else t.T.to(dtype).contiguous()[:, None] for t in (scale, zero))
    w = (w if zeros is None else w.sub_(zeros)).mul_(scales).view(k, n)
    return x @ w if dtype == x.dtype else multiply(x, w.T)


def lay(q: Tensor) -> Tensor:
    """int8 [N, K] in blocks of 64 rows, a byte holding two that are 32 apart, uint8 [N, K / 2], whatever the processor:
    where the operator's blocks have 32, whose column is half a vector of 256 bits, this fills one. The rows lie in the
    order of `deal`.
    """
    low, high = (deal(q) + 8).view(torch.uint8).unflatten(0, (-1, 2, LAID // 2)).mT.unbind(1)  # [blocks, K, 32]
    return (low | high << 4).reshape(len(q), -1)


def lifted(packed: Tensor, n: int, k: int) -> Tensor:
    """The inverse of `lay`."""
    return gather(_columns(packed, n, k, LAID) - 8).T.contiguous()


def few_laid(x: Tensor, packed: Tensor, constants: Tensor) -> Tensor:
    """`few` of what `lay` has packed, where blocks of the operator have 32 rows: it takes a column of 64 rows for two
    columns, and each of two calls multiplies one of them by zero. constants: of `halves`.
    """
    none, k = torch.zeros_like(x), x.shape[-1]
    pairs = (torch.stack(pair, -1).flatten(1) for pair in ((x, none), (none, x)))  # [M, 2 K]
    y = [few(pair, packed.view(-1, k), part).unflatten(1, (-1, 2, LAID // 4)) for pair, part in zip(pairs, constants)]
    return gather(torch.stack(y, 3).flatten(1))


def halves(scale: Tensor) -> Tensor:
    """Scales [N, G] for `few_laid`: [2, G, N / 2, 2]."""
    parts = deal(scale).T.unflatten(1, (-1, 2, 2, LAID // 4)).movedim(3, 0).flatten(2)  # [2, G, N / 2]
    return torch.stack((parts, torch.zeros_like(parts)), -1)


def deal(rows: Tensor) -> Tensor:
    """Rows [N, ...] in the order of `lay`. Of a block's column, four bytes are a word of eight digits: so packed, the
    lowest digits of its eight words are the block's first eight rows, the next digits the next rows.
    """
    return rows.unflatten(0, (-1, 4, 2, LAID // 8)).movedim((2, 3), (1, 2)).flatten(0, 3)


def gather(y: Tensor) -> Tensor:
    """The inverse of `deal` for products: y [M, N] of dealt rows."""
    return y.unflatten(1, (-1, 2, LAID // 8, 4)).movedim(4, 2).flatten(1)


@cache
def wide(dtype: torch.dtype) -> torch.dtype:
    """In which oneDNN multiplies many rows fastest: 16 bits need instructions for them, and fp16's come with AMX."""
    return dtype if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() else torch.float32


def is_few(x: Tensor) -> bool:
    """Whether the operator is faster for so many rows of activations."""
    return len(x) <= (32 if wide(x.dtype) == torch.float32 else 64)


def multiply(x: Tensor, w: Tensor) -> Tensor:
    """Many rows x [M, K] by w [N, K], whose numbers are exact in x's dtype: [M, N].

    MKL multiplies W x^T faster than x W^T: 16, 64, 128 rows by 3072 x 576 take 1.1, 2.2, 3.8 ms for 2.3, 3.8, 5.2 (two
    cores with AVX2), and 512 the same.
    """
    if (dtype := wide(x.dtype)) == x.dtype:
        return F.linear(x, w.to(dtype))
    return (w.to(dtype) @ x.to(dtype).T).to(x.dtype).T.contiguous()


def _parts(packed: Tensor, n: int, k: int, block: int) -> list[Tensor]:
    """q + 8, int8 [blocks, K, rows], of the whole blocks, and of a smaller one with the rows that are left."""
    flat, parts = packed.flatten(), []
    for rows, count in [(block, n // block)] + [(n % block, 1)] * (n % block > 0):
        part, flat = flat.tensor_split([count * rows * k // 2])
        both = [digit.view(count, k, rows // 2) for digit in (part & 15, part >> 4)]
        digits = torch.cat(both, -1) if _halves(rows) else torch.stack(both, -1).flatten(-2)
        parts.append(digits.view(torch.int8))  # which become floats six times as fast as uint8
    return parts


def _columns(packed: Tensor, n: int, k: int, block: int) -> Tensor:
    """q + 8, int8 [K, N]; where a byte holds rows of two halves, eight bytes at a time, in half the time. block: the
    rows in a block of that kind, or 0 for the operator's own layout.
    """
    own = block_rows()
    if not block and (n % own or not _halves(own)):
        return torch.cat([part.transpose(0, 1).reshape(k, -1) for part in _parts(packed, n, k, own)], -1)
    block, low = block or own, 0x0F0F0F0F0F0F0F0F
    words = packed.view(torch.int64).view(n // block, k, block // 16).transpose(0, 1)
    columns = words.new_empty(k, n // block, 2, block // 16)
    torch.bitwise_and(words, low, out=columns[:, :, 0])
    torch.bitwise_and(words >> 4, low, out=columns[:, :, 1])
    return columns.view(torch.int8).view(k, n)


def half_rows() -> int:
    """Rows in half a block of the layout; 0 where a byte holds neighbours."""
    return block_rows() // 2 if block_rows() and _halves(block_rows()) else 0


@cache
def _halves(rows: int) -> bool:
    """Whether a byte holds two rows that are half a block apart, and not neighbours, in a block of so many."""
    second = (torch.arange(rows) >= rows // 2).to(torch.int8)  # 0 in the first half, 1 in the second
    return int(pack(second[:, None].expand(rows, 32)).flatten()[0]) == 0x98


@cache
def block_rows() -> int:
    """Rows in a block, which depends on the processor; 0 for a layout that is none of these."""
    q = torch.randint(-8, 8, (208, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    return next((b for b in (64, 32, 16) if torch.equal(unpack(pack(q), len(q), 32, b), q)), 0)

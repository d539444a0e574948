"""int4 weights on a CPU: the layout of PyTorch's operator for them, its inverse, and products with many rows.

Knows `_convert_weight_to_int4pack_for_cpu` and `_weight_int4pack_mm_for_cpu`. Refuses to know modules.

The layout has blocks of rows, in a block one column after the other, two rows a byte: either half a block apart, or
neighbours. How many and which depends on the processor, and packing tells it. Example with halves: of the rows 0, 1, 2
and 3 the column 5 6 7 8 becomes 0x75 and 0x86. The operator takes q + 8 and multiplies by (q + 8 - 8) * scale + shift.

The operator makes floats of the weights anew for every four rows of activations. For many rows they are written out
once, and a library multiplies: 3072 x 576 with 128 rows takes 3.8 ms instead of 5.3, with 512 rows 10.3 instead of 21.0
(one thread of an AMD EPYC). For a compiled layer see `cpu_loops.sums_int4`, and `lay` for vectors of 256 bits.
"""

import itertools
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
LAID = 64  # rows in a block of `lay`
SIGNS, HIGH = -0x7777777777777778, -0x0F0F0F0F0F0F0F10  # 0x8888888888888888 and 0xF0F0F0F0F0F0F0F0 of int64
PIECE = 4 << 20  # weights of which floats are made at a time: for more, the system clears new memory every time
PAD = 16  # floats more in a row: rows that lie a multiple of 4,096 bytes apart share a place in the cache


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


def many(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, laid: bool = False) -> Tensor:
    """x [M, K] by ((q - zero) * scale) [N, K]: as of `multiply`; scale, zero [N, G]. laid: packed by `lay`."""
    (n, groups), k, dtype, order = scale.shape, x.shape[-1], wide(x.dtype), _dealt if laid else _apart
    if n > (rows := LAID * max(1, PIECE // (LAID * k))):
        zeros = itertools.repeat(None) if zero is None else zero.split(rows)
        return torch.cat([many(x, *part, laid) for part in zip(packed.split(rows), scale.split(rows), zeros)], 1)
    w = torch.empty(k, n + PAD, dtype=dtype)[:, :-PAD]
    digits = _digits(packed, n, k, laid)
    for columns, part in zip(w.split([part.shape[1] for part in digits], 1), digits):
        columns.copy_(part)  # 16 q, which is exact in 16 bits, as is 16 (q - zero)
    if zero is not None:
        w.unflatten(0, (groups, -1)).sub_(_columns(order(zero.T), dtype).mul_(16))
    w.unflatten(0, (groups, -1)).mul_(_columns(order(scale.T), dtype).div_(16))
    y, product = _result(x, n), x @ w if dtype == x.dtype else (w.T @ x.to(dtype).T).T
    order(y).copy_(product.view(order(y).shape))
    return y


def lay(q: Tensor) -> Tensor:
    """int8 [N, K] in blocks of 64 rows, a byte holding two, uint8 [N, K / 2], whatever the processor: where the
    operator's blocks have 32, whose column is half a vector of 256 bits, this fills one. Their order is `_dealt`'s.
    """
    low, high = (_dealt(q.T) + 8).view(torch.uint8).flatten(3).permute(1, 2, 0, 3)  # [blocks, K, 32]
    return (low | high << 4).reshape(len(q), -1)


def lifted(packed: Tensor, n: int, k: int) -> Tensor:
    """The inverse of `lay`."""
    q = packed.new_empty(n, k, dtype=torch.int8)
    columns = torch.cat(_digits(packed, n, k, True), 1) >> 4
    _dealt(q.T).copy_(columns.view(_dealt(q.T).shape))
    return q


def few_laid(x: Tensor, packed: Tensor, constants: Tensor) -> Tensor:
    """`few` of what `lay` has packed, where blocks of the operator have 32 rows: it takes a column of 64 rows for two
    columns, and each of two calls multiplies one of them by zero. constants: of `halves`.
    """
    none, k = torch.zeros_like(x), x.shape[-1]
    pairs = (torch.stack(pair, -1).flatten(1) for pair in ((x, none), (none, x)))  # [M, 2 K]
    y = [few(pair, packed.view(-1, k), part).unflatten(1, (-1, 2, LAID // 4)) for pair, part in zip(pairs, constants)]
    return torch.stack(y, 3).view(len(x), -1, 2, LAID // 8, 4).movedim(4, 2).flatten(1)


def halves(scale: Tensor) -> Tensor:
    """Scales [N, G] for `few_laid`: [2, G, N / 2, 2]."""
    parts = _dealt(scale.T).flatten(3).transpose(1, 2).unflatten(3, (2, -1)).movedim(3, 0).flatten(2)  # [2, G, N / 2]
    return torch.stack((parts, torch.zeros_like(parts)), -1)


@cache
def wide(dtype: torch.dtype) -> torch.dtype:
    """In which oneDNN multiplies many rows fastest: 16 bits need instructions for them, and fp16's come with AMX."""
    return dtype if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() else torch.float32


def is_few(x: Tensor) -> bool:
    """Whether the operator is faster for so many rows of activations."""
    return len(x) <= (32 if wide(x.dtype) == torch.float32 else 64)


def multiply(x: Tensor, w: Tensor) -> Tensor:
    """Many rows x [M, K] by w [N, K], whose numbers are exact in x's dtype: [M, N], whose columns may be contiguous.

    MKL multiplies W x^T faster than x W^T: 16, 64, 128 rows by 3072 x 576 take 1.1, 2.2, 3.8 ms for 2.3, 3.8, 5.2 (two
    cores with AVX2), and 512 the same. In pieces 128 rows by 8192 x 2048 of int8 take 31 ms for 55.
    """
    dtype, rows = wide(x.dtype), max(1, PIECE // w.shape[1])
    if len(w) > rows and w.dtype != dtype:
        return torch.cat([multiply(x, part) for part in w.split(rows)], 1)
    if dtype == x.dtype:
        return F.linear(x, w.to(dtype))
    return _result(x, len(w)).copy_((w.to(dtype) @ x.to(dtype).T).T)


def _result(x: Tensor, n: int) -> Tensor:
    """Empty [M, N]. After W x^T its columns are contiguous, with gaps: without, one thread alone would transpose it."""
    return x.new_empty(len(x), n) if wide(x.dtype) == x.dtype else x.new_empty(n, len(x) + PAD)[:, :-PAD].T


def _parts(packed: Tensor, n: int, k: int, block: int) -> list[Tensor]:
    """q + 8, int8 [blocks, K, rows], of the whole blocks, and of a smaller one with the rows that are left."""
    flat, parts = packed.flatten(), []
    for rows, count in [(block, n // block)] + [(n % block, 1)] * (n % block > 0):
        part, flat = flat.tensor_split([count * rows * k // 2])
        both = [digit.view(count, k, rows // 2) for digit in (part & 15, part >> 4)]
        digits = torch.cat(both, -1) if _halves(rows) else torch.stack(both, -1).flatten(-2)
        parts.append(digits.view(torch.int8))  # which become floats six times as fast as uint8
    return parts


def _digits(packed: Tensor, n: int, k: int, laid: bool) -> list[Tensor]:
    """16 q, parts int8 [K, n'] side by side, in the order of `_dealt` or `_apart`. A byte without its low digit is
    that, once the sign of the high one is turned, and shifted by four bits so is the low one, eight bytes at a time.
    """
    half = LAID // 2 if laid else half_rows()
    if not laid and not _is_apart(n):
        return [(part << 4 ^ -128).transpose(0, 1).reshape(k, -1) for part in _parts(packed, n, k, block_rows())]
    columns = packed.view(torch.complex128).view(n // half // 2, k, half // 16).transpose(0, 1)  # of 16 bytes each
    words = columns.flatten().view(torch.int64).view(k, -1) ^ SIGNS
    return [(words << 4).bitwise_and_(HIGH).view(torch.int8), words.bitwise_and_(HIGH).view(torch.int8)]


def _columns(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t [G, ...] in a dtype, as [G, 1, N]."""
    return torch.empty(t.shape, dtype=dtype).copy_(t).view(len(t), 1, -1)


def _dealt(rows: Tensor) -> Tensor:
    """Something of rows, [..., N], in the order of `lay`: [..., 2, blocks, 8, 4], first what lies in low digits. Of a
    block's column, four bytes are a word of eight digits: so packed, the lowest digits of its eight words are the
    block's first eight rows, the next digits the next rows.
    """
    return rows.unflatten(-1, (-1, 4, 2, LAID // 8)).movedim(-2, -4).transpose(-1, -2)


def _apart(rows: Tensor) -> Tensor:
    """The same in the order of `pack`, [..., 2, blocks, half], where bytes hold two halves of blocks; else as it is."""
    return rows.unflatten(-1, (-1, 2, half_rows())).transpose(-2, -3) if _is_apart(rows.shape[-1]) else rows


def _is_apart(n: int) -> bool:
    return half_rows() in (16, 32) and n % block_rows() == 0


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

"""int4 weights on a CPU: the layout of PyTorch's operator for them, its inverse, and products with many rows.

Knows `_convert_weight_to_int4pack_for_cpu` and `_weight_int4pack_mm_for_cpu`. Refuses to know modules.

The layout has blocks of rows, in a block one column after the other, two rows a byte: either half a block apart, or
neighbours. How many and which depends on the processor, and packing tells it. Example with halves: of the rows 0, 1, 2
and 3 the column 5 6 7 8 becomes 0x75 and 0x86. The operator takes q + 8 and multiplies by (q + 8 - 8) * scale + shift.

The operator makes floats of the weights anew for every four rows of activations. For many rows they are written out
once, by PyTorch's operator for tables of 4-bit embeddings, and a library multiplies: 3072 x 576 with 128 rows takes 3.8
ms instead of 5.3, with 512 rows 10.3 instead of 21.0 (one thread of an AMD EPYC). For a compiled layer see
`cpu_loops.sums_int4`, and `lay` for vectors of 256 bits.
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
UNIT = -0x37FFC400  # the bits of 1 and -8 in fp16: digit * 1 - 8
PIECE = 2 << 20  # weights of which floats are made at a time: for many more, the system clears new memory every time
PAD = 16  # floats more in a row: rows that lie a multiple of 4,096 bytes apart share a place in the cache


def pack(q: Tensor) -> Tensor:
    """int8 [N, K] in the layout, uint8 [N, K / 2]."""
    return aten._convert_weight_to_int4pack_for_cpu((q + 8).int(), 1)


def unpack(packed: Tensor, n: int, k: int, block: int = 0) -> Tensor:
    """The inverse of `pack`, int8 [N, K], for blocks of `block` rows (0: as found out)."""
    flat, block, parts = packed.flatten(), block or block_rows(), []
    for rows, count in [(block, n // block)] + [(n % block, 1)] * (n % block > 0):  # of a smaller block what is left
        part, flat = flat.tensor_split([count * rows * k // 2])
        both = [digit.view(count, k, rows // 2) for digit in (part & 15, part >> 4)]
        digits = torch.cat(both, -1) if _halves(rows) else torch.stack(both, -1).flatten(-2)
        parts.append(digits.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).view(torch.int8) - 8


def few(x: Tensor, packed: Tensor, constants: Tensor) -> Tensor:
    """x [M, K] by (q * scale + shift) [N, K]: [M, N] by the operator; constants [G, N, 2]: scales and shifts."""
    return aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, x.shape[-1] // len(constants), constants)


def row(packed: Tensor, constants: Tensor) -> Callable[[Tensor], Tensor]:
    """`few` for a row [1, K] that is contiguous, with all that the weight decides looked up once."""
    group = 2 * packed.shape[-1] // len(constants)
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, group, constants)


def many(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, laid: bool = False) -> Tensor:
    """x [M, K] by ((q - zero) * scale) [N, K]: as of `multiply`, in the scales' dtype, whatever that of x; scale [G, N]
    is of `ordered`, zero [N, G]. laid: packed by `lay`.
    """
    (groups, n), k, dtype = scale.shape, x.shape[-1], wide(scale.dtype)
    (order, block), rows = _order(n, laid, scale.dtype), LAID * max(1, PIECE // (LAID * k))
    y, wide_x = _result(len(x), n, scale.dtype), x.to(dtype)
    zeros = itertools.repeat(None) if zero is None else zero.split(rows)
    for part, scales, shift, columns in zip(packed.split(rows), scale.split(rows, 1), zeros, y.split(rows, 1)):
        make = _sixteenfold if order is _apart else _floats
        w = make(part, len(part), k, block) if block else unpack(part, len(part), k).T
        w = w.to(dtype)  # exact, as is q - zero
        each = w.unflatten(0, (groups, -1))
        if shift is not None:
            each.sub_((order(shift.T) * (16 if order is _apart else 1)).reshape(groups, 1, -1))
        scales = order(scales).reshape(groups, -1) if order is _apart else scales
        each.mul_(scales.to(dtype)[:, None])
        product = wide_x @ w if dtype == scale.dtype else (w.T @ wide_x.T).T
        order(columns).copy_(product.view(order(columns).shape))
    return y


def ordered(scale: Tensor, laid: bool) -> Tensor:
    """Scales [N, G] for `many`: [G, N], in its order, unless that is `_apart`, which depends on how it splits rows."""
    order, _ = _order(len(scale), laid, scale.dtype)
    return scale.T / 16 if order is _apart else order(scale.T).reshape(-1, len(scale))


def lay(q: Tensor) -> Tensor:
    """int8 [N, K] in blocks of 64 rows, a byte holding two, uint8 [N, K / 2], whatever the processor: where the
    operator's blocks have 32, whose column is half a vector of 256 bits, this fills one. Their order is `_dealt`'s.
    """
    low, high = (_dealt(q.T) + 8).view(torch.uint8).flatten(2).unflatten(2, (-1, 2)).unbind(3)  # [K, blocks, 32]
    return (low | high << 4).transpose(0, 1).reshape(len(q), -1)


def lifted(packed: Tensor, n: int, k: int) -> Tensor:
    """The inverse of `lay`."""
    q = packed.new_empty(n, k, dtype=torch.int8)
    digits = torch.stack((packed & 15, packed >> 4), -1).view(torch.int8).view(-1, k, LAID) - 8
    _dealt(q.T).copy_(digits.transpose(0, 1).unflatten(2, (LAID // 8, 8)))
    return q


def few_laid(x: Tensor, packed: Tensor, constants: Tensor) -> Tensor:
    """`few` of what `lay` has packed, where blocks of the operator have 32 rows: it takes a column of 64 rows for two
    columns, and each of two calls multiplies one of them by zero. constants: of `halves`.
    """
    none, k = torch.zeros_like(x), x.shape[-1]
    pairs = (torch.stack(pair, -1).flatten(1) for pair in ((x, none), (none, x)))  # [M, 2 K]
    y = [few(pair, packed.view(-1, k), part).unflatten(1, (-1, 2, LAID // 4)) for pair, part in zip(pairs, constants)]
    return torch.stack(y, 2).mT.reshape(len(x), -1, LAID // 8, 8).mT.flatten(1)


def halves(scale: Tensor) -> Tensor:
    """Scales [N, G] for `few_laid`: [2, G, N / 2, 2]."""
    # of a column's 32 bytes each half, and of a byte each digit: [2, G, N / 2]
    parts = _dealt(scale.T).flatten(2).unflatten(2, (2, -1, 2)).permute(2, 0, 1, 4, 3).flatten(2)
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
    if w.dtype == (dtype := wide(x.dtype)):
        return F.linear(x, w)
    rows, y, wide_x = max(1, PIECE // w.shape[1]), _result(len(x), len(w), x.dtype), x.to(dtype)
    for part, columns in zip(w.split(rows), y.split(rows, 1)):
        part = part.to(dtype)
        columns.copy_(wide_x @ part.T if dtype == x.dtype else (part @ wide_x.T).T)
    return y


def _result(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """Empty [M, N]. After W x^T its columns are contiguous, with gaps: without, one thread alone would transpose it."""
    if wide(dtype) == dtype:
        return torch.empty(m, n, dtype=dtype)
    return torch.empty(n, m + PAD, dtype=dtype)[:, :-PAD].T


def _floats(packed: Tensor, n: int, k: int, block: int) -> Tensor:
    """q, float32 [K, N], of whole blocks, whose rows come in the order of their digits: `_dealt`'s, or `_paired`'s.

    PyTorch's operator for a table of 4-bit embeddings writes them, in a third of the time that shifts and conversions
    take. A row of the table is a column of the matrix, and its last word scale and offset in fp16. The three words
    before, which nobody reads, keep rows of the result from lying a multiple of 4,096 bytes apart, where they would
    share places in the cache.
    """
    table = torch.empty(k, n // 32 + 1, dtype=torch.complex128)  # of 16 bytes each, a block's column or half of it
    table.view(torch.int32)[:, -1] = UNIT
    columns = packed.view(table.dtype).view(-1, k, block // 32)
    table[:, :-1].view(k, -1, block // 32).copy_(columns.transpose(0, 1))
    return torch.ops.quantized.embedding_bag_4bit_unpack(table.view(torch.uint8))[:, :n]


def _sixteenfold(packed: Tensor, n: int, k: int, block: int) -> Tensor:
    """16 q, bf16 [K, N], in the order of `_apart`, in less time where nothing needs float32. A byte without its low
    digit is that, once the sign of the high one is turned, and shifted by four bits so is the low one, eight bytes at a
    time.
    """
    columns = packed.view(torch.complex128).view(-1, k, block // 32).transpose(0, 1)  # of 16 bytes each
    words, w = columns.flatten().view(torch.int64).view(k, -1) ^ SIGNS, torch.empty(k, n + PAD, dtype=torch.bfloat16)
    w[:, : n // 2] = (words << 4).bitwise_and_(HIGH).view(torch.int8)
    w[:, n // 2 : n] = words.bitwise_and_(HIGH).view(torch.int8)
    return w[:, :n]


def _dealt(rows: Tensor) -> Tensor:
    """Something of rows, [..., N], in the order of `lay`: [..., blocks, 8, 8]. Of a block's column, four bytes are a
    word of eight digits: so packed, the lowest digits of its eight words are the block's first eight rows, the next
    digits the next rows.
    """
    return rows.unflatten(-1, (-1, 8, LAID // 8)).mT


def _paired(rows: Tensor) -> Tensor:
    """The same in the order of `pack` where bytes hold two halves of a block: [..., blocks, half, 2]."""
    return rows.unflatten(-1, (-1, 2, half_rows())).mT


def _apart(rows: Tensor) -> Tensor:
    """That with all that lies in low digits first: [..., 2, blocks, half]."""
    return rows.unflatten(-1, (-1, 2, half_rows())).transpose(-2, -3)


def _order(n: int, laid: bool, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
    """In which order n rows come for activations in dtype, and how many are a block; 0 where they are no whole ones."""
    if laid:
        return _dealt, LAID
    block = block_rows() if block_rows() in (32, 64) and n % block_rows() == 0 else 0
    in_halves = _apart if wide(dtype) == dtype else _paired
    return (in_halves if block and half_rows() else lambda rows: rows), block


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

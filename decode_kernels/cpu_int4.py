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
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from decode_kernels.cpu_products import PAD, Product, piece, wide

aten = torch.ops.aten
LAID = 64  # rows in a block of `lay`
SIGNS, HIGH = -0x7777777777777778, -0x0F0F0F0F0F0F0F10  # 0x8888888888888888 and 0xF0F0F0F0F0F0F0F0 of int64
UNIT = -0x37FFC400  # the bits of 1 and -8 in fp16: digit * 1 - 8


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


class Int4Product(Product):
    """Many rows by ((q - zero) * scale) [N, K]; scale [G, N] is of `ordered`, zero [N, G] or None. laid: packed by
    `lay`. entering: the order in which x comes, see `Product.leaving`; the groups must hold a multiple of it.
    """

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        laid: bool = False,
        entering: tuple[int, int] | None = None,
    ) -> None:
        (groups, n), k = scale.shape, 2 * packed.numel() // scale.shape[1]
        super().__init__(n, k, scale.dtype, LAID)
        self.order, self.block = _order(n, laid, scale.dtype)
        self.unit, self.leaving = self.block or 1, _swapped(self.order)
        self.k, self.groups, self.entering = k, groups, entering
        zeros = itertools.repeat(None) if zero is None else zero.split(self.rows)
        self.parts = list(zip(packed.split(self.rows), scale.split(self.rows, 1), zeros))

    def matrices(self) -> Iterator[Tensor]:
        for part, scales, zero in self.parts:
            w = self.integers(part).to(self.wide)  # exact, as is q - zero
            each = w.unflatten(0, (self.groups, -1))
            if zero is not None:
                each.sub_((self.order(zero.T) * (16 if self.order is _apart else 1)).reshape(self.groups, 1, -1))
            each.mul_(scales[:, None])
            yield w.T

    def integers(self, part: Tensor) -> Tensor:
        """q [K, rows], or 16 q in the order of `_apart`."""
        if not self.block:
            columns = unpack(part, len(part), self.k).T
        else:  # of 16 bytes each
            columns = part.view(torch.complex128).view(-1, self.k, self.block // 32).transpose(0, 1)
        if self.order is _apart:
            return _sixteenfold(columns)
        if self.entering is not None:
            columns = columns.unflatten(0, (-1, *self.entering)).transpose(1, 2)
        return _floats(columns) if self.block else columns.reshape(self.k, -1)


def ordered(scale: Tensor, k: int, laid: bool) -> Tensor:
    """Scales [N, G] of a weight [N, K] for `Int4Product`: [G, N], in the order of its matrices."""
    order, _ = _order(len(scale), laid, scale.dtype)
    parts = [order(part.T).reshape(-1, len(part)) for part in scale.split(piece(k, LAID))]
    return torch.cat(parts, 1) / (16 if order is _apart else 1)


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


def is_few(x: Tensor) -> bool:
    """Whether the operator is faster for so many rows of activations."""
    return len(x) <= (32 if wide(x.dtype) == torch.float32 else 64)


def _floats(columns: Tensor) -> Tensor:
    """q, float32 [K, N], of columns complex128 [..., N / 32], which are K and lie as they may; the rows come in the
    order of their digits: `_dealt`'s, or `_paired`'s.

    PyTorch's operator for a table of 4-bit embeddings writes them, in a third of the time that shifts and conversions
    take. A row of the table is a column of the matrix, and its last word scale and offset in fp16. The three words
    before, which nobody reads, keep rows of the result from lying a multiple of 4,096 bytes apart, where they would
    share places in the cache.
    """
    words = columns.shape[-2] * columns.shape[-1]  # in a column of the matrix
    table = torch.empty(columns.numel() // words, words + 1, dtype=columns.dtype)
    table.view(torch.int32)[:, -1] = UNIT
    table[:, :-1].view(columns.shape).copy_(columns)
    return torch.ops.quantized.embedding_bag_4bit_unpack(table.view(torch.uint8))[:, : 32 * words]


def _sixteenfold(columns: Tensor) -> Tensor:
    """16 q, bf16 [K, N], in the order of `_apart`, in less time where nothing needs float32. A byte without its low
    digit is that, once the sign of the high one is turned, and shifted by four bits so is the low one, eight bytes at a
    time.
    """
    k, n = len(columns), 32 * columns[0].numel()
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


def _swapped(order: Callable[[Tensor], Tensor]) -> tuple[int, int] | None:
    """The order as `Product.leaving`."""
    return (8, LAID // 8) if order is _dealt else (2, half_rows()) if order is _paired else None


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

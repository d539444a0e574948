"""16-bit weights where a CPU has AVX2 alone: in blocks of rows, which PyTorch's embedding bag multiplies.

Knows that layout, its products, and how a linear and its model get it. Refuses to know what a layer is.

    y = W x = x[0] * (column 0 of W) + x[1] * (column 1 of W) + ...

is a weighted sum of vectors, and so what an embedding bag computes whose table has W's columns for rows. PyTorch has
FBGEMM write machine code for it, which holds the sums of one bag in registers, in float32. So a bag takes a block of
rows, whose columns lie in memory one after the other. 8192 x 2048 of bf16 take 1.4 ms that way, and 2.3 as a
matrix-vector product, which makes floats of x anew for every row; four rows of x take 3.8 ms instead of 7.0.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decode_kernels.cpu_products import Product
from linear import Linear
from model import Transformer

byte_bag = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
Row = Callable[[Tensor], Tensor]
SIZES = (96, 64, 48, 32)  # rows in a block, the fastest first: twelve registers of eight sums, eight, ...
ZERO = {dtype: torch.zeros(1, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)}
FEW, FEW_BYTES = 4, 8  # rows of activations up to which bags are faster than a product in float32


def size(n: int) -> int:
    """Rows in a block of a matrix with n rows; 0 where none fits."""
    return next((rows for rows in SIZES if n % rows == 0), 0)


def lay(w: Tensor) -> Tensor:
    """w [N, K] as blocks [N / n, n, K], the columns of each one after the other in memory; `reshape` is the inverse."""
    return w.unflatten(0, (-1, size(len(w)))).mT.contiguous().mT


class Table(nn.Embedding):
    """An embedding that shares its weight with a head in blocks."""

    def __init__(self, weight: nn.Parameter) -> None:
        count, n, k = weight.shape
        super().__init__(count * n, k, _weight=torch.empty(count * n, k, device="meta"))
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        n = self.weight.shape[1]
        return self.weight[input // n, input % n]


def lay_(linear: Linear, model: nn.Module, blocks: bool) -> None:
    """Lay the linear's weight out in blocks, or in rows, and that of the model's embedding if they share it."""
    before, tables = linear.weight, [model] if isinstance(model, Transformer) else []
    weight = nn.Parameter(lay(before) if blocks else before.reshape(linear.shape).contiguous(), requires_grad=False)
    linear.weight = weight
    linear.register_state_dict_post_hook(in_rows)
    for owner in tables:
        if owner.embed_tokens.weight is before:
            owner.add_module("embed_tokens", Table(weight) if blocks else nn.Embedding.from_pretrained(weight))
            owner.embed_tokens.register_state_dict_post_hook(in_rows)


def in_rows(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """A `state_dict` holds rows."""
    state[prefix + "weight"] = state[prefix + "weight"].reshape(-1, module.weight.shape[-1]).contiguous()


def few(x: Tensor, blocks: Tensor) -> Tensor:
    """x [M, K] by w [N, K], summed in float32: [M, N]."""
    (count, n, k), m = blocks.shape, len(x)
    indices, offsets = _bags(count, k, m)
    table, weights = blocks.as_strided((count * k, n), (n, 1)), x.expand(count, m, k).reshape(-1)
    y = torch.embedding_bag(table, indices, offsets, False, 0, False, weights)[0]
    return y.view(1, -1) if m == 1 else y.view(count, m, n).transpose(0, 1).reshape(m, -1)


class BlockProduct(Product):
    """Many rows by blocks of 16-bit weights, or by a table of `lay_bytes` with scales [N, 1], in float32."""

    def __init__(self, weight: Tensor, k: int, dtype: torch.dtype, scale: Tensor | None = None) -> None:
        in_bytes = weight.dtype == torch.uint8
        self.k, self.count = k, len(weight) // k if in_bytes else len(weight)
        size = weight.shape[1] - 8 if in_bytes else weight.shape[1]
        super().__init__(self.count * size, k, dtype, size)
        self.wide, self.by_rows, self.unit = torch.float32, True, size
        self.scale = None if scale is None else scale.float().view(self.count, 1, -1)
        self.parts = weight.split(self.rows // size * (k if in_bytes else 1))

    def matrices(self) -> Iterator[Tensor]:
        """[blocks, K, n]."""
        return ((part if part.dim() == 3 else integers(part, self.k)).mT.float() for part in self.parts)

    def product(self, x: Tensor) -> Tensor:
        """[N / n, M, n]."""
        y = x.new_empty(self.count, len(x), self.unit)
        for w, blocks in zip(self.matrices(), y.split(self.rows // self.unit)):
            torch.bmm(x.expand(len(w), -1, -1), w, out=blocks)
        return y if self.scale is None else y.mul_(self.scale)

    def shares(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.product(x).transpose(0, 1), y.view(len(x), self.count, -1)

    def gated(self, x: Tensor) -> Tensor:
        gate, up = self.product(x).chunk(2)
        y = x.new_empty(len(x), len(gate), self.unit)
        torch.mul(F.silu(gate, inplace=True).transpose(0, 1), up.transpose(0, 1), out=y)
        return y.flatten(1)


def lay_bytes(q: Tensor) -> Tensor:
    """int8 [N, K] in blocks, as the table [N / n * K, n + 8] of a bag of bytes: q + 128, and behind every column in two
    float32 by what a byte is multiplied there, and what is added.
    """
    n = size(len(q))
    columns = (q ^ -128).view(torch.uint8).unflatten(0, (-1, n)).mT.reshape(-1, n)
    ending = torch.tensor([1.0, -128.0]).view(torch.uint8)
    return torch.cat((columns, ending.expand(len(columns), -1)), 1)


def integers(table: Tensor, k: int) -> Tensor:
    """What `lay_bytes` was given, as blocks int8 [N / n, n, K]."""
    return (table[:, :-8] ^ 128).view(torch.int8).unflatten(0, (-1, k)).mT


def few_bytes(x: Tensor, table: Tensor) -> Tensor:
    """float32 x [M, K] by q [N, K]: [M, N]; 3072 x 576 in 66 us, where `_weight_int8pack_mm` takes 150."""
    m, k = x.shape
    count = len(table) // k
    indices, offsets = _bags(count, k, m)
    weights = x.expand(count, m, k).reshape(-1)
    y: Tensor = byte_bag(table, indices, offsets, False, 0, False, weights, None, False)
    return y.view(1, -1) if m == 1 else y.view(count, m, -1).transpose(0, 1).reshape(m, -1)


class Bags:
    """`few` for one row x [1, K], or for norm(x), with all that the weight decides made once."""

    def __init__(self, blocks: Tensor, norm: Tensor | None, eps: float) -> None:
        count, n, k = blocks.shape
        self.indices, self.offsets = _bags(count, k)
        self.table, self.x = blocks.mT.view(-1, n), torch.empty(count, k, dtype=blocks.dtype)
        self.weights, self.norm, self.eps = self.x.view(-1), norm, eps
        self.zero = torch.zeros(count, 1, dtype=blocks.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if self.norm is None:
            self.x.copy_(x)
        else:
            torch.addcmul(self.zero, x, self.norm, value=gain(x, self.eps), out=self.x)
        return torch.embedding_bag(self.table, self.indices, self.offsets, False, 0, False, self.weights)[0].view(1, -1)


class ByteBags:
    """The same for int8 in a table, with scales [N, 1]."""

    def __init__(
        self, table: Tensor, scale: Tensor, norm: Tensor | None, eps: float, k: int, dtype: torch.dtype
    ) -> None:
        count, self.dtype = len(table) // k, dtype
        self.indices, self.offsets = _bags(count, k)
        self.table, self.x, self.scale = table, torch.empty(count, k), scale.float().view(count, -1)
        self.weights, self.norm, self.eps = self.x.view(-1), norm, eps

    def __call__(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = normed(x, self.norm, self.eps)
        self.x.copy_(x)
        y: Tensor = byte_bag(self.table, self.indices, self.offsets, False, 0, False, self.weights, None, False)
        return y.mul_(self.scale).to(self.dtype).view(1, -1)


def normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """RMSNorm of x [M, K]; of one row in two operations, 18 us where PyTorch's nine take 71, and of more in seven, in
    another dtype perhaps.
    """
    if x.dtype != weight.dtype or x.dtype not in ZERO:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    if len(x) == 1:
        return torch.addcmul(ZERO[x.dtype], x, weight, value=gain(x, eps))
    return normed_rows(x.float(), weight, eps).to(dtype or x.dtype)


def normed_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same of float32 x, in float32."""
    gains = torch.linalg.vector_norm(x, dim=1, keepdim=True).square_().div_(x.shape[1]).add_(eps).rsqrt_()
    return (x * gains).mul_(weight.float())


def gain(x: Tensor, eps: float) -> float:
    """1 / sqrt(mean(x^2) + eps) of one row, as RMSNorm has it."""
    length = float(torch.linalg.vector_norm(x, dtype=torch.float32))
    return float((length * length / x.shape[-1] + eps) ** -0.5)


def _bags(count: int, k: int, m: int = 1) -> tuple[Tensor, Tensor]:
    """Where the columns of m bags for each of so many blocks lie in the table, and where bags begin."""
    columns = _columns(count * k)  # one row's alone are kept: those of many rows of a large head take a gigabyte
    if m > 1:
        columns = columns.view(count, 1, k).expand(count, m, k).reshape(-1)
    return columns, torch.arange(0, count * m * k, k, dtype=torch.int32)


@cache
def _columns(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32)

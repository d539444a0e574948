"""PyTorch's own CPU operators as fast paths: a decode step at the memory's speed without a compiler, and with one.

Knows which operator reads which weight format fastest, and the layout that it wants. Refuses to know Triton, files and
how a model is run. Most operators here begin with an underscore, and so promise
nothing: each is tried once on a small case against the plain expression, and where it is missing or answers otherwise
the modules stay plain.

    format   one row                                        more rows
    bf16     ATen's matrix-vector product, 13.8 G weights/s   oneDNN's matrix product from three rows on
    fp16     the same, 22.0 G weights/s                       from five rows on a float32 product
    int8     `_weight_int8pack_mm`, 13 to 22 G weights/s      from seventeen rows on the plain expression
    int4     `_weight_int4pack_mm_for_cpu`, 36 G weights/s    see `cpu_int4.py`

(Two cores of an AMD EPYC with AVX-512, torch 2.13; oneDNN reads one row of bf16 at 8.1, MKL one of float32 at 4.2.) In
a compiled layer Inductor makes one loop of w * x and its sum (`cpu_loops.py`), which reads bf16 at 15.0, float32 at
6.5, int8 at 31.4 and int4 at 48 G weights/s. With AVX2 alone, on another EPYC, the operators read bf16 at 8, int8 at 12
and int4 at 14; embedding bags (`cpu_blocks.py`) bf16 at 9 to 12 and int8 at 22 to 27; compiled loops bf16 at 14, int8
at 22, int4 at 27 to 31, float32 at 3.3. Many rows of bf16 are multiplied in float32 there, five times as fast.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decode_kernels import cpu_blocks, cpu_int4, cpu_loops
from decode_kernels.cpu_attention import attend
from decode_kernels.cpu_products import PlainProduct, Product, multiply, wide
from linear import Experts, Int4Linear, Linear, QuantizedLinear, RMSNorm
from model import DECODE_TOKENS, Attention

aten = torch.ops.aten
HALVES = (torch.bfloat16, torch.float16)
CACHED = 2 << 20  # bytes of a matrix that are still in the cache when all have been read


def use_(model: nn.Module, on: bool, compiled: bool) -> None:
    """As `decode_kernels.use_`, for a model that lies on a CPU."""
    for module in list(model.modules()):
        if isinstance(module, QuantizedLinear):
            fits = (path for path in PATHS[module.bits, compiled] if on and path.covers(module))
            module.use_(next(fits, None))
        elif isinstance(module, Linear):
            blocks = on and not compiled and BLOCKS.covers(module)
            if blocks != (module.weight.shape != module.shape):
                cpu_blocks.lay_(module, model, blocks)
            module.fast = BLOCKS if blocks else DENSE if on and DENSE.covers(module) else None
        elif isinstance(module, Attention):
            module.fast = attend if on and not module.qk_norm_whole else None


class Dense:
    """`Linear.fast` for weights in the activations' dtype: see `linear.FastLinear`."""

    def covers(self, linear: Linear) -> bool:
        return _knows_gemv()

    def __call__(
        self, linear: Linear, x: Tensor, norm: RMSNorm | None, residual: Tensor | None, silu_mul: bool, experts: Experts
    ) -> Tensor | None:
        if not self.serves(linear, x, experts):
            return None
        if torch.compiler.is_compiling():  # in float32 throughout, cast last
            row = x.float() if norm is None else F.rms_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.eps)
            return linear.finish(self.sums(linear, row, experts), residual, silu_mul).to(x.dtype)
        x = x if norm is None else self.normed(x, norm)
        if isinstance(experts, Tensor):  # each row reads its own matrix, and no copy of it is made
            y = torch.cat([self.product(linear, row, one) for row, one in zip(x.split(1), experts.tolist())])
        else:
            y = self.product(linear, x, experts)
        y = y if silu_mul else y.contiguous()  # a gate, and the product behind it, read columns as fast as rows
        return linear.finish(y, residual, silu_mul)

    def serves(self, linear: Linear, x: Tensor, experts: Experts) -> bool:
        if torch.compiler.is_compiling():
            return len(x) == 1 and not isinstance(experts, Tensor)
        few = len(x) <= 2 or isinstance(experts, Tensor)
        return x.dtype in HALVES and x.dtype == linear.weight.dtype and (few or wide(x.dtype) != x.dtype)

    def normed(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return cpu_blocks.normed(x, norm.weight, norm.eps)

    def product(self, linear: Linear, x: Tensor, one: int | None) -> Tensor:
        w = linear.weight if one is None else linear.weight[one]
        return gemv(x, w) if len(x) <= 4 else multiply(x, w)

    def many(self, linear: Linear, entering: tuple[int, int] | None = None) -> Product:
        """The product with many rows; entering: see `cpu_int4.Int4Product`."""
        return PlainProduct(linear.weight, linear.weight.dtype)

    def sums(self, linear: Linear, x: Tensor, one: int | None) -> Tensor:
        """The product for a compiler: float32 x [1, K] -> float32 [1, N]; of int4 [M, K] -> [M, N]."""
        return cpu_loops.sums(x, linear.weight if one is None else linear.weight[one])


class Blocks(Dense):
    """`Linear.fast` for weights in blocks of rows: see `cpu_blocks.py`."""

    def covers(self, linear: Linear) -> bool:
        able = cpu_loops.short() and linear.weight.dtype in HALVES and not linear.num_experts
        return able and cpu_blocks.size(linear.out_features) > 0 and _knows_bags()

    def serves(self, linear: Linear, x: Tensor, experts: Experts) -> bool:
        return x.dtype == linear.weight.dtype and not torch.compiler.is_compiling()

    def product(self, linear: Linear, x: Tensor, one: int | None) -> Tensor:
        return cpu_blocks.few(x, linear.weight) if len(x) <= cpu_blocks.FEW else self.many(linear)(x)

    def many(self, linear: Linear, entering: tuple[int, int] | None = None) -> Product:
        return cpu_blocks.BlockProduct(linear.weight, linear.in_features, linear.weight.dtype)


def gemv(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] by w [N, K] in bf16 or fp16 through ATen's own kernels, summed in float32.

    Whether oneDNN multiplies is a switch of the whole process, so it is put back at once. (The context manager for it,
    `torch.backends.mkldnn.flags`, takes 8 us and warns of other devices' settings.)
    """
    was = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return F.linear(x, w)
    finally:
        torch._C._set_mkldnn_enabled(was)


class Int8(Dense):
    """`Linear.fast` for int8 weights in their plain layout: see `linear.FastQuantized`."""

    def covers(self, linear: QuantizedLinear) -> bool:
        return linear.by_row and _knows_int8()

    def serves(self, linear: QuantizedLinear, x: Tensor, experts: Experts) -> bool:
        return linear.by_row and not isinstance(experts, Tensor) and (len(x) == 1 or not torch.compiler.is_compiling())

    def product(self, linear: QuantizedLinear, x: Tensor, one: int | None) -> Tensor:
        q, scale, _ = linear.operands(one)
        fits = x.shape[-1] % 32 == 0  # for K = 577 the operator answers 1e37: it reads 16 numbers at a time and no rest
        if fits and len(x) <= DECODE_TOKENS and x.dtype in HALVES and scale.dtype == x.dtype:
            if x.shape[-1] < 2048 and q.numel() <= CACHED and q.storage_offset() % 8 == 0:
                q.view(torch.int64).max()  # at 30 GB/s; the operator reads short rows at 13, from the cache at 31
            return torch._weight_int8pack_mm(x.contiguous(), q, scale.view(-1))
        return PlainProduct(q, x.dtype, scale.float())(x)

    def many(self, linear: QuantizedLinear, entering: tuple[int, int] | None = None) -> Product:
        q, scale, _ = linear.operands(None)
        return PlainProduct(q, scale.dtype, scale.float())

    def sums(self, linear: QuantizedLinear, x: Tensor, one: int | None) -> Tensor:
        (q, scale, _), words = linear.operands(one), linear.fast_constants
        y = cpu_loops.sums(x, q) if words is None else cpu_loops.word_sums(x, words[... if one is None else one])
        return y * scale.squeeze(-1).float()

    def pack(self, q: Tensor) -> Tensor:
        return q.contiguous()

    def unpack(self, packed: Tensor, n: int, k: int) -> Tensor:
        return packed

    def constants(self, linear: QuantizedLinear) -> Tensor | None:
        """The same integers, four a word: see `cpu_loops.word_sums`."""
        fits = linear.in_features % 32 == 0 and linear.in_features <= 16384 and cpu_loops.short()
        return linear.weight_packed.view(torch.float32) if fits else None

    def matrix(self, linear: QuantizedLinear, experts: Experts, dtype: torch.dtype) -> Tensor | None:
        return None


class Bytes(Int8):
    """`Linear.fast` for int8 weights in blocks of rows: see `cpu_blocks.lay_bytes`."""

    def covers(self, linear: QuantizedLinear) -> bool:
        able = cpu_loops.short() and linear.by_row and not linear.num_experts
        return able and cpu_blocks.size(linear.out_features) > 0 and _knows_byte_bags()

    def serves(self, linear: QuantizedLinear, x: Tensor, experts: Experts) -> bool:
        return not torch.compiler.is_compiling()

    def product(self, linear: QuantizedLinear, x: Tensor, one: int | None) -> Tensor:
        if len(x) > cpu_blocks.FEW_BYTES:
            return self.many(linear)(x, x.dtype)
        table, scale, _ = linear.operands(None)
        return (cpu_blocks.few_bytes(x.float(), table) * scale.view(-1)).to(x.dtype)

    def many(self, linear: QuantizedLinear, entering: tuple[int, int] | None = None) -> Product:
        table, scale, _ = linear.operands(None)
        return cpu_blocks.BlockProduct(table, linear.in_features, scale.dtype, scale)

    def pack(self, q: Tensor) -> Tensor:
        return cpu_blocks.lay_bytes(q)

    def unpack(self, packed: Tensor, n: int, k: int) -> Tensor:
        return cpu_blocks.integers(packed, k).reshape(n, k)

    def constants(self, linear: QuantizedLinear) -> Tensor | None:
        return None


class Int4(Int8):
    """`Linear.fast` for int4 weights: packed by `_convert_weight_to_int4pack_for_cpu`."""

    half = 0  # rows in half a block, if loops read the layout, once that is known: a compiler cannot find out

    def covers(self, linear: Linear) -> bool:
        assert isinstance(linear, Int4Linear)
        n, groups = linear.out_features, max(linear.weight_scale.shape[-1], 1)
        fits = linear.num_experts == 0 and n % 16 == 0 and linear.in_features / groups in (32, 64, 128, 256)
        fits = fits and linear.weight_scale.dtype in HALVES and _knows_int4()
        if fits and not cpu_loops.short():
            self.half = cpu_int4.half_rows()
        return fits

    def serves(self, linear: Linear, x: Tensor, experts: Experts) -> bool:
        assert isinstance(linear, Int4Linear)
        return x.dtype == linear.weight_scale.dtype

    def normed(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """Many rows in the dtype in which they are multiplied: 2 to 4% of a prefill of 128 tokens."""
        return cpu_blocks.normed(x, norm.weight, norm.eps, None if cpu_int4.is_few(x) else wide(x.dtype))

    def product(self, linear: QuantizedLinear, x: Tensor, one: int | None) -> Tensor:
        if torch.compiler.is_compiling() or cpu_int4.is_few(x):
            return cpu_int4.few(x, *self.packed(linear)[:2])
        return self.many(linear)(x)

    def many(self, linear: QuantizedLinear, entering: tuple[int, int] | None = None) -> Product:
        packed, _, scale = self.packed(linear)
        return cpu_int4.Int4Product(packed, scale, linear.weight_zero_point, entering=entering)

    def packed(self, linear: QuantizedLinear) -> tuple[Tensor, Tensor, Tensor]:
        """What the operator takes for a weight, and the scales for many rows."""
        assert linear.fast_constants is not None
        (pairs, scale), groups = linear.fast_constants.split((2, 1)), linear.weight_scale.shape[1]
        return linear.weight_packed, pairs.view(groups, -1, 2), scale.view(groups, -1)

    def sums(self, linear: QuantizedLinear, x: Tensor, one: int | None) -> Tensor:
        packed, scale, zero = linear.operands(None)
        if len(x) > 1 or not self.in_blocks(linear):
            return self.product(linear, x.to(scale.dtype), one)
        return cpu_loops.sums_int4(x, packed, scale, zero, self.half)

    def in_blocks(self, linear: Linear) -> bool:
        """Whether all of the layout is blocks whose bytes hold two rows that are half a block apart."""
        return self.half > 0 and linear.out_features % (2 * self.half) == 0

    def pack(self, q: Tensor) -> Tensor:
        return cpu_int4.pack(q)

    def unpack(self, packed: Tensor, n: int, k: int) -> Tensor:
        return cpu_int4.unpack(packed, n, k)

    def constants(self, linear: QuantizedLinear) -> Tensor:
        """[3, G * N]: what the operator takes, w = (q + 8 - 8) * scale + shift, and the scales for `many`."""
        scale, zero = linear.weight_scale, linear.weight_zero_point
        shift = torch.zeros_like(scale) if zero is None else -zero.float() * scale.float()
        pairs = torch.stack((scale, shift.to(scale.dtype)), -1).transpose(0, 1)  # [G, N, 2]
        return torch.cat((pairs.reshape(2, -1), cpu_int4.ordered(scale, linear.in_features, False).reshape(1, -1)))


class Words(Int4):
    """The same for a compiled layer where vectors are `short`: see `cpu_loops.int4_word_sums`."""

    def covers(self, linear: Linear) -> bool:
        assert isinstance(linear, Int4Linear)
        fits = linear.weight_zero_point is None and linear.out_features % cpu_int4.LAID == 0
        return fits and cpu_loops.short() and super().covers(linear)

    def product(self, linear: QuantizedLinear, x: Tensor, one: int | None) -> Tensor:
        packed, groups = linear.weight_packed.view(torch.uint8), linear.weight_scale.shape[1]
        assert linear.fast_constants is not None
        if len(x) <= 16 and cpu_int4.half_rows() == 16 and linear.in_features <= 128 * groups:
            return cpu_int4.few_laid(x, packed, linear.fast_constants[1:3].view(2, groups, -1, 2))
        return self.many(linear)(x)

    def many(self, linear: QuantizedLinear, entering: tuple[int, int] | None = None) -> Product:
        packed, groups = linear.weight_packed.view(torch.uint8), linear.weight_scale.shape[1]
        assert linear.fast_constants is not None
        return cpu_int4.Int4Product(packed, linear.fast_constants[3:].view(groups, -1), None, True, entering)

    def sums(self, linear: QuantizedLinear, x: Tensor, one: int | None) -> Tensor:
        assert linear.fast_constants is not None
        scales = linear.fast_constants[0].view(-1, linear.weight_scale.shape[1], 8, 8)
        return cpu_loops.int4_word_sums(x, linear.weight_packed, scales)

    def pack(self, q: Tensor) -> Tensor:
        return cpu_int4.lay(q).view(torch.float32)

    def unpack(self, packed: Tensor, n: int, k: int) -> Tensor:
        return cpu_int4.lifted(packed.view(torch.uint8), n, k)

    def constants(self, linear: QuantizedLinear) -> Tensor:
        """What the loops take, the operator, and `many`: [4, G * N]."""
        scale = linear.weight_scale
        parts = cpu_loops.lanes(scale), cpu_int4.halves(scale), cpu_int4.ordered(scale, linear.in_features, True)
        return torch.cat([part.flatten() for part in parts]).view(4, -1)


DENSE, BLOCKS, INT8, BYTES, INT4, WORDS = Dense(), Blocks(), Int8(), Bytes(), Int4(), Words()
# for how many bits, and whether compiled; the fastest first
PATHS: dict[tuple[int, bool], tuple[Int8, ...]]
PATHS = {(8, False): (BYTES, INT8), (8, True): (INT8,), (4, False): (INT4,), (4, True): (WORDS, INT4)}


# -- does this PyTorch have the operators, and do they what is said here? ----------------


def _case(k: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, k], q int8 [208, k] in -8..7 and scale [208], all of them exact in bf16."""
    x = (torch.arange(2 * k) % 5 - 2).view(2, k).bfloat16()
    q = torch.randint(-8, 8, (208, k), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    return x, q, (torch.arange(208) % 3 + 1).bfloat16()


def _answers(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except (AttributeError, RuntimeError):
        return False


@cache
def _knows_gemv() -> bool:
    x, q, _ = _case(32)
    return _answers(lambda: torch.equal(gemv(x[:1], q.bfloat16()), F.linear(x[:1].float(), q.float()).bfloat16()))


@cache
def _knows_bags() -> bool:
    x, q, _ = _case(32)
    blocks, want = cpu_blocks.lay(q[:96].bfloat16()), F.linear(x.float(), q[:96].float())
    return _answers(lambda: torch.equal(cpu_blocks.few(x, blocks), want.bfloat16()))


@cache
def _knows_int8() -> bool:
    x, q, scale = _case(32)
    want = F.linear(x.float(), q.float()) * scale.float()
    return _answers(lambda: torch.allclose(aten._weight_int8pack_mm(x, q, scale).float(), want, rtol=2**-7))


@cache
def _knows_byte_bags() -> bool:
    x, q, _ = _case(32)
    want = F.linear(x.float(), q[:96].float())
    return _answers(lambda: torch.equal(cpu_blocks.few_bytes(x.float(), cpu_blocks.lay_bytes(q[:96])), want))


@cache
def _knows_int4() -> bool:
    x, q, scale = _case(64)
    constants = torch.stack((scale, scale), -1).repeat(2, 1, 1)  # shift = scale: w = (q + 1) * scale
    want = F.linear(x.float(), (q.float() + 1) * scale.float()[:, None])
    right = _answers(lambda: torch.allclose(cpu_int4.few(x, cpu_int4.pack(q), constants).float(), want, rtol=2**-7))
    return right and cpu_int4.block_rows() > 0 and _answers(_knows_many_of_int4)


def _knows_many_of_int4() -> bool:
    x, q, _ = _case(64)
    want, ones = F.linear(x.float(), q[:192].float()).to(x.dtype), torch.ones(192, 1, dtype=x.dtype)
    return torch.equal(cpu_int4.Int4Product(cpu_int4.pack(q[:192]), cpu_int4.ordered(ones, 64, False), None)(x), want)

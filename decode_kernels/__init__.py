"""Triton kernels, and PyTorch's CPU operators, for decoding at the speed of the memory bus: the front door.

Knows which modules have a fast path, and which devices, shapes and dtypes the kernels serve. `use_(model)` sets the
field `fast` of a model's modules; a fast path returns None for what it does not serve, and the module goes on in plain
PyTorch. Each file here holds the kernels of one subject and the operators that launch them; it is imported, and Triton
with it, when the first of them is wanted. Refuses to know files, and how a model is run.

How they come near the memory's speed (measurements in benchmarks/NOTES.md):

- 16-bit weights and up to four rows: small programs that ask for all their weights at once, in the memory's order. The
  tensor cores multiply, at the price of products that nobody wants: converting and adding took longer than reading.
  More rows: the wanted products alone, the loads of the next steps passing through shared memory meanwhile.
- int8 and int4 weights: a GPU has no time to make floats of them. The activations become integers instead, two int8
  digits of a block floating-point number that is finer than bf16 (`quantized._digits_kernel`), and the tensor cores
  multiply integers exactly. One row uses two of their eight columns, four rows use all: up to eight rows are nearly
  free.
- Registers are operands: weights are packed so that the 16 bytes which a lane loads are what m16n8k32 wants there.
  Lanes are dealt to axis 0 of such pointers, then 1, warps to axis 2, and the last axis is a lane's own. It takes
  `max_contiguous` to say so: of axes without contiguous addresses Triton 3.6 takes the first, later versions the last.
  Only the order of its numbers counts, for the last axis, which a lane loads in one piece, is contiguous or one long.
- The compiler must not move a load down to its use, nor a product up before a load. Nothing says so to it, but a second
  `gdc_wait`, which returns at once, stops the one, and a branch that is always taken the other.
- A prefill has PyTorch's products and attention; the rotation, the cache write and the gate around them are kernels
  (`prefill.py`), each of which reads and writes the activations once.
- A kernel is launched while the one before it runs (programmatic dependent launch), asks for what no kernel writes, its
  weights above all, and then waits. A forward pass begins with PyTorch's own kernels, which end before the next starts.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linear import Experts, Linear, QuantizedLinear, RMSNorm
from model import Attention, LayerCache, Transformer
from sampling import Structure
from tp import FastCollectives

Letters = tuple[Tensor | int, ...] | None  # where a product whose result is summed over ranks sends it: `dense.run`
ROWS = 16  # of activations in one launch, at most
# Triton runs its kernels in its CPU interpreter (for tests); it reads the variable when it is imported, as this does
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def supported(device: torch.device) -> bool:
    """Whether the Triton kernels run on this device; elsewhere plain PyTorch serves."""
    able = INTERPRETED or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))
    return able and importlib.util.find_spec("triton") is not None


def use_(model: nn.Module, on: bool = True) -> None:
    """Set the fast path of every module under `model` that has one, or clear it. The weights must lie where they will
    be used; quantized ones are laid out anew, one matrix at a time. On a CPU the fast paths are those of `cpu.py`.
    """
    if not INTERPRETED and all(t.is_cpu for t in (*model.parameters(), *model.buffers())):
        from decode_kernels import cpu

        cpu.use_(model, on)
        return
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            if not (on and isinstance(module.fast, Quantized)):
                module.use_({8: INT8, 4: INT4}[module.bits] if on else None)
        elif isinstance(module, Linear):
            module.fast = DENSE if on else None
        elif isinstance(module, Attention):
            module.fast = attend if on and not module.qk_norm_whole else None
        elif isinstance(module, Transformer):
            module.fast = begin if on else None
            # once: a captured program writes into these mailboxes as long as it lives
            if on and module.tp.fast is None:
                module.tp.fast = connect(module)
    for module in model.modules():
        if isinstance(module, Transformer) and module.tp.fast is not None:
            from decode_kernels import sums

            sums.use_(module, on)


def serves(x: Tensor) -> bool:
    """Whether kernels take such activations, or those of a rehearsal (`ahead.py`). It asks no device, so that a
    compiled graph may contain it.
    """
    return x.dtype in (torch.bfloat16, torch.float16) and (INTERPRETED or x.is_cuda or x.is_meta)


def prefills(x: Tensor, rows: int) -> bool:
    """Whether `prefill.py` serves so many rows. A compiler does better: it fuses what these kernels do with others."""
    return rows > ROWS and serves(x) and not torch.compiler.is_compiling()


def _of_norm(norm: RMSNorm | None) -> tuple[Tensor | None, float]:
    return (None, 0.0) if norm is None else (norm.weight, norm.eps)


class Dense:
    """`Linear.fast` for 16-bit weights: see `linear.FastLinear`."""

    def covers(self, linear: Linear) -> bool:
        return linear.in_features % 8 == 0

    def __call__(
        self, linear: Linear, x: Tensor, norm: RMSNorm | None, residual: Tensor | None, silu_mul: bool, experts: Experts
    ) -> Tensor | None:
        one, many = (experts, None) if isinstance(experts, int) else (None, experts)
        if many is None and prefills(x, len(x)):
            from decode_kernels import prefill

            return prefill.linear(linear, x, norm, residual, silu_mul, one)
        product, gain = self.product(linear, one, silu_mul), _of_norm(norm)
        if product is None or not (serves(x) and self.covers(linear)) or (len(x) > ROWS and many is None):
            return None
        if many is None or len(x) <= ROWS:
            return product(x, linear.bias, *gain, residual, silu_mul, many)
        assert residual is None  # of experts: it is added to their sum
        parts = zip(x.split(ROWS), many.split(ROWS))  # their rows may be more: one launch after another
        return torch.cat([product(rows, linear.bias, *gain, None, silu_mul, chosen) for rows, chosen in parts])

    def product(
        self, linear: Linear, one: int | None, silu_mul: bool, letters: Letters = None
    ) -> Callable[..., Tensor] | None:
        """The kernel with the weights of `linear`, or of one of its experts; None for a shape without one."""
        from decode_kernels import dense

        weight = linear.weight if one is None else linear.weight[one]
        product = dense.linear if letters is None else partial(dense.run, letters=letters)
        return lambda x, *others: product(x, weight, *others)


class Quantized(Dense):
    """`Linear.fast` for int8 and int4 weights: see `linear.FastQuantized`."""

    def __init__(self, bits: int, left: Callable[[Tensor], Any] | None = None) -> None:
        self.bits, self.left = bits, left  # left(x): the digits of x, if the sum over ranks before has left some

    def covers(self, linear: QuantizedLinear) -> bool:
        """A scale is one of a row, or of a group whose size is a power of two from 32 on."""
        group = linear.in_features // (linear.weight_scale.shape[-1] if self.bits == 4 else 1)
        return group == linear.in_features or (group >= 32 and group & (group - 1) == 0)

    def product(
        self, linear: QuantizedLinear, one: int | None, silu_mul: bool, letters: Letters = None
    ) -> Callable[..., Tensor] | None:
        from decode_kernels import quantized

        if silu_mul and linear.out_features % 32:  # gates and ups would share a tile
            return None
        weight, scale, zero = linear.operands(one)
        if letters is not None or (self.left is not None and not torch.compiler.is_compiling()):
            run, left = partial(quantized.run, bits=self.bits, letters=letters), self.left or (lambda x: None)
            return lambda x, *others: run(x, weight, scale, zero, *others, digits=left(x))
        if self.bits == 8:
            return lambda x, *others: quantized.int8_linear(x, weight, scale, *others)
        return lambda x, *others: quantized.int4_linear(x, weight, scale, zero, *others)

    def pack(self, q: Tensor) -> Tensor:
        from decode_kernels import quantized

        return quantized.pack(q, self.bits)

    def unpack(self, packed: Tensor, n: int, k: int) -> Tensor:
        from decode_kernels import quantized

        return quantized.unpack(packed, self.bits)[..., :n, :k]

    def constants(self, linear: QuantizedLinear) -> Tensor | None:
        return None

    def matrix(self, linear: QuantizedLinear, experts: Experts, dtype: torch.dtype) -> Tensor | None:
        """By a kernel that reads the integers once: what a prefill multiplies by."""
        from decode_kernels import quantized

        weight, scale, zero = linear.operands(experts)
        if weight.dim() > 3 or not (INTERPRETED or weight.is_cuda or weight.is_meta):
            return None
        size = linear.out_features, linear.in_features
        if self.bits == 8:
            return quantized.int8_dequantize(weight, scale, *size, dtype)
        return quantized.int4_dequantize(weight, scale, zero, *size, dtype)


DENSE, INT8, INT4 = Dense(), Quantized(8), Quantized(4)


def attend(
    attention: Attention, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: LayerCache, end: int
) -> Tensor | None:
    """`Attention.fast`: norms, rotation, cache write and attention. Up to 16 new tokens, whose positions must be
    consecutive in each row, take one kernel, which reads the length on the device.
    """
    b, t, _ = qkv.shape
    if cache.k.dtype == qkv.dtype and prefills(qkv, t):
        from decode_kernels import prefill

        return prefill.attend(attention, qkv, cos, sin, positions, cache, end)
    if t > ROWS or attention.head_dim % 8 or attention.head_dim > 256 or not serves(qkv) or cache.k.dtype != qkv.dtype:
        return None
    from decode_kernels import attention as kernels

    return kernels.attend(attention, qkv, cos, sin, positions, cache)


def begin(model: Transformer, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """`Transformer.fast`: the embedding and the angles of up to 16 tokens a row."""
    table = model.embed_tokens.weight
    if not serves(table) or tokens.shape[1] > ROWS:
        return None
    from decode_kernels import step

    return step.embed(tokens, positions, table, model.inv_freq[0], model.rope_factors[0], model.first_id)


class Run(NamedTuple):
    """What will be run: the model over `slots` cache slots of every row, with so many new tokens of a row in a step,
    and prefills of so many; structure: of the sampling, where that is a kernel.
    """

    model: Transformer
    batch_size: int
    slots: int
    tokens: Iterable[int]
    prefills: Iterable[int]
    structure: Structure | None


def compiling_ahead(
    runs: Sequence[Run], device: torch.device, tell: Callable[[str], None]
) -> contextlib.AbstractContextManager[None]:
    """Compiles what these runs need and the disk does not hold, side by side, while the body runs; see `ahead.py`."""
    if INTERPRETED or sys.platform != "linux":
        return contextlib.nullcontext()
    from decode_kernels import ahead

    return ahead.compiling_ahead(ahead.stand_in(device), runs, ahead.processors(), tell)


def connect(model: Transformer) -> FastCollectives | None:
    """`TensorParallel.fast`, where the ranks' GPUs reach each other's memory; every rank must call it."""
    if INTERPRETED or model.tp.words is None:
        return None
    from decode_kernels import reduce

    return reduce.connect(model.tp, model.norm.weight.device)


def samples(dtype: torch.dtype, vocabulary: int, rows: int, structure: Structure) -> bool:
    """Whether `sample` and `advance_` serve such logits of a model on which `use_` was called."""
    greedy, top_k, use_top_p, _, penalty = structure
    able = rows <= 1024 and top_k < vocabulary <= 1 << 18 and dtype in (torch.bfloat16, torch.float16)
    return able and not penalty and (greedy or (not use_top_p and 0 < top_k <= 256))


def sample(
    logits: Tensor, structure: Structure, knobs: Tensor, seeds: Tensor, positions: Tensor, _: Tensor | None = None
) -> Tensor:
    """`sampling.sample` for what `samples`, in two kernels."""
    from decode_kernels import step

    return step.sample(logits, knobs, seeds, positions, 1 if structure.greedy else structure.top_k)


def advance_(tokens: Tensor, token: Tensor, position: Tensor, step: Tensor, out: Tensor) -> None:
    """`engine.advance_` in one kernel."""
    from decode_kernels import step as kernels

    kernels.advance_(tokens, token, position, step, out)

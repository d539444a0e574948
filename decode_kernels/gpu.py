"""The Triton kernels as fast paths: which shapes and dtypes they serve, and which kernel computes what.

Knows the modules that have a fast path, and the operators of the other files here. Refuses to know how a kernel works.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from decode_kernels import INTERPRETED, ROWS, Letters, blocks, bounds, dense, prefill, quantized, step
from decode_kernels import attention as attending
from decode_kernels.digits import Digits, Left, empty_digits
from linear import Experts, Linear, QuantizedLinear, RMSNorm
from model import MLP, Attention, DecoderLayer, LayerCache, MoE, Transformer, gated, route


def use_(model: nn.Module, on: bool) -> None:
    """As `decode_kernels.use_`, for a model that lies on a GPU."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            if not (on and isinstance(module.fast, Quantized)):
                module.use_({8: INT8, 4: INT4}[module.bits] if on else None)
        elif isinstance(module, Linear):
            module.fast = DENSE if on else None
        elif isinstance(module, Attention):
            module.fast = attend if on and not module.qk_norm_whole else None
        elif isinstance(module, (RMSNorm, MLP, MoE)):
            module.fast = AROUND[type(module)] if on else None
        elif isinstance(module, Transformer):
            module.fast = begin if on else None
    mlps = {m.self_attn: m.mlp for m in model.modules() if isinstance(m, DecoderLayer) and isinstance(m.mlp, MLP)}
    gate_up = {key: m.gate_up_proj for key, m in mlps.items() if isinstance(m.gate_up_proj, QuantizedLinear)}
    for module in model.modules():
        if isinstance(module, Attention) and module.fast is not None and isinstance(module.o_proj.fast, Quantized):
            left = Left()
            module.fast = partial(attend, then=(left, gate_up.get(module)))
            module.o_proj.fast = Quantized(module.o_proj.fast.bits, left)
        elif isinstance(module, MLP) and module.silu and module.down_proj.in_features % 128 == 0:
            wide, down = module.gate_up_proj, module.down_proj
            if isinstance(wide.fast, Quantized) and isinstance(down.fast, Quantized):
                left = Left()
                wide.fast, down.fast = Quantized(wide.fast.bits, leave=left), Quantized(down.fast.bits, left)
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            link_(module)


def link_(layer: DecoderLayer) -> None:
    """Let o_proj leave the digits of its results, times the gain of the norm behind it, for gates and ups."""
    attention, norm, o = layer.self_attn, layer.post_attention_layernorm, layer.self_attn.o_proj
    if norm is None or attention.post_norm is not None or attention.tp.size > 1 or not isinstance(layer.mlp, MLP):
        return  # o_proj's result with its residual is not what the norm reads
    gate_up, left, n = layer.mlp.gate_up_proj, Left(norm.weight), o.out_features
    if isinstance(o.fast, Quantized) and isinstance(gate_up.fast, Quantized) and o.bias is None and not n % 128:
        o.fast = Quantized(o.fast.bits, o.fast.left, left)
        gate_up.fast = Quantized(gate_up.fast.bits, left, gate_up.fast.leave)


def serves(x: Tensor) -> bool:
    """Whether kernels take such activations, or those of a rehearsal (`ahead.py`). It asks no device, so that a
    compiled graph may contain it.
    """
    return x.dtype in (torch.bfloat16, torch.float16) and (INTERPRETED or x.is_cuda or x.is_meta)


def prefills(x: Tensor, rows: int) -> bool:
    """Whether `prefill.py` serves so many rows. A compiler does better: it fuses what these kernels do with others."""
    return rows > ROWS and serves(x) and not torch.compiler.is_compiling()


class Dense:
    """`Linear.fast` for 16-bit weights: see `linear.FastLinear`."""

    at_once = 2 * ROWS  # rows of activations in one launch

    def covers(self, linear: Linear) -> bool:
        return linear.in_features % 8 == 0

    def __call__(
        self, linear: Linear, x: Tensor, norm: RMSNorm | None, residual: Tensor | None, silu_mul: bool, experts: Experts
    ) -> Tensor | None:
        one, many = (experts, None) if isinstance(experts, int) else (None, experts)
        served = many is not None or len(x) <= (ROWS if one is not None else 2 * ROWS)
        if not served and prefills(x, len(x)):
            return prefill.linear(linear, x, norm, residual, silu_mul, one)
        product = self.product(linear, one, silu_mul)
        if product is None or not (served and serves(x) and self.covers(linear)):
            return None
        gain = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        if len(x) <= (ROWS if many is not None else self.at_once):
            return product(x, linear.bias, *gain, residual, silu_mul, many)
        parts = zip(*([None] * len(x) if t is None else t.split(ROWS) for t in (x, residual, many)))
        return torch.cat([product(rows, linear.bias, *gain, added, silu_mul, ids) for rows, added, ids in parts])

    def product(
        self, linear: Linear, one: int | None, silu_mul: bool, letters: Letters = None
    ) -> Callable[..., Tensor] | None:
        """The kernel with the weights of `linear`, or of one of its experts; None for a shape without one."""
        weight = linear.weight if one is None else linear.weight[one]
        product = dense.linear if letters is None else partial(dense.run, letters=letters)
        return lambda x, *others: product(x, weight, *others)


class Quantized(Dense):
    """`Linear.fast` for int8 and int4 weights: see `linear.FastQuantized`."""

    def __init__(self, bits: int, left: Callable[[Tensor], Any] | None = None, leave: Left | None = None) -> None:
        # left(x): the digits of x, if the kernel that computed it has left some; leave: who gets those of the results;
        # those of more rows than ROWS would not fit into a lane's registers
        self.bits, self.left, self.leave, self.at_once = bits, left, leave, ROWS

    def covers(self, linear: QuantizedLinear) -> bool:
        """A scale is one of a row, or of a group whose size is a power of two from 32 on."""
        group = linear.in_features // max(linear.weight_scale.shape[-1], 1)
        return group == linear.in_features or (group >= 32 and group & (group - 1) == 0)

    def product(
        self, linear: QuantizedLinear, one: int | None, silu_mul: bool, letters: Letters = None
    ) -> Callable[..., Tensor] | None:
        if silu_mul and linear.out_features % 32:  # gates and ups would share a tile
            return None
        operands = linear.operands(one)
        if letters is None and (self.left is self.leave is None or torch.compiler.is_compiling()):
            return lambda x, *others: quantized.linear(x, *operands, *others, self.bits)

        product = partial(quantized.run, bits=self.bits, letters=letters)

        def run(
            x: Tensor,
            bias: Tensor | None,
            gain: Tensor | None,
            eps: float,
            added: Tensor | None,
            *rest: Any,  # noqa: ANN401
        ) -> Tensor:
            digits = None if self.left is None else self.left(x)
            own, leave = (None, None) if letters else self.leaving(linear, x, bias, gain if silu_mul else added)
            y = product(x, *operands, bias, gain, eps, added, *rest, digits=digits, leave=leave)
            if self.leave is not None and own is not None:
                self.leave.keep(y, own)
            return y

        return run

    def leaving(
        self, linear: QuantizedLinear, x: Tensor, bias: Tensor | None, given: Tensor | None
    ) -> tuple[Digits | None, tuple[Tensor, ...] | None]:
        """What will be the digits of the results, and what `quantized.run` is told, if there are to be any. given: the
        gain of the norm before gates and ups, or the residual.
        """
        if self.leave is None or given is None or len(x) > 1:
            return None, None
        operands, after, known = linear.operands(None), self.leave.gain, linear.fast_constants
        n = linear.out_features // 2 if after is None else linear.out_features
        own = empty_digits(x, 2, n, norm=False)._replace(halves=True)
        if after is None:
            known = bounds.known_units(operands, bias, given, self.bits) if known is None else known
        else:
            known = bounds.unit_factors(operands, linear.in_features, after, self.bits) if known is None else known
            own = own._replace(squares=x.new_empty(n // 16, dtype=torch.float32))
        linear.fast_constants = known
        return own, (*own[:2], known, *[t for t in (after, own.squares) if t is not None])

    def pack(self, q: Tensor) -> Tensor:
        return quantized.pack(q, self.bits)

    def unpack(self, packed: Tensor, n: int, k: int) -> Tensor:
        return quantized.unpack(packed, self.bits)[..., :n, :k]

    def constants(self, linear: QuantizedLinear) -> Tensor | None:
        return None

    def matrix(self, linear: QuantizedLinear, experts: Experts, dtype: torch.dtype) -> Tensor | None:
        """By a kernel that reads the integers once: what a prefill multiplies by."""
        weight, scale, zero = linear.operands(experts)
        if weight.dim() > 3 or not (INTERPRETED or weight.is_cuda or weight.is_meta):
            return None
        return quantized.dequantize(weight, scale, zero, linear.out_features, linear.in_features, dtype, self.bits)


DENSE, INT8, INT4 = Dense(), Quantized(8), Quantized(4)


def attend(
    attention: Attention,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cache: LayerCache,
    end: int,
    then: attending.Then | None = None,
) -> Tensor | None:
    """`Attention.fast`: norms, rotation, cache write and attention. Up to 16 new tokens, whose positions must be
    consecutive in each row, take one kernel or two, which read the length on the device.
    """
    b, t, _ = qkv.shape
    if cache.k.dtype == qkv.dtype and prefills(qkv, t):
        return prefill.attend(attention, qkv, cos, sin, positions, cache, end)
    if t > ROWS or attention.head_dim % 8 or attention.head_dim > 256 or not serves(qkv) or cache.k.dtype != qkv.dtype:
        return None
    return attending.attend(attention, qkv, cos, sin, positions, cache, then)


def begin(model: Transformer, tokens: Tensor, positions: Tensor, which: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """`Transformer.fast`: the embedding and the angles, of one of the rotations, of up to 16 tokens a row."""
    table = model.embed_tokens.weight
    if not serves(table) or tokens.shape[1] > ROWS:
        return None
    half = model.config.head_dim // 2
    return step.embed(tokens, positions, table, model.inv_freq[which], model.rope_factors[which], model.first_id, half)


def few(x: Tensor) -> bool:
    """Whether `blocks.py` serves so many tokens. A compiler does better here, too."""
    return x.numel() // x.shape[-1] <= ROWS and serves(x) and not torch.compiler.is_compiling()


def add_norm(norm: RMSNorm, x: Tensor, residual: Tensor) -> Tensor:
    """`RMSNorm.fast`."""
    return blocks.add_norm(x, norm.weight, norm.eps, residual) if few(x) else residual + norm(x)


def gelu(h: Tensor) -> Tensor:
    """`MLP.fast`."""
    return blocks.gelu(h) if few(h) else gated(h)


def choose_experts(logits: Tensor, k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """`MoE.fast`, also in compiled layers."""
    return blocks.route(logits, k, normalise) if serves(logits) else route(logits, k, normalise)


AROUND: dict[type, Any] = {RMSNorm: add_norm, MLP: gelu, MoE: choose_experts}  # products

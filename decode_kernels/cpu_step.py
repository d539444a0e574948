"""One token through the layers on a CPU without a compiler: in as few calls of PyTorch and lookups as it takes.

Knows in which order a layer's norms, products and attention come. Refuses to know how they are computed: that is
`cpu.py` and `cpu_attention.py`. The weights, which a processor reads for every token, drive the interpreter out of its
caches, so that a call or the lookup of a module's field takes several times as long as in a loop of its own: a token of
SmolLM2-135M took 33 ms on two cores with AVX2 where modules called each other, and takes 24, half of it the weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decode_kernels import cpu, cpu_blocks, cpu_int4
from decode_kernels.cpu_attention import Token
from decode_kernels.cpu_blocks import Row
from decode_kernels.cpu_prompt import MANY, prompts_of
from linear import Linear, QuantizedLinear, RMSNorm
from model import MLP, DecoderLayer, LayerCache, Select, Transformer


class Layers:
    """What calls a layer, or the head: `run` of `Transformer.forward`."""

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
        self.prompts = prompts_of(layers)
        self.steps: dict[nn.Module, Callable[..., Tensor] | None] = {layer: step_of(layer) for layer in layers}
        if isinstance(model, Transformer) and (product := row(model.lm_head, model.norm.weight.dtype, model.norm)):
            self.steps[model.lm_head] = lambda x, norm: product(x.view(1, -1))[None]

    def __call__(self, module: nn.Module, x: Tensor, *args: Any, **options: Any) -> Tensor:  # noqa: ANN401
        one, tokens, step = x.shape[0] == 1, x.shape[1], None
        if one and (tokens == 1 or tokens >= MANY):
            step = (self.steps if tokens == 1 else self.prompts).get(module)
        y: Tensor = (step or module)(x, *args, **options)
        return y


class Step:
    """`DecoderLayer.forward` for x [1, 1, D]."""

    def __init__(self, layer: DecoderLayer, qkv: Row, o: Row) -> None:
        self.qkv, self.attend, self.o = qkv, Token(layer.self_attn), o
        self.mlp, self.norm = layer.mlp, layer.post_attention_layernorm
        self.gate_up = self.down = None
        if isinstance(self.mlp, MLP) and self.mlp.silu and self.mlp.post_norm is None and self.norm is not None:
            self.gate_up = row(self.mlp.gate_up_proj, self.norm.weight.dtype, self.norm)
            self.down = row(self.mlp.down_proj, self.norm.weight.dtype)

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: LayerCache, end: int, select: Select = None
    ) -> Tensor:  # the one token is what is selected
        x = x.view(1, -1)
        x = self.o(self.attend(self.qkv(x), cos, sin, positions, cache)).add_(x)
        if self.gate_up is None or self.down is None:
            y: Tensor = self.mlp(x[None], self.norm)
            return y
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate).mul_(up)).add_(x)[None]


def step_of(layer: DecoderLayer) -> Step | None:
    """What computes this layer, if its fast paths do."""
    attention, norm = layer.self_attn, layer.input_layernorm
    if attention.fast is None or attention.post_norm is not None or attention.tp.size > 1 or norm is None:
        return None
    qkv, o = row(attention.qkv_proj, norm.weight.dtype, norm), row(attention.o_proj, norm.weight.dtype)
    return None if qkv is None or o is None else Step(layer, qkv, o)


def row(linear: Linear, dtype: torch.dtype, norm: RMSNorm | None = None) -> Row | None:
    """The product of one row x [1, K], or of norm(x), with the bias; None where the fast path does not serve it."""
    fast, bias, x = linear.fast, linear.bias, torch.empty(1, linear.in_features, dtype=dtype)
    ordered = isinstance(linear, QuantizedLinear) and linear.permutation is not None
    if not isinstance(fast, cpu.Dense) or dtype not in cpu.HALVES or ordered or not fast.serves(linear, x, None):
        return None
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    product: Row
    if fast is cpu.BLOCKS:
        product = cpu_blocks.Bags(linear.weight, weight, eps)
    elif fast is cpu.BYTES and isinstance(linear, QuantizedLinear):
        product = cpu_blocks.ByteBags(linear.weight_packed, linear.weight_scale, weight, eps, len(x[0]), dtype)
    else:
        product = partial(fast.product, linear, one=None)
        if fast is cpu.INT4 and isinstance(linear, QuantizedLinear):
            product = cpu_int4.row(*cpu.INT4.packed(linear)[:2])
        if weight is not None:
            plain = product
            product = lambda x: plain(cpu_blocks.normed(x, weight, eps))  # noqa: E731
    return product if bias is None else lambda x: product(x).add_(bias)

"""A prompt through the layers on a CPU, where many rows are multiplied in float32.

Knows which results of a layer need not be rounded, transposed and put in order before the next operation takes them.
Refuses to know how products and attention are computed: that is `cpu_products.py` and `cpu_attention.py`.

Modules hand on bf16 [M, N]. A product W x^T gives float32 [N, M], and int4's rows come in the order of their digits. An
MLP's neurons may have any order: its gate is computed as they come, and the next product takes the columns of its
weight in that order, which costs nothing. The sum of all blocks, the residual stream, stays in float32. So 128 tokens
of SmolLM2-135M take 363 to 379 ms in int4 instead of 395 to 466 (two cores with AVX2, two times in turn).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from decode_kernels import cpu, cpu_blocks
from decode_kernels.cpu_attention import attend
from decode_kernels.cpu_products import Product, wide
from linear import Int4Linear, Linear, QuantizedLinear, RMSNorm
from model import MLP, DecoderLayer, LayerCache, Select

MANY = 33  # tokens from which this is faster for every format than the modules


class Prompt:
    """`DecoderLayer.forward` for x [1, T, D], which is float32 from the first layer to the last."""

    def __init__(self, layer: DecoderLayer, qkv: Product, o: Product, before: RMSNorm, last: bool) -> None:
        self.attention, self.qkv, self.o, self.before, self.last = layer.self_attn, qkv, o, before, last
        self.mlp, self.behind, self.dtype = layer.mlp, layer.post_attention_layernorm, before.weight.dtype
        self.gate_up = self.down = None
        if isinstance(self.mlp, MLP) and self.mlp.silu and self.mlp.post_norm is None and self.behind is not None:
            self.gate_up = product(self.mlp.gate_up_proj, self.dtype)
            self.down = self.gate_up and following(self.mlp, self.gate_up, self.dtype)

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: LayerCache, end: int, select: Select = None
    ) -> Tensor:
        rows = x[0].float()  # a copy, or what the layer before has made: written in place
        qkv = self.qkv(normed(rows, self.before), torch.float32).contiguous()
        y = attend(self.attention, qkv[None], cos, sin, positions, cache, end)
        assert y is not None
        if select is not None:
            x, y = (part.index_select(0, select).to(self.dtype)[:, None] for part in (rows, y[0]))
            return self.through(self.attention.o_proj(y, residual=x))
        self.o.add_(rows, y[0])
        if self.gate_up is None or self.down is None or self.behind is None:
            return self.through(rows.to(self.dtype)[None])
        self.down.add_(rows, self.gate_up.gated(normed(rows, self.behind)))
        return (rows.to(self.dtype) if self.last else rows)[None]

    def through(self, x: Tensor) -> Tensor:
        """The MLP as a module."""
        y: Tensor = self.mlp(x, self.behind)
        return y


def normed(x: Tensor, norm: RMSNorm) -> Tensor:
    return cpu_blocks.normed_rows(x, norm.weight, norm.eps)


def prompts_of(layers: Sequence[DecoderLayer]) -> dict[nn.Module, Prompt]:
    """What computes these layers, if the fast paths of all do and multiply many rows in float32."""
    found: dict[nn.Module, Prompt] = {}
    for layer in layers:
        attention, before = layer.self_attn, layer.input_layernorm
        if attention.fast is None or attention.post_norm is not None or attention.tp.size > 1 or before is None:
            return {}
        qkv, o = (product(linear, before.weight.dtype) for linear in (attention.qkv_proj, attention.o_proj))
        if qkv is None or o is None:
            return {}
        found[layer] = Prompt(layer, qkv, o, before, layer is layers[-1])
    return found


def product(linear: Linear, dtype: torch.dtype, entering: tuple[int, int] | None = None) -> Product | None:
    """Of many rows by this linear; None where the fast path does not serve them."""
    fast, x = linear.fast, torch.empty(MANY, linear.in_features, dtype=dtype)
    ordered = isinstance(linear, QuantizedLinear) and linear.permutation is not None
    if not isinstance(fast, cpu.Dense) or dtype not in cpu.HALVES or wide(dtype) == dtype or ordered:
        return None
    many = fast.many(linear, entering) if fast.serves(linear, x, None) else None
    if many is not None:
        many.bias = linear.bias
    return many


def following(mlp: MLP, gate_up: Product, dtype: torch.dtype) -> Product | None:
    """What takes the gate as `gate_up` leaves it."""
    down, order = mlp.down_proj, gate_up.leaving
    group = down.in_features // down.weight_scale.shape[-1] if isinstance(down, Int4Linear) else 0
    fits = order is None or (group > 0 and group % math.prod(order) == 0)
    fits = fits and down.in_features % gate_up.unit == 0 and gate_up.bias is None
    return product(down, dtype, order) if fits else None

"""Attention on a CPU: norms and rotation of the heads, the cache, and the filled slots alone.

Knows in how few calls of PyTorch a step does that. Refuses to know what comes before and after it.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from decode_kernels import cpu_loops
from model import DECODE_TOKENS, Attention, LayerCache, rotate
from model import attend as plain


def attend(
    attention: Attention, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: LayerCache, end: int
) -> Tensor | None:
    """`Attention.fast`: new tokens of one sequence, whose positions must be consecutive; it reads the slots that are
    filled and no others: qkv [1, T, (H + 2 Hkv) Dh] -> [1, T, H Dh]. With more than a few of them qkv may be in float32
    where the cache is not.
    """
    b, t, _ = qkv.shape
    compiling = torch.compiler.is_compiling()
    if b > 1 or (t > 1 and compiling):
        return None
    if t == 1 and not compiling:
        return Token(attention)(qkv, cos, sin, positions, cache)[None]
    h, hkv, dh = attention.num_heads, attention.num_kv_heads, attention.head_dim
    heads = qkv.view(t, h + 2 * hkv, dh)
    turned = heads[:, : h + hkv]
    if attention.q_norm is not None and attention.k_norm is not None:
        norms = ((turned[:, :h], attention.q_norm), (turned[:, h:], attention.k_norm))
        turned = torch.cat([F.rms_norm(x, (dh,), norm.weight.to(x.dtype), norm.eps) for x, norm in norms], 1)
    if compiling:
        turned = rotate(turned, cos[0], sin[0])
        cache.write_(positions, turned[None, :, h:], heads[None, :, h + hkv :])
        k, v = cache.k[0].narrow(1, 0, end), cache.v[0].narrow(1, 0, end)
        y = cpu_loops.attention(turned[0, :h], k, v, positions[0], attention.window)
        return y.to(qkv.dtype)
    cos, sin, start = _step(cos, sin, positions)
    turned = _turned(turned.float(), cos, sin).to(qkv.dtype)
    end, first = start + t, max(0, start + 1 - attention.window) if attention.window else 0
    k, v = cache.k[:, :, first:end], cache.v[:, :, first:end]
    k[0, :, -t:], v[0, :, -t:] = turned[:, h:].transpose(0, 1), heads[:, h + hkv :].transpose(0, 1)
    if t > DECODE_TOKENS:
        q, k, v = turned[None, :, :h], cache.k[:, :, :end].to(qkv.dtype), cache.v[:, :, :end].to(qkv.dtype)
        return plain(q, k, v, positions, attention.window).flatten(2)
    q = turned[:, :h].reshape(t, hkv, h // hkv, dh).permute(1, 2, 0, 3).reshape(1, hkv, h // hkv * t, dh)
    slots, at = torch.arange(first, end), positions[0, :, None]
    mask = (slots <= at) & (slots > at - (attention.window or end))  # row m of q is token m % t
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(h // hkv, 1))
    return y.view(hkv, h // hkv, t, dh).permute(2, 0, 1, 3).reshape(1, t, h * dh)


class Token:
    """The same for one token, [1, (H + 2 Hkv) Dh] -> [1, H Dh], with what is the attention's looked up once."""

    def __init__(self, attention: Attention) -> None:
        self.h, self.hkv, self.dh = attention.num_heads, attention.num_kv_heads, attention.head_dim
        self.norms, self.window = (attention.q_norm, attention.k_norm), attention.window

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: LayerCache) -> Tensor:
        h, hkv, dh = self.h, self.hkv, self.dh
        cos, sin, slot = _step(cos, sin, positions)
        turned, v = qkv.view(1, h + 2 * hkv, dh).split((h + hkv, hkv), 1)
        q_norm, k_norm = self.norms
        if q_norm is not None and k_norm is not None:
            turned = torch.cat((q_norm(turned[:, :h]), k_norm(turned[:, h:])), 1)
        turned = _turned(turned, cos, sin)
        q, k = turned.split((h, hkv), 1)
        keys, values = cache._buffers["k"], cache._buffers["v"]  # `nn.Module.__getattr__` takes a microsecond
        assert keys is not None and values is not None
        keys.select(2, slot).copy_(k)
        values.select(2, slot).copy_(v)
        first = max(0, slot + 1 - self.window) if self.window else 0
        k, v = keys.narrow(2, first, slot + 1 - first), values.narrow(2, first, slot + 1 - first)
        return F.scaled_dot_product_attention(q.view(1, hkv, -1, dh), k, v).view(1, -1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`model.rotate` in five operations instead of ten, for the factors of `_step`."""
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


@lru_cache(4)  # a step's layers turn by the same angles, or by one of two
def _step(cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, int]:
    """Of cos and sin [1, T, 1, Dh / 2] the factors [T, 1, Dh] of x and of x with its halves exchanged; the first of the
    positions.
    """
    return torch.cat((cos[0], cos[0]), -1), torch.cat((-sin[0], sin[0]), -1), int(positions[0, 0])

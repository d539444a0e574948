"""The decoder: configuration, KV cache, attention, MLP, mixture of experts, rotary embedding.

Knows the mathematics of Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen3-MoE, Phi-3, Gemma 3, SmolLM3, OLMo 2 and Granite.
Refuses to know files, sampling and compilation.

Legend: B batch, T new tokens, S cache slots, D hidden, H query heads, Hkv key/value heads, Dh head dim, F MLP width, V
vocabulary, L layers, E experts, M = B * T rows. Under tensor parallelism H, Hkv, F and V are this rank's share wherever
a module says `local`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear import Linear, RMSNorm
from tp import TensorParallel

FastSum = Callable[[Linear, Tensor, Tensor | None], Tensor | None] | None  # of proj(y) + residual over ranks
Select: TypeAlias = Tensor | None  # int64: those of the B * T tokens whose results are wanted; None: all
DECODE_TOKENS = 16  # up to so many new tokens (of a row) or rows (of a layer) are a decode step, more are a prefill


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) and its scalings; names as in config.json, see `checkpoint.py`."""

    rope_theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] = ()  # longrope: what divides each frequency

    def frequencies(self, dim: int, max_position_embeddings: int) -> tuple[Tensor, float]:
        """(inverse frequencies float32 [dim / 2], factor on cos and sin). `dynamic` is the unscaled table: exact up to
        the original context.
        """
        power = torch.arange(0, dim, 2).float() / dim
        inv_freq = 1.0 / self.rope_theta**power
        original = self.original_max_position_embeddings or max_position_embeddings
        if self.rope_type == "longrope":  # Ding et al. 2024, section 3.2
            return inv_freq / torch.tensor(self.factors), self.attention_factor or 1.0
        if self.rope_type == "linear":
            return inv_freq / self.factor, 1.0
        if self.rope_type == "llama3":  # Llama 3.1: scale long wavelengths, keep short ones, blend between
            turns = original * inv_freq / (2 * math.pi)
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = keep.clamp(0, 1)
            return keep * inv_freq + (1 - keep) * inv_freq / self.factor, 1.0
        if self.rope_type == "yarn":
            return self._yarn(inv_freq, dim, original)
        return inv_freq, 1.0

    def _yarn(self, inv_freq: Tensor, dim: int, original: int) -> tuple[Tensor, float]:
        """YaRN, Peng et al. 2023, section 3: NTK-by-parts (equations 17-23) and the attention temperature."""

        def correction(turns: float) -> float:
            return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(self.rope_theta))

        low, high = correction(self.beta_fast), correction(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = ((torch.arange(dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
        attention = self.attention_factor
        if attention is None:
            scale = 0.1 * math.log(self.factor) if self.factor > 1 else 0.0
            attention = 1 + scale
            if self.mscale and self.mscale_all_dim:
                attention = (1 + scale * self.mscale) / (1 + scale * self.mscale_all_dim)
        return inv_freq / self.factor * ramp + inv_freq * (1 - ramp), attention


@dataclass(frozen=True)
class ModelConfig:
    """The global truth about a model, in Hugging Face's names; never edited, not even under tensor parallelism."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int  # the first numbers of a head, which RoPE turns: all, but in Phi-4-mini
    rms_norm_eps: float
    max_position_embeddings: int
    ropes: tuple[Rope, ...]  # the rotations: one; or two, of layers (Gemma 3, SmolLM3) or of long sequences (LongRoPE)
    layer_ropes: tuple[int, ...]  # per layer: which of them
    windows: tuple[int, ...]  # per layer: keys a query sees, itself included; 0 means all
    sparse: tuple[bool, ...]  # per layer: mixture of experts instead of one MLP
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    query_scale: float = 1.0  # of the scores, besides 1 / sqrt(Dh) (Gemma 3, Granite)
    embedding_multiplier: float = 1.0  # Gemma 3, Granite
    logits_scaling: float = 1.0  # what divides the logits (Granite)
    hidden_act: str = "silu"  # or gelu_pytorch_tanh (Gemma 3)
    pre_norms: bool = True  # before attention and MLP
    post_norms: bool = False  # behind them, before the residual is added (Gemma 3, OLMo 2)
    qk_norm_whole: bool = False  # queries and keys are normed over all heads at once (OLMo 2)

    def long(self, slots: int) -> bool:
        """Whether sequences of so many slots are turned by LongRoPE's second rotation."""
        return self.ropes[0].rope_type == "longrope" and slots > (self.ropes[0].original_max_position_embeddings or 0)


class LayerCache(nn.Module):
    """Keys and values of one layer: two buffers [B, Hkv local, S, Dh] that are written in place."""

    k: Tensor
    v: Tensor

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("v", torch.zeros(shape, device=device, dtype=dtype), persistent=False)

    def write_(self, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [B, T, Hkv, Dh] into the slots `positions` [B, T] of each row."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.k[rows, :, positions], self.v[rows, :, positions] = k, v


class KVCache(nn.Module):
    """The static cache of one generation: whoever decodes owns one and passes it to `Transformer.forward`.

    A slot's content depends only on the ids before it, so rows may be at different positions, and a padded slot is
    simply overwritten before any query is allowed to see it.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_seq_len: int,
        device: torch.device,
        dtype: torch.dtype,
        tp: TensorParallel = TensorParallel(),
    ) -> None:
        super().__init__()
        first, last = tp.span(config.num_key_value_heads, "num_key_value_heads")
        shape = (batch_size, last - first, max_seq_len, config.head_dim)
        self.layers = nn.ModuleList(LayerCache(shape, device, dtype) for _ in range(config.num_hidden_layers))
        # keys that were turned for a short sequence are of no use to a long one
        self.batch_size, self.max_seq_len, self.long = batch_size, max_seq_len, config.long(max_seq_len)


def attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int) -> Tensor:
    """Causal attention of q [B, T, H, Dh] over slots k, v [B, Hkv, S, Dh]; query t of row b sees slots <= positions[b,
    t].

    Returns [B, T, H, Dh]. With S == T the queries are the slots themselves, so plain causal attention needs no mask.
    A few queries (decode) read K and V once for all query heads of a group; nothing is repeated.
    """
    (B, T, H, Dh), (_, Hkv, S, _) = q.shape, k.shape
    if S == T and not 0 < window < T:
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=Hkv != H)
        return y.transpose(1, 2)
    slots, at = torch.arange(S, device=q.device), positions[:, None, :, None]
    mask = (slots <= at) & (slots > at - (window or S))  # [B, 1, T, S]
    if T > DECODE_TOKENS:
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=Hkv != H)
        return y.transpose(1, 2)
    grouped = q.view(B, T, Hkv, H // Hkv, Dh).permute(0, 2, 3, 1, 4).reshape(B, Hkv, H // Hkv * T, Dh)
    scores = (grouped @ k.transpose(-1, -2)).float().view(B, Hkv, H // Hkv, T, S) * Dh**-0.5
    probs = torch.softmax(scores.masked_fill(~mask[:, :, None], float("-inf")), -1)
    y = probs.to(v.dtype).view(B, Hkv, H // Hkv * T, S) @ v
    return y.view(B, Hkv, H // Hkv, T, Dh).permute(0, 3, 1, 2, 4).reshape(B, T, H, Dh)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding (Su et al. 2021) of x [..., Dh] by cos, sin [..., Dh/2], in float32."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


def angles(positions: Tensor, inv_freq: Tensor, factor: float = 1.0, half: int = 0) -> tuple[Tensor, Tensor]:
    """cos, sin float32 [B, T, 1, Dh/2] of positions int64 [B, T]: a few hundred numbers, cheaper than a table. Of a
    head with `half` pairs those for which there is no frequency do not turn.
    """
    angle, rest = positions[:, :, None, None] * inv_freq, max(half - inv_freq.shape[0], 0)
    cos, sin = (angle.cos(), angle.sin()) if factor == 1 else (angle.cos() * factor, angle.sin() * factor)
    return (F.pad(cos, (0, rest), value=1.0), F.pad(sin, (0, rest))) if rest else (cos, sin)


def add_to(x: Tensor, proj: Linear, y: Tensor, post_norm: RMSNorm | None, tp: TensorParallel, fast: FastSum) -> Tensor:
    """x + proj(y), summed over ranks; with a norm behind the block x + post_norm(proj(y)), which no product fuses."""
    # without that norm the residual enters the sum over ranks, once, through rank 0
    added = x if tp.rank == 0 and post_norm is None else None
    out = None if fast is None else fast(proj, y, added)
    out = tp.all_reduce(proj(y, residual=added)) if out is None else out
    return out if post_norm is None else post_norm.fast(post_norm, out, x) if post_norm.fast else x + post_norm(out)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with its projections, cache write and residual add."""

    fast: Callable[..., Tensor | None] | None = None  # set by `decode_kernels.use_`; None: plain PyTorch
    fast_sum: FastSum = None  # for `add_to`

    def __init__(self, config: ModelConfig, layer: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.num_heads = tp.local(config.num_attention_heads, "num_attention_heads")
        first, last = tp.span(config.num_key_value_heads, "num_key_value_heads")
        self.num_kv_heads = last - first
        self.head_dim, self.window, self.qk_norm_whole = config.head_dim, config.windows[layer], config.qk_norm_whole
        out = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, out, config.qkv_bias)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size, config.o_bias)
        q, k = (self.num_heads, self.num_kv_heads) if config.qk_norm_whole else (1, 1)
        self.q_norm = RMSNorm(q * config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(k * config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if config.post_norms else None

    def forward(
        self, x: Tensor, norm: RMSNorm | None, cos: Tensor, sin: Tensor, positions: Tensor, cache: LayerCache, end: int
    ) -> Tensor:
        """x [B, T, D] -> x + attention(norm(x)); keys and values of the new tokens go into the cache."""
        qkv = self.qkv_proj(x, norm=norm)  # [B, T, (H + 2 Hkv) Dh]
        y = None if self.fast is None else self.fast(self, qkv, cos, sin, positions, cache, end)
        if y is None:
            y = self.attend(qkv, cos, sin, positions, cache, end)
        return add_to(x, self.o_proj, y, self.post_norm, self.tp, self.fast_sum)

    def attend(self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: LayerCache, end: int) -> Tensor:
        """Heads, their norms and rotation, the cache, and attention over its first `end` slots: [B, T, H Dh]."""
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(heads, 2)
        if self.q_norm is not None and self.k_norm is not None:
            norm = self.norm_whole if self.qk_norm_whole else RMSNorm.__call__
            q, k = norm(self.q_norm, q), norm(self.k_norm, k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        cache.write_(positions, k, v)
        return attend(q, cache.k[:, :, :end], cache.v[:, :, :end], positions, self.window).flatten(2)

    def norm_whole(self, norm: RMSNorm, x: Tensor) -> Tensor:
        """x [B, T, H, Dh] normed over the heads of all ranks at once (OLMo 2)."""
        heads = x.flatten(2).float()
        square = self.tp.all_reduce(heads.square().mean(-1, keepdim=True) / self.tp.size)
        return (heads * (square + norm.eps).rsqrt() * norm.weight).to(x.dtype).view_as(x)


def gated(h: Tensor) -> Tensor:
    """gelu(gate) * up of h [..., 2 F], the gates first."""
    gate, up = h.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020), norm before and residual after fused in; or gelu instead of silu."""

    fast: Callable[[Tensor], Tensor] | None = None  # instead of `gated`
    fast_sum: FastSum = None  # for `add_to`

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        width = tp.local(config.intermediate_size, "intermediate_size")
        self.gate_up_proj = Linear(config.hidden_size, 2 * width, config.mlp_bias)
        self.down_proj = Linear(width, config.hidden_size, config.mlp_bias)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if config.post_norms else None
        self.silu = config.hidden_act == "silu"

    def forward(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        h = self.gate_up_proj(x, norm=norm, silu_mul=self.silu)
        h = h if self.silu else (self.fast or gated)(h)
        return add_to(x, self.down_proj, h, self.post_norm, self.tp, self.fast_sum)


class Experts(nn.Module):
    """E MLPs stored as two stacked weights."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        E, width = config.num_experts, tp.local(config.moe_intermediate_size, "moe_intermediate_size")
        self.gate_up_proj = Linear(config.hidden_size, 2 * width, num_experts=E)
        self.down_proj = Linear(width, config.hidden_size, num_experts=E)

    def forward(self, x: Tensor, experts: Tensor | int) -> Tensor:
        return self.down_proj(self.gate_up_proj(x, silu_mul=True, experts=experts), experts=experts)


def route(logits: Tensor, k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """logits [M, E] -> weights float32 and ids of the chosen experts, both [M, k]."""
    weights, chosen = torch.softmax(logits.float(), -1).topk(k, -1)
    return weights / weights.sum(-1, keepdim=True) if normalise else weights, chosen


class MoE(nn.Module):
    """Sparse mixture of experts (Mixtral, Jiang et al. 2024): the router picks num_experts_per_tok experts for each
    row.

    A few rows (decode) read the chosen experts' weights and no others, with shapes that do not depend on the choice.
    The decode of many rows, which choose most experts anyway, computes every expert for all: no shape depends on the
    choice there either, so it can be captured. A prefill goes expert by expert, which needs one host synchronisation.
    """

    fast: Callable[..., tuple[Tensor, Tensor]] | None = None  # instead of `route`

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.top_k, self.normalise = tp, config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config, tp)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        h = norm(x).flatten(0, 1)  # [M, D]
        weights, chosen = (self.fast or route)(self.gate(h), self.top_k, self.normalise)  # [M, k]
        if h.shape[0] <= DECODE_TOKENS:
            y = self.experts(h.repeat_interleave(self.top_k, 0), chosen.flatten()).view(*chosen.shape, -1)
            y = (y * weights.unsqueeze(-1)).sum(1)
        elif x.shape[1] <= DECODE_TOKENS:
            y = torch.zeros_like(h, dtype=torch.float32)
            for e in range(self.experts.gate_up_proj.num_experts):
                share = (weights * (chosen == e)).sum(-1, keepdim=True)
                y = y + torch.where(share > 0, self.experts(h, e) * share, 0.0)
        else:
            y = torch.zeros_like(h, dtype=torch.float32)
            for e in chosen.unique().tolist():
                rows, slot = torch.where(chosen == e)
                y.index_add_(0, rows, self.experts(h[rows], e) * weights[rows, slot, None])
        return x + self.tp.all_reduce(y.to(x.dtype)).view_as(x)


class DecoderLayer(nn.Module):
    """Attention and MLP. The norms before them bear Llama's names; those behind them are theirs (`post_norm`)."""

    def __init__(self, config: ModelConfig, layer: int, tp: TensorParallel) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if config.pre_norms else None
        self.self_attn = Attention(config, layer, tp)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if config.pre_norms else None
        self.mlp = (MoE if config.sparse[layer] else MLP)(config, tp)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: LayerCache, end: int, select: Select = None
    ) -> Tensor:
        """x [B, T, D] -> the same; with select int64 [N] of so many of the B * T tokens alone, [N, 1, D]."""
        x = self.self_attn(x, self.input_layernorm, cos, sin, positions, cache, end)
        x = x if select is None else x.flatten(0, 1).index_select(0, select)[:, None]
        return self.mlp(x, self.post_attention_layernorm)


class Transformer(nn.Module):
    """The whole decoder. Build it under `torch.device("meta")`; `checkpoint.py` fills it."""

    fast: Callable[..., tuple[Tensor, Tensor, Tensor] | None] | None = None  # of `embed`; None: plain PyTorch
    inv_freq: Tensor

    def __init__(self, config: ModelConfig, tp: TensorParallel = TensorParallel()) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        self.vocab_local = tp.padded(config.vocab_size)
        self.first_id = tp.rank * self.vocab_local  # this rank's share of the embedding begins with this token
        # from_pretrained: nn.Embedding's own initialisation on the meta device imports sympy, a second of every start
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(self.vocab_local, config.hidden_size))
        self.layers = nn.ModuleList(DecoderLayer(config, i, tp) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, self.vocab_local)
        self.register_buffer("inv_freq", torch.empty(1, config.rotary_dim // 2), persistent=False)
        self.rope_factors = [1.0]

    def init_rope_(self, device: torch.device) -> None:
        """Compute the rotary frequencies of every rotation: float32, on the device, after everything else is loaded (no
        `.to(dtype)` may touch them).
        """
        c = self.config
        tables, factors = zip(*(rope.frequencies(c.rotary_dim, c.max_position_embeddings) for rope in c.ropes))
        self.inv_freq = torch.stack(tables).to(device)
        # a factor meets queries and keys, so its square scales the scores
        self.rope_factors = [factor * c.query_scale**0.5 for factor in factors]

    def embed(self, tokens: Tensor, positions: Tensor, which: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """tokens, positions int64 [B, T] -> [B, T, D] and what `rope` returns; each rank looks up its slice of the
        vocabulary and the others add zeros.
        """
        begun = None if self.fast is None else self.fast(self, tokens, positions, which)
        x, cos, sin = (self.look_up(tokens), *self.rope(positions, which)) if begun is None else begun
        return self.tp.all_reduce(x if (scale := self.config.embedding_multiplier) == 1 else x * scale), cos, sin

    def look_up(self, tokens: Tensor) -> Tensor:
        """[B, T, D]: zeros for tokens of other ranks' slices."""
        if self.tp.size == 1:
            return self.embed_tokens(tokens)
        at = tokens - self.first_id
        here = (at >= 0) & (at < self.vocab_local)
        return self.embed_tokens(at.where(here, 0)) * here[..., None]

    def rope(self, positions: Tensor, which: int = 0) -> tuple[Tensor, Tensor]:
        """cos, sin float32 [B, T, 1, Dh / 2] of one of the rotations."""
        return angles(positions, self.inv_freq[which], self.rope_factors[which], self.config.head_dim // 2)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache,
        run: Callable[..., Tensor] = nn.Module.__call__,
        *,
        end: int,
        select: Select = None,
        whole: bool = True,
    ) -> Tensor:
        """tokens, positions int64 [B, T] -> logits in the activations' dtype: [B, T, V], or with select, int64 [B],
        those of so many of the B * T tokens alone, [B, 1, V]. whole False: of this rank's words alone.

        Keys and values of the new tokens are written to `cache` at `positions`. end: how many cache slots attention may
        look at, a host integer above every position; end == T says that the tokens are slots 0..T-1 of every row (a
        first prefill). run: what calls a layer, or the head; one compiled function serves all layers. The last layer is
        asked for the selected tokens alone: no layer follows that would attend to the others.
        """
        which = [int(cache.long or rope) for rope in self.config.layer_ropes]
        x, cos, sin = self.embed(tokens, positions, which[0])
        ropes = {i: (cos, sin) if i == which[0] else self.rope(positions, i) for i in dict.fromkeys(which)}
        for layer, layer_cache, i in zip(self.layers, cache.layers, which):
            wanted = {} if select is None or layer is not self.layers[-1] else {"select": select}
            x = run(layer, x, *ropes[i], positions, layer_cache, end, **wanted)
        logits = run(self.lm_head, x, norm=self.norm)  # of ranks whose shares of the vocabulary may be padded
        return self.tp.all_gather(logits)[..., : self.config.vocab_size].contiguous() if whole else logits

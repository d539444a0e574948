"""The decoder against transformers: same random weights, float32, prefill whole and in chunks, cached decode."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
from model import DECODE_TOKENS, KVCache, Rope, Transformer, attend

CPU = torch.device("cpu")
T = 64

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5], "long_factor": [1.0, 2.2, 3.1, 4.7, 6.0, 9.5]}
PARTIAL = {"pad_token_id": 0, "max_position_embeddings": 256, "partial_rotary_factor": 0.75}
GEMMA = {"pad_token_id": 0, "head_dim": 16, "sliding_window": 13, "query_pre_attn_scalar": 40}
GEMMA |= {"num_hidden_layers": 7}  # the sixth has no window
NOPE = {"pad_token_id": 0, "num_hidden_layers": 4}
MULTIPLIERS = {"embedding_multiplier": 12.0, "attention_multiplier": 0.15, "residual_multiplier": 0.22}
MULTIPLIERS |= {"logits_scaling": 1.7}
MOE = {"num_experts": 6, "moe_intermediate_size": 40, "num_experts_per_tok": 2}
CASES = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa-odd": (
        "llama",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 22,
            "hidden_size": 51,
            "intermediate_size": 37,
        },
    ),
    "llama-odd-vocabulary": ("llama", {"vocab_size": 211, "hidden_size": 54, "num_attention_heads": 6, "head_dim": 10}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-eps-theta": (
        "llama",
        {"rms_norm_eps": 0.01, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    ),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-untruncated": (
        "llama",
        {"rope_parameters": YARN | {"truncate": False, "beta_fast": 16.0, "beta_slow": 2.0}},
    ),
    "llama-yarn-mscale": ("llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
    "llama-yarn-attention-factor": ("llama", {"rope_parameters": YARN | {"attention_factor": 1.21}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 13}),
    "mistral-window-head-dim": ("mistral", {"sliding_window": 1, "head_dim": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2-window-unused": ("qwen2", {"use_sliding_window": False, "sliding_window": 5}),
    "qwen2-window-upper-layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen2-layer-types": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-bias-tied-window": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 11,
            "max_window_layers": 1,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral-window-top3": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 20}),
    "qwen3-moe": ("qwen3_moe", MOE | {"norm_topk_prob": False}),
    "qwen3-moe-normalised": ("qwen3_moe", MOE | {"norm_topk_prob": True, "head_dim": 24}),
    "qwen3-moe-some-dense": (
        "qwen3_moe",
        MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "phi3-tied-window": ("phi3", {"pad_token_id": 0, "tie_word_embeddings": True, "sliding_window": 13}),
    "phi3-partial": ("phi3", PARTIAL),
    "phi3-odd": (
        "phi3",
        {"pad_token_id": 0, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 66}
        | {"intermediate_size": 37, "vocab_size": 211},
    ),
    "phi3-longrope-long": (
        "phi3",
        PARTIAL
        | {"rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75}, "original_max_position_embeddings": 32},
    ),
    "phi3-longrope-short": (
        "phi3",
        PARTIAL
        | {"rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75}, "original_max_position_embeddings": 80},
    ),
    "phi3-longrope-factor": (
        "phi3",
        PARTIAL
        | {"rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75, "attention_factor": 1.3, "factor": 3.0}}
        | {"original_max_position_embeddings": 32},
    ),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3-odd": (
        "gemma3_text",
        GEMMA
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 22, "hidden_size": 51}
        | {"intermediate_size": 37, "vocab_size": 211, "num_hidden_layers": 3, "sliding_window": 1},
    ),
    "gemma3-untied-biases": ("gemma3_text", GEMMA | {"tie_word_embeddings": False, "attention_bias": True}),
    "gemma3-ropes": (
        "gemma3_text",
        GEMMA
        | {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
        | {"rope_parameters": {"full_attention": YARN, "sliding_attention": LLAMA3}},
    ),
    "smollm3": ("smollm3", NOPE),
    "smollm3-window": ("smollm3", NOPE | {"use_sliding_window": True, "sliding_window": 9, "mlp_bias": True}),
    "smollm3-yarn": (
        "smollm3",
        NOPE | {"no_rope_layers": [0, 1], "num_hidden_layers": 2, "rope_parameters": YARN, "attention_bias": True},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2-odd": (
        "olmo2",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 66, "intermediate_size": 37}
        | {"vocab_size": 211, "attention_bias": True},
    ),
    "granite": ("granite", MULTIPLIERS),
    "granite-biases-tied": (
        "granite",
        MULTIPLIERS | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 0.01},
    ),
    "qwen3-moe-window": ("qwen3_moe", MOE | {"use_sliding_window": True, "sliding_window": 7}),
}


def cache_of(model: Transformer, batch: int = 2, slots: int = 80) -> KVCache:
    return KVCache(model.config, batch, slots, CPU, torch.float32)


def in_parts(model: Transformer, tokens: torch.Tensor, cuts: list[int], end: int | None = None) -> torch.Tensor:
    """Logits of all positions, the cache filled part by part; end: how far attention may look (default: no further)."""
    cache, positions = cache_of(model, len(tokens)), torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    bounds = zip([0, *cuts], [*cuts, tokens.shape[1]])
    return torch.cat([model(tokens[:, a:b], positions[:, a:b], cache, end=end or b) for a, b in bounds], 1)


def check_parity(folder: Path, reference: torch.nn.Module, **options) -> None:
    model = checkpoint.load(str(folder), **options)
    tokens = torch.randint(0, model.config.vocab_size, (2, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = reference(tokens).logits
    assert want.std() > 0.1  # a comparison of zeros would prove nothing
    ways = {
        "prefill": in_parts(model, tokens, []),
        "chunked prefill": in_parts(model, tokens, [20, 45]),
        "cached decode": in_parts(model, tokens, [17, *range(33, T)]),
        "decode behind the rounded prefix": in_parts(model, tokens, [40, *range(50, T)], end=80),
    }
    errors = {way: float((got - want).abs().max()) for way, got in ways.items()}
    assert all(error <= 1e-4 for error in errors.values()), errors


@pytest.mark.parametrize("case", CASES)
def test_parity_with_transformers(tiny, case):
    kind, changes = CASES[case]
    check_parity(*tiny(kind, **changes))


def to_old_spelling(folder: Path, legacy: str) -> None:
    """config.json as transformers 4 wrote it: rope_theta and rope_scaling (`type` or `rope_type`), torch_dtype."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {legacy: kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.37.2"
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("case", ["llama", "llama-linear", "llama-llama3", "llama-yarn-mscale", "mixtral", "qwen3"])
@pytest.mark.parametrize("legacy", ["type", "rope_type"])
def test_parity_with_the_old_spelling_of_config_json(tiny, case, legacy):
    kind, changes = CASES[case]
    folder, reference = tiny(kind, **changes)
    to_old_spelling(folder, legacy)
    assert "rope_parameters" not in (folder / "config.json").read_text()
    check_parity(folder, reference)


def test_rows_of_a_batch_may_be_at_different_positions(tiny):
    model = checkpoint.load(str(tiny("mistral", sliding_window=13)[0]))
    tokens = torch.randint(0, 200, (2, 40), generator=torch.Generator().manual_seed(2))
    whole, cache = in_parts(model, tokens, []), cache_of(model)
    lengths = torch.tensor([31, 9])
    select = lengths - 1  # a padded prefill: the shorter row's padding is overwritten as it goes on
    seen: list[tuple[int, ...]] = []
    hooks = [layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape)) for layer in model.layers]
    logits = model(tokens[:, :31], torch.arange(31).expand(2, -1), cache, end=31, select=select + 31 * torch.arange(2))
    assert logits.shape == (2, 1, 200)
    assert [shape[:2] for shape in seen] == [(2, 31)] * (len(hooks) - 1) + [(2, 1)]  # of the last, the wanted alone
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(logits[:, 0], whole[torch.arange(2), select], atol=1e-5, rtol=0)
    for _ in range(9):
        step = tokens.gather(1, lengths[:, None])
        logits = model(step, lengths[:, None], cache, end=64)
        torch.testing.assert_close(logits[:, 0], whole[torch.arange(2), lengths], atol=1e-5, rtol=0)
        lengths = lengths + 1


def test_logits_in_every_dtype(tiny):
    folder, _ = tiny(dtype=torch.bfloat16)
    exact = checkpoint.load(str(folder), dtype=torch.float32)
    tokens = torch.randint(0, 200, (1, 12), generator=torch.Generator().manual_seed(3))
    want = in_parts(exact, tokens, [])
    for dtype in (torch.bfloat16, torch.float16):
        model = checkpoint.load(str(folder), dtype=dtype)
        cache = KVCache(model.config, 1, 16, CPU, dtype)
        got = model(tokens, torch.arange(12)[None], cache, end=12)
        assert got.dtype == dtype and model.inv_freq.dtype == torch.float32
        assert 0 < (got - want).abs().max() < 0.1


def test_rotary_tables_keep_float32_precision_far_out():
    """At position 100,000 a bfloat16 or float16 table would be off by whole turns."""
    inv_freq, factor = Rope(rope_theta=1e6).frequencies(64, 131072)
    exact = 1e6 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert factor == 1 and ((inv_freq.double() - exact) * 100_000).abs().max() < 0.02


# -- mixture of experts ----------------


@pytest.mark.parametrize("kind, changes", [("mixtral", {"num_local_experts": 8}), ("qwen3_moe", MOE)])
@pytest.mark.parametrize("batch", [1, 2])
def test_decode_reads_only_the_chosen_experts(tiny, kind, changes, batch):
    model = checkpoint.load(str(tiny(kind, **changes)[0]))
    tokens = torch.randint(0, 200, (batch, 12), generator=torch.Generator().manual_seed(4))
    cache, positions = cache_of(model, batch), torch.arange(12).expand(batch, -1)
    model(tokens[:, :11], positions[:, :11], cache, end=11)
    chosen: list[set[int]] = []

    def note(module, args, kwargs):
        chosen.append(set((args[1] if len(args) > 1 else kwargs["experts"]).tolist()))

    hooks = [layer.mlp.experts.register_forward_pre_hook(note, with_kwargs=True) for layer in model.layers]
    step = (tokens[:, 11:], positions[:, 11:], cache)
    want = model(*step, end=12)
    for layer, used in zip(model.layers, chosen):
        unused = [e for e in range(model.config.num_experts) if e not in used]
        assert unused and len(used) <= batch * model.config.num_experts_per_tok
        layer.mlp.experts.gate_up_proj.weight[unused] = float("nan")
        layer.mlp.experts.down_proj.weight[unused] = float("nan")
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(*step, end=12), want)
    layer.mlp.experts.down_proj.weight[min(used)] = float("nan")
    assert model(*step, end=12).isnan().any()  # the NaN would have shown


def test_decoding_many_rows_needs_no_host(tiny):
    """A step of more rows than a gather is worth has fixed shapes: the same as row by row, and fit for capture."""
    model = checkpoint.load(str(tiny("qwen3_moe", **MOE)[0]))
    mlp, norm = model.layers[0].mlp, model.layers[0].post_attention_layernorm
    x = torch.randn(DECODE_TOKENS + 4, 1, 64, generator=torch.Generator().manual_seed(5))
    step = torch.compile(lambda x: mlp(x, norm), backend="eager", fullgraph=True)  # refuses data-dependent shapes
    assert torch.allclose(step(x), torch.cat([mlp(row[None], norm) for row in x]), atol=1e-5)


def test_few_and_many_rows_go_through_the_same_experts(tiny):
    """Up to DECODE_TOKENS rows gather their experts' weights, more go expert by expert."""
    model = checkpoint.load(str(tiny("qwen3_moe", **MOE)[0]))
    mlp, norm = model.layers[0].mlp, model.layers[0].post_attention_layernorm
    x = torch.randn(1, DECODE_TOKENS + 5, 64, generator=torch.Generator().manual_seed(5))
    few = torch.cat([mlp(part, norm) for part in x.split(7, 1)], 1)
    torch.testing.assert_close(mlp(x, norm), few, atol=1e-5, rtol=1e-5)


# -- attention's cost ----------------


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that an operation allocates (views and in-place writes allocate nothing)."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.total, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                size = t.untyped_storage().nbytes()
                self.largest, self.total = max(self.largest, size), self.total + size
        return out


@pytest.mark.parametrize("kind, changes", [("llama", {}), ("mistral", {"sliding_window": 50}), ("mixtral", {})])
def test_a_decode_step_allocates_nothing_that_grows_with_the_cache(tiny, kind, changes):
    model = checkpoint.load(str(tiny(kind, **changes, max_position_embeddings=8192)[0]))
    sizes = {}
    for slots in (512, 4096):
        cache = cache_of(model, 1, slots)
        with Sizes() as seen:
            model(torch.tensor([[5]]), torch.tensor([[100]]), cache, end=128)
        sizes[slots] = (seen.largest, seen.total)
    assert sizes[512] == sizes[4096] and sizes[512][1] > 0


def test_decode_attention_reads_keys_and_values_once_for_a_group():
    """8 query heads share one K and V: a repeated copy would be 8 times as large as what is allowed here."""
    q, cache = torch.randn(2, 1, 16, 64), torch.randn(2, 2, 2, 512, 64)
    k, v = cache[0, :, :, :256], cache[1, :, :, :256]
    with Sizes() as seen:
        attend(q, k, v, torch.tensor([[200], [17]]), 0)
    assert 0 < seen.largest < k.numel() * k.element_size()  # the scores; not even one copy of K


def test_the_compiled_decode_step_equals_the_eager_one_and_allocates_nothing_that_grows(tiny):
    model = checkpoint.load(str(tiny(num_hidden_layers=1, max_position_embeddings=8192)[0]))
    token, position, largest = torch.tensor([[5]]), torch.tensor([[100]]), {}

    def step(tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return model(tokens, positions, cache, end=128)

    for slots in (512, 4096):
        torch._dynamo.reset()
        cache, twin = cache_of(model, 1, slots), cache_of(model, 1, slots)
        for layer, other in zip(cache.layers, twin.layers):
            layer.k.normal_(), layer.v.normal_()
            other.k.copy_(layer.k), other.v.copy_(layer.v)
        compiled = torch.compile(step, fullgraph=True)
        with torch.no_grad():
            compiled(token, position, cache)
            with torch.profiler.profile(profile_memory=True) as trace:
                got = compiled(token, position, cache)
            want = step(token, position, twin)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert torch.allclose(cache.layers[0].k, twin.layers[0].k, atol=1e-6)
        largest[slots] = max(event.cpu_memory_usage for event in trace.events())
    assert largest[512] == largest[4096] > 0


@pytest.mark.parametrize("window", [0, 3, 20])
@pytest.mark.parametrize("rows", [1, 5, DECODE_TOKENS, DECODE_TOKENS + 3])
def test_attend_against_a_direct_computation(rows, window):
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(2, rows, 6, 10, generator=generator)
    k, v = (torch.randn(2, 3, 40, 10, generator=generator) for _ in range(2))
    positions = torch.stack([torch.arange(rows) + 4, torch.arange(rows) + 21])
    k[0, :, 4 + rows :], v[1, :, 21 + rows :] = 1e4, 1e4  # beyond the position: never seen
    want = torch.empty_like(q)
    for b in range(2):
        for t in range(rows):
            last = int(positions[b, t])
            first = max(0, last - window + 1) if window else 0
            for h in range(6):
                scores = k[b, h // 2, first : last + 1] @ q[b, t, h] / 10**0.5
                want[b, t, h] = torch.softmax(scores, 0) @ v[b, h // 2, first : last + 1]
    torch.testing.assert_close(attend(q, k, v, positions, window), want, atol=1e-5, rtol=1e-5)

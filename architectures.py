"""config.json of every supported `model_type` -> `ModelConfig`.

Knows the dialects of config.json. Refuses to know tensors, files and devices.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model import ModelConfig, Rope

# model_type -> what its class in transformers takes for a key that config.json lacks; the particulars of each
# architecture are read further below
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"sliding_window": 4096, "use_sliding_window": True},
    "qwen2": {"sliding_window": 4096},
    "qwen3": {"sliding_window": 4096},
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts_per_tok": 2, "use_sliding_window": True}
    | {"num_experts": 8},
    "qwen3_moe": {"sliding_window": 4096, "num_experts": 128},
    "phi3": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "use_sliding_window": True}
    | {"original_max_position_embeddings": 4096},
    "gemma3_text": {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072}
    | {"rope_theta": 1e6, "sliding_window": 4096, "use_sliding_window": True, "tie_word_embeddings": True},
    "smollm3": {"rope_theta": 2e6, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "olmo2": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    "granite": {"max_position_embeddings": 2048},
}
SUPPORTED = tuple(DEFAULTS)
# rope_type -> the keys that it needs
_ROPES = {"default": "", "linear": "factor", "dynamic": "", "llama3": "factor low_freq_factor high_freq_factor"}
_ROPES |= {"yarn": "factor", "longrope": "short_factor long_factor original_max_position_embeddings"}

# keys of config.json that do not change the mathematics of inference: what belongs to generation, training, hardware,
# attention implementations, tokens and bookkeeping, by name or by family; every other key is read below or refused
_HARMLESS = frozenset(
    """
    add_cross_attention architectures attn_implementation auto_map bad_words_ids base_model_name_or_path
    cache_implementation chunk_size_feed_forward compression_config cross_attention_hidden_size datasets device_map
    do_sample dtype early_stopping ep_size experts_implementation finetuning_task flash_attention id2label
    initializer_range is_decoder is_encoder_decoder is_llama_config keys_to_ignore_at_inference label2id language
    library_name license max_batch_size max_new_tokens model_name name neftune_noise_alpha num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores padding_side prefix pretraining_tp
    problem_type pruned_heads quantization quantization_config remove_invalid_values router_jitter_noise seq_length
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings top_k top_p torch_dtype
    torchscript typical_p use_bfloat16 use_cache use_reentrant use_sdpa vocab_size_override world_size
    """.split()
)
_HARMLESS_FAMILIES = re.compile(
    r"_.*|.*_token_id|.*_token_index|unsloth_.*|tokenizer_.*|transformers.*|.*_loss_coef(ficient)?|.*_(dropout|pdrop)|"
    r"gradient_checkpointing.*|.*_parallel_size|use_flash.*|return_dict.*|(model_)?m(ax|in)_.*len(gth)?|"
    r"num_beam.*|.*_penalty|.*suppress_tokens|.*no_repeat_ngram_size"
)


def rope_from_hf(config: Mapping[str, Any], factors: str = "short_factor") -> Rope:
    """The rotation that a config describes in the old spelling (rope_theta, rope_scaling with type or rope_type) or in
    the new one (rope_parameters). ValueError for what is unknown. factors: which of LongRoPE's two lists it takes.
    """
    raw = {k: v for k, v in (config.get("rope_scaling") or {}).items() if v is not None}
    raw |= {k: v for k, v in (config.get("rope_parameters") or {}).items() if v is not None}
    raw.setdefault("rope_type", raw.pop("type", "default"))
    raw.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if raw["rope_type"] == "su" or "long_factor" in raw:  # the first folders of Phi-3 call it su or yarn
        raw["rope_type"] = "longrope"
    if raw["rope_type"] not in tuple(_ROPES):
        raise ValueError(f"rope_type {raw['rope_type']!r} is not supported; {', '.join(_ROPES)} are")
    if config.get("original_max_position_embeddings") and raw["rope_type"] in ("llama3", "yarn", "longrope"):
        raw["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    if absent := [k for k in _ROPES[raw["rope_type"]].split() if k not in raw]:
        raise ValueError(f"rope_type {raw['rope_type']!r} needs {', '.join(absent)}, which config.json does not give")
    for name in ("partial_rotary_factor", "extrapolation_factor"):
        if raw.pop(name, 1.0) != 1.0:
            raise ValueError(f"{name} other than 1.0 is not supported")
    attn_factor, _ = raw.pop("attn_factor", 1.0), raw.pop("finetuned", None)
    listed = {name: raw.pop(name, ()) for name in ("short_factor", "long_factor")}[factors]
    if unknown := sorted(set(raw) - (set(Rope.__dataclass_fields__) - {"factors"})):
        raise ValueError(f"rope_scaling has keys that are not implemented: {str(unknown)[1:-1]}")
    if type(raw.get("truncate", True)) is not bool:
        raise ValueError(f"rope_scaling has truncate = {raw['truncate']!r}; it must be true or false")
    low = {"rope_theta": 1, "mscale": -1, "mscale_all_dim": -1, "original_max_position_embeddings": 0.5}
    high = {"rope_theta": 1e15, "original_max_position_embeddings": 1 << 31}
    numbers = {k: v for k, v in raw.items() if k not in ("rope_type", "truncate")} | {"attn_factor": attn_factor}
    raw["factors"] = tuple(listed) if isinstance(listed, (list, tuple)) else ()
    numbers |= {f"{factors}[{i}]": v for i, v in enumerate(raw["factors"])}
    fits = {k: type(v) in (int, float) and low.get(k, 1e-6) < v < high.get(k, 1e6) for k, v in numbers.items()}
    if wrong := [f"{k} = {numbers[k]!r:.99}" for k, fit in fits.items() if not fit]:
        raise ValueError(f"config.json has {', '.join(wrong)}; it takes numbers from 1e-6 to 1e6 (rope_theta: above 1)")
    if raw["rope_type"] == "llama3" and raw["low_freq_factor"] >= raw["high_freq_factor"]:
        raise ValueError("rope_scaling has a low_freq_factor that is not below its high_freq_factor")
    rope = Rope(**raw)
    if rope.rope_type == "yarn" and attn_factor != 1:  # vLLM and llama.cpp multiply by it; transformers passes it over
        rope = replace(rope, attention_factor=attn_factor * rope.frequencies(2, 1)[1])
    return rope


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig. ValueError naming an unsupported architecture, a missing key, or a key that is
    not implemented.
    """
    reader = _Reader(config)
    kind = reader("model_type", "")
    if kind not in SUPPORTED:
        raise ValueError(f"model_type {kind!r} is not supported; supported are {', '.join(SUPPORTED)}")
    reader.defaults = DEFAULTS[kind]
    moe = kind in ("mixtral", "qwen3_moe")
    hidden, heads = reader("hidden_size"), reader("num_attention_heads")
    layers = reader("num_hidden_layers", high=100_000)
    if (act := reader("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act {act!r} is not supported; silu is")
    # Mistral's, Mixtral's and Phi-3's classes have no biases, whatever the keys say
    attention_bias = reader("attention_bias", False) and kind not in ("mistral", "mixtral", "phi3")
    ropes, context = _ropes_and_context(reader, kind)
    result = ModelConfig(
        model_type=kind,
        vocab_size=reader("vocab_size"),
        hidden_size=hidden,
        intermediate_size=(intermediate := reader("intermediate_size")),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=reader("num_key_value_heads", heads),
        head_dim=(head_dim := reader("head_dim", hidden // heads)),
        rotary_dim=head_dim,
        rms_norm_eps=reader("rms_norm_eps", 1e-6),
        max_position_embeddings=context,
        ropes=ropes,
        layer_ropes=(0,) * layers,
        tie_word_embeddings=reader("tie_word_embeddings", False),
        qkv_bias=True if kind == "qwen2" else attention_bias,
        o_bias=attention_bias and kind != "qwen2",
        mlp_bias=reader("mlp_bias", False) and kind in ("llama", "smollm3", "granite"),
        qk_norm=kind in ("qwen3", "qwen3_moe", "gemma3_text", "olmo2"),
        windows=_windows(reader, kind, layers),
        sparse=_sparse_layers(reader, layers) if moe else (False,) * layers,
        num_experts=(reader("num_local_experts", 0, 0) or reader("num_experts")) if moe else 0,
        num_experts_per_tok=reader("num_experts_per_tok", 8) if moe else 0,
        moe_intermediate_size=(intermediate if kind == "mixtral" else reader("moe_intermediate_size")) if moe else 0,
        norm_topk_prob=kind == "mixtral" or (moe and reader("norm_topk_prob", False)),
    )
    if kind in _PARTICULARS:
        result = replace(result, **_PARTICULARS[kind](reader, result))
    reader.finish()
    _check(result)
    return result


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as it is, or that of the text model which a multimodal Gemma 3 contains."""
    if config.get("model_type") != "gemma3":
        return dict(config)
    outer = {k: v for k, v in config.items() if k not in ("vision_config", "text_config", "mm_tokens_per_image")}
    text: dict[str, Any] = _Reader(config)("text_config", {})
    return outer | text | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}


def _gemma3(reader: "_Reader", config: ModelConfig) -> dict[str, Any]:
    """Gemma 3 (Gemma Team 2025, section 2): layers with a window have a RoPE of their own."""
    told = {"rope_parameters": _Reader(reader("rope_parameters", {}))("sliding_attention", {})}
    local = rope_from_hf(told | {"rope_theta": reader("rope_local_base_freq", 1e4)})
    ropes = {"ropes": (*config.ropes, local), "layer_ropes": tuple(int(window > 0) for window in config.windows)}
    scale = (config.head_dim / reader.positive("query_pre_attn_scalar", 256.0)) ** 0.5
    if (act := reader("hidden_activation", "gelu_pytorch_tanh")) != "gelu_pytorch_tanh":
        raise ValueError(f"hidden_activation {act!r} is not supported; gelu_pytorch_tanh is")
    scales = {"query_scale": scale, "embedding_multiplier": config.hidden_size**0.5}
    return ropes | scales | {"hidden_act": act, "post_norms": True}


def _phi3(reader: "_Reader", config: ModelConfig) -> dict[str, Any]:
    """Phi-3 (Abdin et al. 2024) to Phi-4-mini, which rotates three quarters of a head."""
    for key in ("full_attn_mod", "interpolate_factor"):  # Phi-4-mini has these keys, always 1
        if reader(key, 1) != 1:
            raise ValueError(f"config.json has {key} = {reader(key)}; only 1 is supported")
    told = _Reader(reader("rope_parameters", {}))("partial_rotary_factor", 1.0)
    share, dim = reader("partial_rotary_factor", told), config.head_dim
    if not 2 <= (turned := int(dim * share)) <= dim or turned % 2:
        wrong = f"partial_rotary_factor = {share!r:.99}, which rotates {turned:g} of the {dim} numbers of a head"
        raise ValueError(f"config.json has {wrong}; it takes an even number from 2 on")
    return {"rotary_dim": turned}


def _smollm3(reader: "_Reader", config: ModelConfig) -> dict[str, Any]:
    """In SmolLM3 every fourth layer has no RoPE. Where the config has a window, it is that of these layers."""
    layers, every = config.num_hidden_layers, reader("no_rope_layer_interval", 4)
    rotated = reader("no_rope_layers", ()) or [int((i + 1) % every != 0) for i in range(layers)]
    if len(rotated) != layers or not {*map(repr, rotated)} <= {"0", "1"}:
        raise ValueError(f"config.json has no_rope_layers = {rotated!r:.99}; it takes {layers} numbers, 0 or 1")
    windows = tuple(0 if yes else window for yes, window in zip(rotated, config.windows))
    still = Rope(1.0, "linear", math.inf)  # whose frequencies are all 0
    ropes = {"ropes": (*config.ropes, still), "layer_ropes": tuple(1 - yes for yes in rotated)}
    return ropes | {"windows": config.windows if reader("layer_types", ()) else windows}


def _olmo2(reader: "_Reader", config: ModelConfig) -> dict[str, Any]:
    """OLMo 2 (OLMo Team 2024, section 3) has norms only behind attention and MLP, and norms queries and keys over all
    heads at once.
    """
    return {"pre_norms": False, "post_norms": True, "qk_norm_whole": True}


def _granite(reader: "_Reader", config: ModelConfig) -> dict[str, Any]:
    """Granite 3's four multipliers. The activations here are those of transformers divided by the residual multiplier
    r, so that each block's result is added as it is. The norms before the blocks give the same as there, because their
    epsilon is divided by r squared.
    """
    r = reader.positive("residual_multiplier", 1.0)
    embedding, logits = (reader.positive(key, 1.0) for key in ("embedding_multiplier", "logits_scaling"))
    scores = reader.positive("attention_multiplier", 1.0) * config.head_dim**0.5
    scales = {"embedding_multiplier": embedding / r, "query_scale": scores, "logits_scaling": logits}
    return scales | {"rms_norm_eps": config.rms_norm_eps / r**2}


_PARTICULARS = {"phi3": _phi3, "gemma3_text": _gemma3, "smollm3": _smollm3, "olmo2": _olmo2, "granite": _granite}


def _ropes_and_context(reader: "_Reader", kind: str) -> tuple[tuple[Rope, ...], int]:
    """The rotations, and the context that they are scaled to, as vLLM computes it: config.json may hold the context
    before scaling, or the one after it.
    """
    config = {k: reader(k, {}) for k in ("rope_scaling", "rope_parameters")}
    if kind == "gemma3_text":
        config["rope_parameters"] = _Reader(config["rope_parameters"])("full_attention", {})
    if kind == "phi3":
        config["rope_parameters"] = {k: v for k, v in config["rope_parameters"].items() if k != "partial_rotary_factor"}
    config["rope_theta"] = reader("rope_theta", 1e4)
    config["original_max_position_embeddings"] = reader("original_max_position_embeddings", 0, 0)
    rope, context = rope_from_hf(config), reader("max_position_embeddings", 32768)
    original, others = int(rope.original_max_position_embeddings or context), list[Rope]()
    if rope.rope_type == "yarn":
        rope = replace(rope, original_max_position_embeddings=original)
        context = max(context, int(original * rope.factor))
    elif rope.rope_type == "longrope":  # config.json holds the context of after, and mostly no factor
        factor = (config["rope_scaling"] | config["rope_parameters"]).get("factor") or context / original
        attention = math.sqrt(1 + math.log(max(factor, 1)) / math.log(max(original, 2)))
        rope = replace(
            rope, attention_factor=rope.attention_factor or attention, original_max_position_embeddings=original
        )
        others = [replace(rope, factors=rope_from_hf(config, "long_factor").factors)]
    elif rope.rope_type == "linear" and kind != "gemma3_text":  # whose configurations hold the context of after
        context = max(context, int(context * rope.factor))
    return (rope, *others), min(context, (1 << 31) - 1)


def _check(config: ModelConfig) -> None:
    """ValueError for sizes that do not fit each other."""
    heads, experts = config.num_attention_heads, config.num_experts
    for key, what, ok in (
        ("num_experts_per_tok", f"more than the {experts} experts", config.num_experts_per_tok <= experts),
        ("num_key_value_heads", f"no divisor of the {heads} heads", heads % config.num_key_value_heads == 0),
        ("head_dim", "odd", config.head_dim % 2 == 0),
    ):
        if not ok:
            raise ValueError(f"config.json has {key} = {getattr(config, key)}, which is {what}")
    for key, rope in zip(("short_factor", "long_factor"), config.ropes):
        count, want = len(rope.factors), config.rotary_dim // 2
        if rope.rope_type == "longrope" and count != want:
            raise ValueError(f"rope_scaling has {key} with {count} numbers; half of what is rotated is {want}")


class _Reader:
    """Reads keys of a config and remembers which, so that a key nobody read can be refused. A value has the type of its
    default, an integer where there is none.
    """

    # by the type of a default: what the value must be, in words, and the type that JSON may have instead
    KINDS = {float: "a number, 0 or more", bool: "true or false", str: "a string", tuple: "a list", dict: "an object"}
    ALSO = {float: int, tuple: list}

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config, self.seen = config, set(_HARMLESS)
        self.defaults: Mapping[str, Any] = {}

    def __call__(self, key: str, default: Any = ..., low: int = 1, high: int = (1 << 31) - 1) -> Any:  # noqa: ANN401
        """An integer is from `low` to `high`; others are positive or, as epsilon may be, 0."""
        self.seen.add(key)
        value = self.config.get(key)
        if value is None and not (key == "sliding_window" and key in self.config):  # null is none there
            value = self.defaults.get(key)
        if value is None and default is ...:
            raise ValueError(f"config.json has no {key!r}")
        if value is None:
            return default
        kind = int if default is ... else type(default)
        ok = type(value) in (kind, self.ALSO.get(kind))
        if kind in (int, float):
            least, most = (low, high) if kind is int else (0, 1e300)
            ok = ok and least <= value <= most
        if not ok:
            what = f"an integer from {low} to {high}" if kind is int else self.KINDS[kind]
            raise ValueError(f"config.json has {key} = {value!r:.99}; it must be {what}")
        return value

    def positive(self, key: str, default: float) -> float:
        if not 1e-6 < (value := self(key, default)) < 1e6:
            raise ValueError(f"config.json has {key} = {value!r:.99}; it must be a number from 1e-6 to 1e6")
        return float(value)

    def finish(self) -> None:
        off: tuple[Any, ...] = (None, False, "", [], {})
        left = [k for k, v in self.config.items() if k not in self.seen and v not in off]
        if unknown := [repr(k)[1:-1] for k in left if not _HARMLESS_FAMILIES.fullmatch(k)]:
            what = f"keys that may change the mathematics and are not implemented: {', '.join(sorted(unknown))}"
            raise ValueError(f"config.json has {what}; delete them only if you know that they do not matter")


def _windows(reader: _Reader, kind: str, layers: int) -> tuple[int, ...]:
    """Sliding window per layer: Mistral's on all layers; Qwen's only if switched on, by layer_types or from
    max_window_layers up.
    """
    window = reader("sliding_window", 0, 0)
    first, types = reader("max_window_layers", 28, 0), reader("layer_types", ())
    if not reader("use_sliding_window", False) or kind in ("llama", "olmo2", "granite"):
        window = 0
    known = "full_attention", "sliding_attention"
    if unknown := sorted({repr(t) for t in types if t not in known}):
        raise ValueError(f"layer_types {', '.join(unknown)} are not supported; {' and '.join(known)} are")
    if kind == "gemma3_text":
        every = reader("sliding_window_pattern", reader("_sliding_window_pattern", 6))
        types = types or ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
        if not window and "sliding_attention" in types:
            raise ValueError("config.json has no sliding_window, and layers that need one")
    if types and len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries and num_hidden_layers is {layers}")
    slides = [t == "sliding_attention" for t in types]
    slides = slides or [kind not in ("qwen2", "qwen3") or i >= first for i in range(layers)]
    return tuple(window if yes else 0 for yes in slides)


def _sparse_layers(reader: _Reader, layers: int) -> tuple[bool, ...]:
    step, dense = reader("decoder_sparse_step", 1), reader("mlp_only_layers", ())
    if wrong := [i for i in dense if type(i) is not int]:
        raise ValueError(f"config.json has mlp_only_layers with {wrong[0]!r}; they must be numbers of layers")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))

"""config.json of every supported `model_type` -> `ModelConfig`, and the named public shapes.

Knows the dialects of config.json and generation_config.json. Refuses to know tensors, files and devices.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model import ModelConfig, Rope

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")

# keys of config.json that do not change the mathematics of inference: what belongs to generation, training, hardware,
# attention implementations, tokens and bookkeeping; every other key is either read below or refused
_HARMLESS = frozenset(
    """
    add_cross_attention architectures attention_dropout attn_implementation auto_map bad_words_ids
    base_model_name_or_path begin_suppress_tokens chunk_size_feed_forward classifier_dropout compression_config
    cross_attention_hidden_size datasets device_map diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size ep_size exponential_decay_length_penalty experts_implementation finetuning_task
    flash_attention forced_bos_token_id forced_eos_token_id gradient_checkpointing gradient_checkpointing_kwargs
    hidden_dropout id2label initializer_range is_decoder is_encoder_decoder is_llama_config
    keys_to_ignore_at_inference label2id language length_penalty library_name license max_batch_size max_length
    max_new_tokens max_seq_len max_seq_length max_sequence_length min_length model_max_length model_name
    model_parallel_size name neftune_noise_alpha no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_router_logits output_scores padding_side
    pipeline_parallel_size prefix pretraining_tp problem_type pruned_heads quantization quantization_config
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate router_aux_loss_coef
    router_jitter_noise seq_length suppress_tokens task_specific_params temperature tensor_parallel_size
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class tokenizer_model_max_length
    tokenizer_padding_side top_k top_p torch_dtype torchscript transformers.js_config transformers_version
    transformers_weights typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attention
    use_flash_attention_2 use_flash_attn use_reentrant use_sdpa vocab_size_override world_size
    """.split()
)

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
)  # keys of generation_config.json that `SamplingParams` knows
# other keys that change the output, each with the value that is off; null and what is empty always are
_NOT_SAMPLED = {
    **dict.fromkeys("encoder_repetition_penalty typical_p guidance_scale".split(), 1),
    **dict.fromkeys("num_beams num_beam_groups".split(), 1),
    **dict.fromkeys("no_repeat_ngram_size encoder_no_repeat_ngram_size min_length min_new_tokens".split(), 0),
    **dict.fromkeys("epsilon_cutoff eta_cutoff diversity_penalty penalty_alpha top_h token_healing".split(), 0),
    **dict.fromkeys("presence_penalty frequency_penalty".split(), 0),
    **dict.fromkeys("bad_words_ids force_words_ids constraints suppress_tokens begin_suppress_tokens".split()),
    **dict.fromkeys("forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty max_time".split()),
    **dict.fromkeys("sequence_bias stop_strings watermarking_config dola_layers".split()),
}


def sampling_from_hf(config: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """generation_config.json -> (the `SAMPLING` parameters that it sets, the keys that it sets in vain).

    What other programs take for "off" is off: top_k -1. What they round is rounded: a temperature below 0.001 is
    greedy, and so is top_p 0, which leaves the most probable token. `do_sample: false` is greedy.
    """
    values: dict[str, float] = {}
    for name in (n for n in SAMPLING if config.get(n) is not None):
        value, whole = config[name], name == "top_k"
        if type(value) not in (int, float) or (whole and value % 1 != 0):
            raise ValueError(f"{name} is {value!r}; it must be {'an integer' if whole else 'a number'}")
        rounded = {"top_k": 0 if value == -1 else value, "top_p": value or 1e-6}
        rounded["temperature"] = 0.0 if 0 <= value < 1e-3 else value
        values[name] = int(rounded[name]) if whole else rounded.get(name, value)
    if not isinstance(sampled := config.get("do_sample"), bool | None):
        raise ValueError(f"do_sample is {sampled!r}; it must be true or false")
    if sampled is False:
        values = {"temperature": 0.0} | {n: v for n, v in values.items() if n == "repetition_penalty"}
    return values, [name for name, off in _NOT_SAMPLED.items() if config.get(name) not in (None, off, "", [], {})]


def rope_from_hf(config: Mapping[str, Any]) -> Rope:
    """Old spelling (rope_theta, rope_scaling with type or rope_type) and new (rope_parameters). ValueError for what
    is unknown.
    """
    raw = {k: v for k, v in (config.get("rope_scaling") or {}).items() if v is not None}
    raw |= {k: v for k, v in (config.get("rope_parameters") or {}).items() if v is not None}
    legacy_type = raw.pop("type", "default")
    raw.setdefault("rope_type", legacy_type)
    raw.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if raw["rope_type"] not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise ValueError(
            f"rope_type {raw['rope_type']!r} is not supported; default, linear, dynamic, llama3 and yarn are"
        )
    if config.get("original_max_position_embeddings") and raw["rope_type"] in ("llama3", "yarn"):
        raw["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    scaled = {"linear": ["factor"], "yarn": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}
    if absent := [k for k in scaled.get(raw["rope_type"], []) if k not in raw]:
        raise ValueError(f"rope_type {raw['rope_type']!r} needs {', '.join(absent)}, which config.json does not give")
    for name in ("partial_rotary_factor", "extrapolation_factor"):
        if raw.pop(name, 1.0) != 1.0:
            raise ValueError(f"{name} other than 1.0 is not supported")
    attn_factor, _ = raw.pop("attn_factor", 1.0), raw.pop("finetuned", None)
    if unknown := sorted(set(raw) - set(Rope.__dataclass_fields__)):
        raise ValueError(f"rope_scaling has keys that are not implemented: {str(unknown)[1:-1]}")
    if type(raw.get("truncate", True)) is not bool:
        raise ValueError(f"rope_scaling has truncate = {raw['truncate']!r}; it must be true or false")
    low = {"rope_theta": 1, "mscale": -1, "mscale_all_dim": -1, "original_max_position_embeddings": 0.5}
    high = {"rope_theta": 1e15, "original_max_position_embeddings": 1 << 31}
    numbers = {k: v for k, v in raw.items() if k not in ("rope_type", "truncate")} | {"attn_factor": attn_factor}
    if wrong := [
        f"{k} = {v!r:.99}"
        for k, v in numbers.items()
        if type(v) not in (int, float) or not low.get(k, 1e-6) < v < high.get(k, 1e6)
    ]:
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
    moe = kind in ("mixtral", "qwen3_moe")
    hidden, heads = reader("hidden_size"), reader("num_attention_heads")
    layers = reader("num_hidden_layers", high=100_000)
    if reader("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported; silu is")
    # Mistral's and Mixtral's classes have no biases, whatever the key says; mlp_bias is Llama's alone
    attention_bias = reader("attention_bias", False) and kind not in ("mistral", "mixtral")
    experts = (
        (reader("num_local_experts", 0, 0) or reader("num_experts", 8 if kind == "mixtral" else 128)) if moe else 0
    )
    intermediate = reader("intermediate_size")
    rope, context = _rope_and_context(reader, kind)
    result = ModelConfig(
        model_type=kind,
        vocab_size=reader("vocab_size"),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=reader("num_key_value_heads", heads),
        head_dim=reader("head_dim", hidden // heads),
        rms_norm_eps=reader("rms_norm_eps", 1e-5 if kind == "mixtral" else 1e-6),
        max_position_embeddings=context,
        rope=rope,
        tie_word_embeddings=reader("tie_word_embeddings", False),
        qkv_bias=True if kind == "qwen2" else attention_bias,
        o_bias=False if kind == "qwen2" else attention_bias,
        mlp_bias=reader("mlp_bias", False) and kind == "llama",
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        windows=_windows(reader, kind, layers),
        sparse=_sparse_layers(reader, layers) if moe else (False,) * layers,
        num_experts=experts,
        num_experts_per_tok=reader("num_experts_per_tok", 2 if kind == "mixtral" else 8) if moe else 0,
        moe_intermediate_size=(intermediate if kind == "mixtral" else reader("moe_intermediate_size")) if moe else 0,
        norm_topk_prob=kind == "mixtral" or (moe and reader("norm_topk_prob", False)),
    )
    reader.finish()
    _check(result)
    return result


def _rope_and_context(reader: "_Reader", kind: str) -> tuple[Rope, int]:
    """The context is what scaling gives, as vLLM computes it: config.json may hold the one of before, or of after."""
    config = {k: reader(k, None) for k in ("rope_scaling", "rope_parameters")}
    config["rope_theta"] = reader("rope_theta", 1e6 if kind == "mixtral" else 1e4)
    config["original_max_position_embeddings"] = reader("original_max_position_embeddings", 0, 0)
    rope, context = rope_from_hf(config), reader("max_position_embeddings", 2048 if kind == "llama" else 32768)
    if rope.rope_type == "yarn":
        original = int(rope.original_max_position_embeddings or context)
        rope, context = (
            replace(rope, original_max_position_embeddings=original),
            max(context, int(original * rope.factor)),
        )
    elif rope.rope_type == "linear":
        context = max(context, int(context * rope.factor))
    return rope, min(context, (1 << 31) - 1)


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


class _Reader:
    """Reads keys of a config and remembers which, so that a key nobody read can be refused. A value has the type of its
    default, an object where that is None, an integer where there is none.
    """

    KINDS: dict[type, tuple[tuple[type, ...], str]] = {
        int: ((int,), "an integer"),
        float: ((int, float), "a number, 0 or more"),
        bool: ((bool,), "true or false"),
        str: ((str,), "a string"),
        tuple: ((list, tuple), "a list"),
        type(None): ((dict,), "an object"),
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config, self.seen = config, set(_HARMLESS)

    def __call__(self, key: str, default: Any = ..., low: int = 1, high: int = (1 << 31) - 1) -> Any:  # noqa: ANN401
        """An integer is from `low` to `high`; others are positive or, as epsilon may be, 0."""
        self.seen.add(key)
        value = self.config.get(key)
        if value is None and default is ...:
            raise ValueError(f"config.json has no {key!r}")
        if value is None:
            return default
        types, what = self.KINDS[int if default is ... else type(default)]
        if what == "an integer":
            what, ok = f"an integer from {low} to {high}", type(value) is int and low <= value <= high
        else:
            ok = type(value) in types and (float not in types or 0 <= value < 1e300)
        if not ok:
            raise ValueError(f"config.json has {key} = {value!r:.99}; it must be {what}")
        return value

    def finish(self) -> None:
        bookkeeping = re.compile(r"_.*|.*_token_id|.*_token_index|unsloth_.*|.*_loss_coef(ficient)?")
        off: tuple[Any, ...] = (None, False, "", [], {})
        unknown = [
            repr(k)[1:-1]
            for k, v in self.config.items()
            if k not in self.seen and v not in off and not bookkeeping.fullmatch(k)
        ]
        if unknown:
            raise ValueError(
                "config.json has keys that may change the mathematics and are not implemented: "
                f"{', '.join(sorted(unknown))}; "
                "delete them from config.json only if you know they do not matter"
            )


def _windows(reader: _Reader, kind: str, layers: int) -> tuple[int, ...]:
    """Sliding window per layer: Mistral's on all layers; Qwen's only if switched on, by layer_types or from
    max_window_layers up.
    """
    absent = 0 if "sliding_window" in reader.config or kind == "mixtral" else 4096  # null is none; absent, the default
    window = reader("sliding_window", absent, 0)
    first, types = reader("max_window_layers", 28, 0), reader("layer_types", ())
    if not reader("use_sliding_window", kind in ("mistral", "mixtral")) or kind == "llama":
        window = 0
    if unknown := sorted({repr(t) for t in types if t not in ("full_attention", "sliding_attention")}):
        raise ValueError(
            f"layer_types {', '.join(unknown)} are not supported; full_attention and sliding_attention are"
        )
    if types and len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries and num_hidden_layers is {layers}")
    if types:
        return tuple(window if t == "sliding_attention" else 0 for t in types)
    return tuple(window if kind not in ("qwen2", "qwen3") or i >= first else 0 for i in range(layers))


def _sparse_layers(reader: _Reader, layers: int) -> tuple[bool, ...]:
    step, dense = reader("decoder_sparse_step", 1), reader("mlp_only_layers", ())
    if wrong := [i for i in dense if type(i) is not int]:
        raise ValueError(f"config.json has mlp_only_layers with {wrong[0]!r}; they must be numbers of layers")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))


# name -> model_type, hidden, MLP, layers, heads, KV heads, head dim, vocabulary, context, rope_theta, tied, (experts,
# per token)
SHAPES: dict[str, tuple[Any, ...]] = {
    "llama-2-7b": ("llama", 4096, 11008, 32, 32, 32, 128, 32000, 4096, 1e4, False),
    "llama-2-13b": ("llama", 5120, 13824, 40, 40, 40, 128, 32000, 4096, 1e4, False),
    "llama-2-70b": ("llama", 8192, 28672, 80, 64, 8, 128, 32000, 4096, 1e4, False),
    "codellama-34b": ("llama", 8192, 22016, 48, 64, 8, 128, 32000, 16384, 1e6, False),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, 131072, 5e5, False),
    "llama-3.1-70b": ("llama", 8192, 28672, 80, 64, 8, 128, 128256, 131072, 5e5, False),
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, 131072, 5e5, True),
    "llama-3.2-3b": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, 131072, 5e5, True),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 128, 32768, 32768, 1e6, False),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 131072, 1e6, False),
    "qwen3-0.6b": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, 40960, 1e6, True),
    "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, 40960, 1e6, False),
    "qwen3-32b": ("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, 40960, 1e6, False),
    "mixtral-8x7b": ("mixtral", 4096, 14336, 32, 32, 8, 128, 32000, 32768, 1e6, False, 8, 2),
    "qwen3-30b-a3b": ("qwen3_moe", 2048, 768, 48, 32, 4, 128, 151936, 40960, 1e6, False, 128, 8),
    "tiny": ("llama", 256, 512, 2, 4, 2, 64, 512, 1024, 1e4, False),
}


def shape_json(name: str) -> dict[str, Any]:
    """What config.json says of a named public shape. ValueError lists the names."""
    if name not in SHAPES:
        raise ValueError(f"shape {name!r} is not known; known are {', '.join(SHAPES)}")
    kind, hidden, mlp, layers, heads, kv_heads, head_dim, vocab, context, theta, tied, *moe = SHAPES[name]
    hf: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
    }
    hf |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab}
    hf |= {"max_position_embeddings": context, "rope_theta": theta, "tie_word_embeddings": tied}
    if moe:
        hf |= {"num_local_experts": moe[0], "num_experts_per_tok": moe[1]}
    if kind == "qwen3_moe":
        hf |= {"moe_intermediate_size": mlp, "norm_topk_prob": True}
    return hf


def shape_config(name: str) -> ModelConfig:
    """The config of a named public shape. ValueError lists the names."""
    return config_from_hf(shape_json(name))
